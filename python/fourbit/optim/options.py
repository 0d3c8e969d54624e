"""The options of a parameter group: what they may be, and how the core takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor


def check_options(options: Mapping[str, Any]) -> None:
    """The options of a group.

    Raises:
        ValueError: naming the option that is out of range.
    """
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; it must have one")
    for name in ("lr", "eps", "weight_decay"):
        # YAML reads 1e-3 as a string, which schedulers would stumble over later.
        if not isinstance(options[name], Real | Tensor):
            raise ValueError(f"{name} is {options[name]!r}; it must be a number")
        if not 0 <= float(options[name]) < math.inf:
            raise ValueError(f"{name} is {options[name]}; it must be finite and not negative")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; they must be two numbers from 0 to below 1")
    if options["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits is {options['state_bits']!r}; use 8 or 32")
    if options.get("amsgrad"):
        raise ValueError("amsgrad is not supported; make the optimizer without it")
    # torch.optim.Adam, whose state is AdamW's, says here that its decay goes through the gradient.
    if options.get("decoupled_weight_decay") is False and float(options["weight_decay"]):
        raise ValueError("the weight decay is Adam's and not AdamW's; set it to 0 or use AdamW")


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as the core takes them."""
    return {
        "lr": float(group["lr"]),
        "beta1": float(group["betas"][0]),
        "beta2": float(group["betas"][1]),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
        "maximize": bool(group["maximize"]),
    }
