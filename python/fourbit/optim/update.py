"""One step of a list of tensors: from tensors to the core and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fourbit import _core
from fourbit.distributed import is_distributed, local
from fourbit.layout import block_count
from fourbit.optim.options import options_of
from fourbit.optim.sharded import local_scales
from fourbit.optim.state import BLOCK_SIZE, SCALES, State, bits_of, local_moments, moment_dtype


class Update(NamedTuple):
    """One tensor's part in a step.

    Attributes:
        param: the parameter.
        values: its own memory, or the process's shard of it; a copy if that is not contiguous.
        grad: contiguous, of the same shape.
        state: its state.
        bits: the width of the state.
        moments: both, as far as this process has them.
    """

    param: Tensor
    values: Tensor
    grad: Tensor
    state: State
    bits: int
    moments: tuple[Tensor, Tensor]


def update_of(param: Tensor, state: State) -> Update:
    """What stepping a parameter that has a gradient and state takes; autograd is off."""
    grad = param.grad
    assert grad is not None
    # Autograd may hand out gradients as negative views, whose memory holds the other sign.
    local_grad = local(grad).resolve_neg().contiguous()
    values = local(param).contiguous()
    return Update(param, values, local_grad, state, bits_of(state), local_moments(state))


def is_whole(update: Update) -> bool:
    """Whether the tensors of its state are as `state.new_state` makes them.

    People may replace them, and a kernel on a card knows nothing of a tensor but its address.
    """
    values = update.values
    shape, dtype = values.shape, moment_dtype(update.bits)
    for moment in update.moments:
        if moment.dtype != dtype or moment.shape != shape or not moment.is_contiguous():
            return False
    step = update.state["step"]
    if step.dtype != torch.float32 or not step.is_cpu or step.numel() != 1:
        return False
    if update.bits == 32:
        return True
    device, blocks = values.device, block_count(values.numel(), BLOCK_SIZE)
    for field in SCALES:
        scales = local(update.state[field])
        if scales.dtype != torch.float32 or scales.device != device or scales.numel() < blocks:
            return False
        if not scales.is_contiguous():
            return False
    return True


class Seen(NamedTuple):
    """What a plain parameter on the CPU and its state were when all of it was looked at.

    People may replace tensors between two steps, but hardly ever do. To look whether they are the
    same takes a third of the time of looking at all of them again; the core looks at what it is
    given in any case, before it writes.

    Attributes:
        param: what can change of it, with the `state_bits` of its group.
        tensors: which ones its state is made of.
        addresses: their memory, which changes under a tensor when its ``data`` is replaced.
        bits: the width of the state.
    """

    param: tuple[object, ...]
    tensors: list[int]
    addresses: list[int]
    bits: int

    @classmethod
    def of(cls, update: Update, state_bits: int) -> Seen | None:
        """None for a parameter that is distributed, on a card, or not contiguous."""
        param, state = update.param, update.state
        plain = not is_distributed(param) and param.is_cpu and update.values is param
        if not plain or any(is_distributed(tensor) for tensor in state.values()):
            return None
        tensors, addresses = _identities(state)
        return cls(_kind(param, state_bits), tensors, addresses, update.bits)

    def again(self, param: Tensor, state: State, state_bits: int) -> Update | None:
        """As `update_of`; None if anything is not what it was, or the gradient is unusual."""
        grad = param.grad
        if type(grad) is not Tensor or grad.layout is not torch.strided or grad.is_neg():
            return None
        if self.tensors != list(map(id, state.values())) or not param.is_contiguous():
            return None
        if self.param != _kind(param, state_bits):
            return None
        if self.addresses != [tensor.data_ptr() for tensor in state.values()]:
            return None
        moments = (state["exp_avg"], state["exp_avg_sq"])
        return Update(param, param, grad.contiguous(), state, self.bits, moments)


def _kind(param: Tensor, state_bits: int) -> tuple[object, ...]:
    return state_bits, param.dtype, param.shape, param.is_cpu


def _identities(state: State) -> tuple[list[int], list[int]]:
    tensors = state.values()
    return list(map(id, tensors)), [tensor.data_ptr() for tensor in tensors]


def next_steps(updates: Sequence[Update]) -> list[int]:
    """Which step of each parameter this is, counted from 1."""
    # One reading of all of them takes a tenth of the time of one each.
    counts = (
        torch.stack([update.state["step"] for update in updates]) if updates else torch.empty(0)
    )
    return [int(count) + 1 for count in counts.tolist()]


def shares_memory(updates: Sequence[Update]) -> Tensor | None:
    """A parameter whose memory another parameter or a gradient has too; None if there is none.

    The core steps tensors in parallel and must own what it writes.
    """
    ranges = []
    for index, update in enumerate(updates):
        values, grad = update.values, update.grad
        start = values.data_ptr()
        ranges.append((start, start + values.nbytes, True, index))
        start = grad.data_ptr()
        ranges.append((start, start + grad.nbytes, False, index))
    ranges = [one for one in ranges if one[0] < one[1]]
    ranges.sort()
    end, end_written = 0, 0
    for start, stop, written, index in ranges:
        if start < (end if written else end_written):
            return updates[index].param
        end = max(end, stop)
        end_written = max(end_written, stop if written else 0)
    return None


def run(updates: list[Update], group: Mapping[str, Any], bits: int) -> list[Tensor]:
    """Step tensors of one group and state width; returns the parameters that were skipped."""
    params, grads = [u.values for u in updates], [u.grad for u in updates]
    first, second = [u.moments[0] for u in updates], [u.moments[1] for u in updates]
    options: dict[str, Any] = {
        **options_of(group),
        "steps": [u.state["step"] for u in updates],
        "threads": torch.get_num_threads(),
    }
    if bits == 32:
        skipped = _core.adamw32_step(params, grads, first, second, **options)
    else:
        absmax, absmax_sq = (
            [local_scales(u.state[field], u.param, BLOCK_SIZE) for u in updates] for field in SCALES
        )
        skipped = _core.adamw8_step(params, grads, first, absmax, second, absmax_sq, **options)
    _finish(_without(updates, skipped))
    return [updates[index].param for index in skipped]


def finish(updates: Sequence[Update], skipped: Sequence[int]) -> None:
    """Count the steps of all but the skipped, and put back what was stepped as a copy."""
    stepped = _without(updates, skipped)
    if stepped:
        torch._foreach_add_([update.state["step"] for update in stepped], 1)
        _finish(stepped)


def _without(updates: Sequence[Update], skipped: Sequence[int]) -> Sequence[Update]:
    if not skipped:
        return updates
    left_out = set(skipped)
    return [update for index, update in enumerate(updates) if index not in left_out]


def _finish(stepped: Sequence[Update]) -> None:
    for update in stepped:
        if update.values is update.param:
            continue
        memory = local(update.param)
        if update.values.data_ptr() != memory.data_ptr():
            memory.copy_(update.values)
    # The core writes behind autograd's back; graphs that saved the old values must notice.
    increment_version([update.param for update in stepped])
