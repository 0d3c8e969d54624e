"""A step of AdamW on the CPU, of 16.8 million parameters: one tensor, and the adapters of a model.

Every step works on parameters, gradients and state that the cache has forgotten: it takes turns
with others of its kind, which are together larger than any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import fourbit

Measure = Callable[[list[Callable[[int], object]]], list[float]]
"""Median seconds of calls that take the number of their turn, interleaved."""

ELEMENTS = 1 << 24
ADAPTERS = 448
"""Seven linears of 32 layers have an adapter of two matrices each."""
TURNS = 3
"""Copies of everything: 0.5 GB with 8-bit state, 0.8 GB with 32-bit state."""

BYTES = {8: 4 + 4 + 4 + 2 * 2 * (1 + 4 / 256), 32: 4 + 4 + 4 + 2 * 2 * 4}
"""A parameter element's: itself read and written, its gradient read, both moments read and
written. With 8-bit state the gradient of a large tensor is read twice, which is not counted."""

OVER_TORCH, OVER_BITSANDBYTES = 1.2, 20.0
"""What 8-bit state should reach: at most so much of the time of torch's fused step in 32 bits, and
a step of bitsandbytes so many times as long."""


def rows(median_seconds: Measure, *, small: bool = False) -> list[dict[str, object]]:
    """8- and 32-bit state against torch's fused step in 32 bits and bitsandbytes' in 8.

    Args:
        median_seconds: times all steps of a row in turns.
        small: a sixteenth of the elements, to see that it runs.
    """
    elements = ELEMENTS // 16 if small else ELEMENTS
    return [row for tensors in (1, ADAPTERS) for row in _rows_of(elements, tensors, median_seconds)]


def _rows_of(elements: int, tensors: int, median_seconds: Measure) -> Iterator[dict[str, object]]:
    from bitsandbytes.optim import AdamW8bit

    shape = (elements // tensors,)
    count = shape[0] * tensors
    calls = [
        _steps(tensors, shape, make)
        for make in (
            lambda params: fourbit.PagedAdamW(params, state_bits=8),
            lambda params: fourbit.PagedAdamW(params, state_bits=32),
            lambda params: torch.optim.AdamW(params, fused=True),
            AdamW8bit,
        )
    ]
    ours_8, ours_32, fused, theirs = median_seconds(calls)
    of = f"{count / 1e6:.1f} M parameters in {tensors} tensor{'s' if tensors > 1 else ''}"
    for bits, ours in ((8, ours_8), (32, ours_32)):
        yield {
            "row": f"AdamW {bits}-bit, {of}",
            "fourbit_ms": ours * 1e3,
            "bitsandbytes_ms": theirs * 1e3,
            "torch_ms": fused * 1e3,
            "ratio": theirs / ours,
            "goal": OVER_BITSANDBYTES if bits == 8 else None,
            "torch_ratio": ours / fused,
            "torch_goal": OVER_TORCH if bits == 8 else None,
            "bytes_per_second": BYTES[bits] * count / ours,
        }


def _steps(
    tensors: int,
    shape: tuple[int, ...],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> Callable[[int], object]:
    """A step of the optimizer whose turn it is, with gradients that stay."""
    generator = torch.Generator().manual_seed(0)
    optimizers = []
    for _ in range(TURNS):
        parameters = [
            nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for _ in range(tensors)
        ]
        for parameter in parameters:
            parameter.grad = 1e-3 * torch.randn(shape, generator=generator)
        optimizers.append(make(parameters))
    return lambda turn: optimizers[turn % TURNS].step()
