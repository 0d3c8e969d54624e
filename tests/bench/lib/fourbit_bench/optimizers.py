"""A step of AdamW with 8- and 32-bit state, of adapters in several tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import fourbit
from fourbit_bench.report import BNB, OURS, Row
from fourbit_bench.timing import DEVICE, Call, compare, why
from fourbit_bench.weights import bitsandbytes

# The shape of a LoRA matrix, and how many of them: 16.8 and 100.7 million parameters.
SHAPE = (64, 4096)
TENSORS = (64, 384)
FUSED = "torch fused"
# Parameter read and written and gradient read, float32; then both moments, read and written.
BYTES = {32: 12 + 2 * 2 * 4, 8: 12 + 2 * 2 * (1 + 4 / 256)}
LR = 1e-4


def rows(*, small: bool) -> Iterator[Row]:
    """Each number of tensors with each width of state; steps are timed as they are called."""
    for tensors in TENSORS:
        tensors = tensors // 16 if small else tensors
        count = tensors * SHAPE[0] * SHAPE[1]
        for bits in (8, 32):
            calls: dict[str, Call | str] = {
                OURS: _stepper(tensors, lambda p, bits=bits: _ours(p, bits)),
                BNB: _stepper(tensors, lambda p, bits=bits: _theirs(p, bits)),
                FUSED: _stepper(tensors, lambda p: torch.optim.AdamW(p, lr=LR, fused=True)),
            }
            yield Row(
                f"AdamW {bits}-bit, {count / 1e6:.1f} M parameters in {tensors} tensors",
                compare(calls, 1, eager=set(calls)),
                "copy",
                BYTES[bits] * count,
            )


def _ours(parameters: list[nn.Parameter], bits: int) -> torch.optim.Optimizer:
    return fourbit.PagedAdamW(parameters, lr=LR, state_bits=8 if bits == 8 else 32)


def _theirs(parameters: list[nn.Parameter], bits: int) -> torch.optim.Optimizer:
    library = bitsandbytes()
    if isinstance(library, str):
        raise ImportError(library)
    made = library.optim.AdamW8bit if bits == 8 else library.optim.AdamW32bit
    optimizer: torch.optim.Optimizer = made(parameters, lr=LR)
    return optimizer


def _stepper(
    tensors: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Call | str:
    """A step with gradients that stay; or why there is none."""
    try:
        parameters = [nn.Parameter(torch.randn(SHAPE, device=DEVICE)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = 1e-3 * torch.randn(SHAPE, device=DEVICE)
        optimizer = make(parameters)
    except Exception as error:
        return why(error)
    return lambda _: optimizer.step()
