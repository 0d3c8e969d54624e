"""One step of a list of tensors: from tensors to the core and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fourbit import _core
from fourbit.optim.options import options_of
from fourbit.optim.sharded import local, local_scales
from fourbit.optim.state import BLOCK_SIZE, State, bits_of


class Update(NamedTuple):
    """One tensor's part in a step.

    Attributes:
        param: the parameter.
        values: its own memory, or the process's shard of it; a copy if that is not contiguous.
        grad: contiguous, of the same shape.
        state: its state.
    """

    param: Tensor
    values: Tensor
    grad: Tensor
    state: State

    @property
    def bits(self) -> int:
        """The width of the state."""
        return bits_of(self.state)


def shares_memory(updates: list[Update]) -> Tensor | None:
    """A parameter whose memory another parameter or a gradient has too; None if there is none.

    The core steps tensors in parallel and must own what it writes.
    """
    ranges = []
    for update in updates:
        for tensor, written in ((update.values, True), (update.grad, False)):
            if tensor.numel():
                start = tensor.data_ptr()
                ranges.append((start, start + tensor.nbytes, written, update.param))
    end, end_written = 0, 0
    for start, stop, written, param in sorted(ranges, key=lambda item: item[:3]):
        if start < (end if written else end_written):
            return param
        end = max(end, stop)
        end_written = max(end_written, stop if written else 0)
    return None


def run(updates: list[Update], group: Mapping[str, Any], bits: int) -> list[Tensor]:
    """Step tensors of one group and state width; returns the parameters that were skipped."""

    def column(field: str) -> list[Tensor]:
        return [local(update.state[field]) for update in updates]

    def scales(field: str) -> list[Tensor]:
        return [local_scales(update.state[field], update.param, BLOCK_SIZE) for update in updates]

    params, grads = [u.values for u in updates], [u.grad for u in updates]
    moments = [column("exp_avg"), column("exp_avg_sq")]
    options: dict[str, Any] = {
        **options_of(group),
        "steps": [int(update.state["step"]) + 1 for update in updates],
        "threads": torch.get_num_threads(),
    }
    if bits == 32:
        skipped = _core.adamw32_step(params, grads, *moments, **options)
    else:
        codes, codes_sq = moments
        absmax, absmax_sq = scales("exp_avg_absmax"), scales("exp_avg_sq_absmax")
        skipped = _core.adamw8_step(params, grads, codes, absmax, codes_sq, absmax_sq, **options)
    finish(updates, set(skipped))
    return [updates[index].param for index in skipped]


def finish(updates: list[Update], skipped: set[int]) -> None:
    """Count the steps of all but the skipped, and put back what was stepped as a copy."""
    stepped = [update for index, update in enumerate(updates) if index not in skipped]
    if stepped:
        torch._foreach_add_([update.state["step"] for update in stepped], 1)
    for update in stepped:
        memory = local(update.param)
        if update.values.data_ptr() != memory.data_ptr():
            memory.copy_(update.values)
        # The core writes behind autograd's back; graphs that saved the old values must notice.
        increment_version(update.param)
