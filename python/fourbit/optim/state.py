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

from fourbit.optim.sharded import is_distributed, local, placements, shard_of, zero_scales

BLOCK_SIZE = 256
"""Elements of a moment that share a scale."""

MIN_8BIT_ELEMENTS = 4096
"""Smaller parameters keep 32-bit state: it costs little, and they are often the sensitive ones."""

MOMENTS = ("exp_avg", "exp_avg_sq")

State = dict[str, Tensor]


def bits_for(param: Tensor, state_bits: int) -> int:
    """The width of the parameter's state: `state_bits`, or 32 if it is small."""
    return 32 if param.numel() < MIN_8BIT_ELEMENTS else state_bits


def bits_of(state: State) -> int:
    """The width of some state."""
    return 8 if "exp_avg_absmax" in state else 32


def moment_dtype(bits: int) -> torch.dtype:
    """The dtype of moments in state of that width."""
    return torch.float32 if bits == 32 else torch.uint8


def new_state(param: Tensor, bits: int, moments: tuple[Tensor, Tensor]) -> State:
    """The state before the first step. Codes with a scale of 0 are zeros, whatever they are.

    Args:
        param: whose state it is.
        bits: 8 or 32.
        moments: this process's part of both: zeros.
    """
    state = {"step": torch.tensor(0.0, dtype=torch.float32)}
    for moment, values in zip(MOMENTS, moments, strict=True):
        state[moment] = shard_of(param, values)
        if bits == 8:
            state[f"{moment}_absmax"] = zero_scales(param, BLOCK_SIZE)
    return state


def local_moments(state: State) -> tuple[Tensor, Tensor]:
    """This process's part of both moments."""
    first, second = (local(state[moment]) for moment in MOMENTS)
    return first, second


def check_state(param: Tensor, saved: object, bits: int, name: str) -> None:
    """Check a parameter's saved state, so that `copy_state` may take it.

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
    is_8bit = "exp_avg_absmax" in saved or "exp_avg_sq_absmax" in saved
    if is_8bit != (bits == 8):
        raise ValueError(
            f"the optimizer state of {name} is {8 if is_8bit else 32}-bit where "
            f"{bits}-bit state is needed; use the state_bits it was saved with"
        )
    needed = {"step": torch.empty((), dtype=torch.float32)}
    for moment in MOMENTS:
        # Of a parameter, what counts is its shape and how it is distributed.
        needed[moment] = param.detach()
        if bits == 8:
            needed[f"{moment}_absmax"] = zero_scales(param, BLOCK_SIZE)
    for field in sorted(needed.keys() - saved.keys()):
        raise ValueError(f"the optimizer state of {name} lacks {field}; the state is damaged")
    for field in sorted(saved.keys() - needed.keys(), key=str):
        raise ValueError(f"the optimizer state of {name} has an unknown field {field!r}")
    for field, like in needed.items():
        dtype = moment_dtype(bits) if field in MOMENTS else torch.float32
        _check_field(like, dtype, saved[field], field, f"{field} of {name}")


def copy_state(saved: Mapping[str, Any], state: State) -> None:
    """Fill a new state with a checked one; moments are widened."""
    for field, target in state.items():
        value = saved[field]
        plain = local(value.detach()) if isinstance(value, Tensor) else torch.tensor(value)
        local(target).copy_(plain)


def _check_field(like: Tensor, dtype: torch.dtype, value: Any, field: str, where: str) -> None:
    if field == "step" and isinstance(value, int | float):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor):
        raise ValueError(f"optimizer state {where} is a {type(value).__name__}, not a tensor")
    if value.shape != like.shape:
        raise ValueError(
            f"optimizer state {where} has shape {list(value.shape)} where "
            f"{list(like.shape)} is needed"
        )
    if is_distributed(value) != is_distributed(like) or placements(value) != placements(like):
        raise ValueError(f"optimizer state {where} is not sharded as the parameter is")
    narrow = field in MOMENTS and dtype == torch.float32
    allowed = {dtype, *((torch.float16, torch.bfloat16) if narrow else ())}
    if value.dtype not in allowed and field != "step":
        raise ValueError(
            f"optimizer state {where} is {value.dtype} where {dtype} is needed; "
            "the state is damaged or was cast"
        )
    _check_numbers(local(value.detach()), field, where)


def _check_numbers(values: Tensor, field: str, where: str) -> None:
    if values.dtype == torch.uint8:
        return
    if not bool(values.isfinite().all()):
        raise ValueError(f"optimizer state {where} holds NaN or infinity; the state is damaged")
    if field != "exp_avg" and bool((values < 0).any()):
        raise ValueError(f"optimizer state {where} is negative; the state is damaged")
    if field == "step" and values.item() != int(values.item()):
        raise ValueError(f"optimizer state {where} is {values.item()}, not a count")
