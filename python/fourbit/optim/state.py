"""The state of one parameter: what it is made of, how it starts, and how it is restored.

===================  ==========================  ==================================================
field                32 bits                     8 bits
===================  ==========================  ==================================================
``step``             float32 []                  float32 []
``exp_avg``          float32, parameter's shape  uint8, parameter's shape: codes (signed map)
``exp_avg_sq``       float32, parameter's shape  uint8, parameter's shape: codes (unsigned map)
``exp_avg_absmax``                               float32 [blocks]: scales of the codes
``exp_avg_sq_absmax``                            float32 [blocks]
===================  ==========================  ==================================================

The names and, with 32 bits, the contents are those of ``torch.optim.AdamW``. A block is 256
elements in row-major order (arXiv 2110.02861). All tensors are contiguous and plain, so that they
pass through ``torch.save``, ``torch.load(weights_only=True)`` and safetensors.

State of a distributed parameter is distributed alike; see `sharded` for its scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fourbit.optim.sharded import is_distributed, local, placements, zero_scales

BLOCK_SIZE = 256
"""Elements of a moment that share a scale."""

MIN_8BIT_ELEMENTS = 4096
"""Smaller parameters keep 32-bit state: it costs little, and they are often the sensitive ones."""

MOMENTS = ("exp_avg", "exp_avg_sq")

State = dict[str, Tensor]


def bits_for(param: Tensor, state_bits: int) -> int:
    """The width of the parameter's state: `state_bits`, or 32 if it is small."""
    return 32 if param.numel() < MIN_8BIT_ELEMENTS else state_bits


def new_state(param: Tensor, bits: int) -> State:
    """The state before the first step. Codes with a scale of 0 are zeros, whatever they are."""
    state = {"step": torch.tensor(0.0, dtype=torch.float32)}
    for moment in MOMENTS:
        dtype = torch.float32 if bits == 32 else torch.uint8
        state[moment] = torch.zeros_like(
            param, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False
        )
        if bits == 8:
            state[f"{moment}_absmax"] = zero_scales(param, BLOCK_SIZE)
    return state


def restored_state(param: Tensor, saved: object, bits: int, name: str) -> State:
    """A checked copy of a parameter's saved state.

    Moments of 32-bit state are taken in float32, float16 and bfloat16, since ``torch.optim.AdamW``
    keeps them in the parameter's dtype. 8-bit state is taken as it is and in no other way.

    Args:
        param: whose state it is.
        saved: what a state dict holds for it.
        bits: 8 or 32.
        name: of the parameter, for errors.

    Raises:
        ValueError: naming the field that is missing, unknown, or of another shape or dtype, or
            that holds a number no optimizer writes.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"the optimizer state of {name} is a {type(saved).__name__}, not a dict")
    state = new_state(param, bits)
    is_8bit = "exp_avg_absmax" in saved or "exp_avg_sq_absmax" in saved
    if is_8bit != (bits == 8):
        raise ValueError(
            f"the optimizer state of {name} is {8 if is_8bit else 32}-bit where "
            f"{bits}-bit state is needed; use the state_bits it was saved with"
        )
    for field in sorted(state.keys() - saved.keys()):
        raise ValueError(f"the optimizer state of {name} lacks {field}; the state is damaged")
    for field in sorted(saved.keys() - state.keys(), key=str):
        raise ValueError(f"the optimizer state of {name} has an unknown field {field!r}")
    return {
        field: _restored_field(fresh, saved[field], field, f"{field} of {name}")
        for field, fresh in state.items()
    }


def _restored_field(fresh: Tensor, value: Any, field: str, where: str) -> Tensor:
    if field == "step" and isinstance(value, int | float):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor):
        raise ValueError(f"optimizer state {where} is a {type(value).__name__}, not a tensor")
    if value.shape != fresh.shape:
        raise ValueError(
            f"optimizer state {where} has shape {list(value.shape)} where "
            f"{list(fresh.shape)} is needed"
        )
    if is_distributed(value) != is_distributed(fresh) or placements(value) != placements(fresh):
        raise ValueError(f"optimizer state {where} is not sharded as the parameter is")
    narrow = field in MOMENTS and fresh.dtype == torch.float32
    allowed = {fresh.dtype, *((torch.float16, torch.bfloat16) if narrow else ())}
    if value.dtype not in allowed and field != "step":
        raise ValueError(
            f"optimizer state {where} is {value.dtype} where {fresh.dtype} is needed; "
            "the state is damaged or was cast"
        )
    copy = value.detach().to(device=local(fresh).device, dtype=fresh.dtype, copy=True).contiguous()
    _check_numbers(local(copy), field, where)
    return copy


def _check_numbers(values: Tensor, field: str, where: str) -> None:
    if values.dtype == torch.uint8:
        return
    if not bool(values.isfinite().all()):
        raise ValueError(f"optimizer state {where} holds NaN or infinity; the state is damaged")
    if field != "exp_avg" and bool((values < 0).any()):
        raise ValueError(f"optimizer state {where} is negative; the state is damaged")
    if field == "step" and values.item() != int(values.item()):
        raise ValueError(f"optimizer state {where} is {values.item()}, not a count")
