"""Optimizers with state, for the tests of their files."""

from __future__ import annotations

from typing import Any

import torch

from adamw_steps import parameters
from fourbit.optim import PagedAdamW

KEY = "fourbit.optimizer"
"""Where a file has the options."""


def step(optimizer: PagedAdamW, number: int, *, without: frozenset[int] = frozenset()) -> None:
    """Gradients that depend on the number alone; some parameters have none."""
    source = torch.Generator().manual_seed(1000 + number)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=source).to(param.dtype)
        param.grad = None if index in without else gradient.to(param.device)
    optimizer.step()


def same(one: Any, two: Any) -> bool:
    """Of the same types, to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two)) and type(one) is type(two)
    return type(one) is type(two) and bool(one == two)


def stepped(bits: int = 8) -> PagedAdamW:
    """Three steps of a tensor with state of that width, and a small one; a third has no state."""
    optimizer = PagedAdamW(parameters((90, 70), (40,), (8, 8)), lr=1e-2, state_bits=bits)
    for number in range(3):
        step(optimizer, number, without=frozenset({2}))
    return optimizer
