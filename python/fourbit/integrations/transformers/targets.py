"""Which weights of a model are quantized while they are read."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from fourbit.experts import ExpertsLayout
from fourbit.integrations.transformers.config import NF4Config
from fourbit.integrations.transformers.rooms import ExpertsRoom, LinearRoom, Room
from fourbit.model import warn_of_kept_experts
from fourbit.targets import weights_to_quantize


def new_rooms(model: Any, config: NF4Config) -> list[tuple[Room, torch.dtype]]:
    """The weights of a model that a config wants quantized, and the dtypes they are read in.

    Raises:
        ValueError: for a pattern that matches nothing, or a model with nothing to quantize.

    Warns:
        UserWarning: naming experts that stay in 16 bits since they cannot be quantized.
    """
    targets = weights_to_quantize(
        model,
        block_size=config.block_size,
        only=config.only,
        skip=config.skip,
        keep=lambda name: _is_kept(model, config, name),
    )
    warn_of_kept_experts(targets)
    layout: dict[str, Any] = {
        "codebook": config.book,
        "block_size": config.block_size,
        "double_quant": config.double_quant,
    }
    rooms: list[tuple[Room, torch.dtype]] = []
    for path, layer in targets.layers.items():
        dtype = layer.weight.dtype
        rooms.append((LinearRoom(path, layer, dtype=dtype, **layout), dtype))
    for name, sources in targets.experts.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        weight = module.get_parameter(leaf)
        experts = ExpertsLayout(weight.shape, weight.dtype, groups=len(sources), **layout)
        rooms.append((ExpertsRoom(name, module, experts, sources=sources), weight.dtype))
    return rooms


def _is_kept(model: Any, config: NF4Config, name: str) -> bool:
    tied = getattr(model, "all_tied_weights_keys", {})
    if f"{name}.weight" in {*tied.keys(), *tied.values()}:
        return True
    if kept_in_float32(model, name, torch.float16):
        return True
    return not should_convert_module(name, config.skip_modules)


def kept_in_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether a model's class keeps a weight in float32 where the model is in `dtype`."""
    patterns: set[str] = set()
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
