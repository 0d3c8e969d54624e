"""One step of the parameters on a card: all in one launch, after one that looks at gradients."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fourbit import _core, cuda_ops
from fourbit.optim.sharded import local, local_scales
from fourbit.optim.state import BLOCK_SIZE, MOMENTS
from fourbit.optim.update import Update, finish, options_of


class DamagedStateError(ValueError):
    """8-bit state whose scales are not finite; nothing was stepped.

    Attributes:
        param: whose state it is.
        field: the scales.
    """

    def __init__(self, param: Tensor, field: str) -> None:
        super().__init__(f"{field} holds NaN or infinity; the state is damaged")
        self.param = param
        self.field = field


def run_on_card(
    plan: Sequence[tuple[Mapping[str, Any], list[Update]]], device: torch.device
) -> list[Tensor]:
    """Step the parameters of all groups that are on one card.

    Args:
        plan: groups and what of them is to be stepped, all on `device`.
        device: the card.

    Returns:
        The parameters that were skipped, because their gradient is not finite or too large.

    Raises:
        DamagedStateError: for 8-bit state whose scales are not finite; nothing was stepped.
    """
    updates = [update for _, chosen in plan for update in chosen]
    # The kernel takes no empty tensors; there is nothing in them to be skipped for.
    filled = [index for index, update in enumerate(updates) if update.values.numel()]
    flags: list[int] = []
    if filled:
        flags = _launch(plan, len(filled), device)
        if flags.pop():
            raise _damage(updates)
    skipped = [index for index, flag in zip(filled, flags, strict=True) if flag]
    finish(updates, set(skipped))
    return [updates[index].param for index in skipped]


def _launch(
    plan: Sequence[tuple[Mapping[str, Any], list[Update]]], count: int, device: torch.device
) -> list[int]:
    """Launch the step; a flag for each parameter that is not empty, and one for damaged state."""
    segments, tiles = bytearray(), 0
    numbers = itertools.count()
    for group, updates in plan:
        parameters = [
            _segment(update, next(numbers)) for update in updates if update.values.numel()
        ]
        written, tiles = _core.adamw_segments(parameters, first_tile=tiles, **options_of(group))
        segments += written
    table = torch.frombuffer(segments, dtype=torch.uint8)
    if device.type == "cuda":
        # From other memory the copy would wait for the card.
        table = table.pin_memory().to(device, non_blocking=True)
    flags = torch.zeros(count + 1, dtype=torch.int32, device=device)
    program = cuda_ops.general_program("adamw", device)
    stream = cuda_ops.stream_of(device)
    damaged = flags[count:]
    arguments = (table.data_ptr(), count, 0, tiles, flags.data_ptr(), damaged.data_ptr())
    program.launch("fourbit_adamw_check", stream, arguments)
    program.launch("fourbit_adamw", stream, arguments)
    # The one moment of a step at which the processor waits for the card.
    return flags.tolist()


def _segment(update: Update, number: int) -> tuple[list[int], int, list[str], int, int, int]:
    moments = [local(update.state[moment]).data_ptr() for moment in MOMENTS]
    scales = [0, 0]
    if update.bits == 8:
        scales = [
            local_scales(update.state[f"{moment}_absmax"], update.param, BLOCK_SIZE).data_ptr()
            for moment in MOMENTS
        ]
    return (
        [update.values.data_ptr(), update.grad.data_ptr(), *moments, *scales],
        update.values.numel(),
        [str(tensor.dtype).removeprefix("torch.") for tensor in (update.values, update.grad)],
        update.bits,
        int(update.state["step"]) + 1,
        number,
    )


def _damage(updates: list[Update]) -> DamagedStateError:
    for update in updates:
        for field in (f"{moment}_absmax" for moment in MOMENTS):
            scales = update.state.get(field)
            if scales is not None and not bool(local(scales).isfinite().all()):
                return DamagedStateError(update.param, field)
    raise AssertionError("the kernel found damage that is not there")
