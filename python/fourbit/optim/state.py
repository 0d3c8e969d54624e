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

from fourbit.distributed import is_distributed, local
from fourbit.optim.sharded import placements, shard_of, zero_scales

BLOCK_SIZE = 256
"""Elements of a moment that share a scale."""

MIN_8BIT_ELEMENTS = 4096
"""Smaller parameters keep 32-bit state: it costs little, and they are often the sensitive ones."""

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_absmax", "exp_avg_sq_absmax")
"""Of 8-bit state, in the order of the moments."""

MOST_STEPS = 2.0**63
"""The core counts steps in 64 bits."""

State = dict[str, Tensor]


def bits_for(param: Tensor, state_bits: int) -> int:
    """The width of the parameter's state: `state_bits`, or 32 if it is small."""
    return 32 if param.numel() < MIN_8BIT_ELEMENTS else state_bits


def bits_of(state: State) -> int:
    """The width of some state."""
    return 8 if SCALES[0] in state else 32


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
    state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
    for moment, scales, values in zip(MOMENTS, SCALES, moments, strict=True):
        state[moment] = shard_of(param, values)
        if bits == 8:
            state[scales] = zero_scales(param, BLOCK_SIZE)
    return state


def local_moments(state: State) -> tuple[Tensor, Tensor]:
    """This process's part of both moments."""
    first, second = (local(state[moment]) for moment in MOMENTS)
    return first, second


def check_fields(saved: object, bits: int, name: str) -> None:
    """Check which fields a parameter's saved state has; none is read.

    Args:
        saved: what a state dict holds for it.
        bits: 8 or 32.
        name: of the parameter, for errors.

    Raises:
        ValueError: naming the field that is missing or unknown.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"the optimizer state of {name} is a {type(saved).__name__}, not a dict")
    is_8bit = any(field in saved for field in SCALES)
    if is_8bit != (bits == 8):
        raise ValueError(
            f"the optimizer state of {name} is {8 if is_8bit else 32}-bit where "
            f"{bits}-bit state is needed; use the state_bits it was saved with"
        )
    needed = {"step", *MOMENTS, *(SCALES if bits == 8 else ())}
    for field in sorted(needed - saved.keys()):
        raise ValueError(f"the optimizer state of {name} lacks {field}; the state is damaged")
    for field in sorted(saved.keys() - needed, key=str):
        raise ValueError(f"the optimizer state of {name} has an unknown field {field!r}")


def fill_state(state: State, saved: Mapping[str, Any], name: str) -> None:
    """Fill a new state with a saved one, whose fields are checked and read once, one at a time.

    Moments of 32-bit state are taken in float32, float16 and bfloat16, since ``torch.optim.AdamW``
    keeps them in the parameter's dtype. 8-bit state is taken as it is and in no other way.

    Args:
        state: of the same parameter and width, before its first step.
        saved: has passed `check_fields`.
        name: of the parameter, for errors.

    Raises:
        ValueError: naming the field that has another shape or dtype, or holds a number that no
            optimizer writes.
    """
    for field, target in state.items():
        value = _checked(saved[field], target, field, f"{field} of {name}")
        local(target).copy_(local(value.detach()))


def _checked(value: Any, target: Tensor, field: str, where: str) -> Tensor:
    if field == "step" and isinstance(value, int | float):
        value = torch.tensor(float(value), dtype=torch.float32)
    if not isinstance(value, Tensor):
        raise ValueError(f"optimizer state {where} is a {type(value).__name__}, not a tensor")
    if value.shape != target.shape:
        raise ValueError(
            f"optimizer state {where} has shape {list(value.shape)} where "
            f"{list(target.shape)} is needed"
        )
    if is_distributed(value) != is_distributed(target) or placements(value) != placements(target):
        raise ValueError(f"optimizer state {where} is not sharded as the parameter is")
    narrow = field in MOMENTS and target.dtype == torch.float32
    allowed = {target.dtype, *((torch.float16, torch.bfloat16) if narrow else ())}
    if value.dtype not in allowed and field != "step":
        raise ValueError(
            f"optimizer state {where} is {value.dtype} where {target.dtype} is needed; "
            "the state is damaged or was cast"
        )
    _check_numbers(local(value.detach()), field, where)
    return value


def _check_numbers(values: Tensor, field: str, where: str) -> None:
    if values.dtype == torch.uint8:
        return
    if not bool(values.isfinite().all()):
        raise ValueError(f"optimizer state {where} holds NaN or infinity; the state is damaged")
    if field != "exp_avg" and bool((values < 0).any()):
        raise ValueError(f"optimizer state {where} is negative; the state is damaged")
    if field == "step" and (values.item() != int(values.item()) or values.item() >= MOST_STEPS):
        raise ValueError(f"optimizer state {where} is {values.item()}, not a count")
