"""Which weights of a model are quantized while they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from fourbit.experts import ExpertsLayout
from fourbit.integrations.transformers.config import NF4Config
from fourbit.integrations.transformers.expert_names import expert_sources
from fourbit.integrations.transformers.rooms import ExpertsRoom, LinearRoom, Room
from fourbit.model import weights_to_quantize


def new_rooms(model: Any, config: NF4Config) -> list[tuple[Room, torch.dtype]]:
    """The weights of a model that a config wants quantized, and the dtypes they are read in.

    Raises:
        ValueError: for a pattern that matches nothing, or a model with nothing to quantize.
    """
    experts = _experts(model, config)
    layers, chosen = weights_to_quantize(
        model,
        block_size=config.block_size,
        only=config.only,
        skip=config.skip,
        keep=lambda name: _is_kept(model, config, name),
        experts={name: found.names for name, found in experts.items()},
    )
    rooms: list[tuple[Room, torch.dtype]] = []
    room: Room
    for path, layer in layers.items():
        dtype = layer.weight.dtype
        room = LinearRoom(
            path,
            layer,
            codebook=config.book,
            block_size=config.block_size,
            double_quant=config.double_quant,
            dtype=dtype,
        )
        rooms.append((room, dtype))
    for name in chosen:
        found = experts[name]
        room = ExpertsRoom(name, found.module, found.layout, sources=found.sources)
        rooms.append((room, found.layout.dtype))
    return rooms


@dataclass(frozen=True)
class _Experts:
    """A 3-D weight that can be quantized, and the tensors of checkpoints that make it up."""

    name: str
    module: nn.Module
    layout: ExpertsLayout
    sources: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All names that patterns may have for it."""
        return [self.name, *(source.removesuffix(".weight") for source in self.sources)]


def _experts(model: Any, config: NF4Config) -> dict[str, _Experts]:
    found: dict[str, _Experts] = {}
    for name, sources in expert_sources(model).items():
        if sources is None:
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, leaf)
        try:
            layout = ExpertsLayout(
                weight.shape,
                weight.dtype,
                config.book,
                config.block_size,
                config.double_quant,
                len(sources),
            )
        except ValueError:
            # Matrices that are no whole blocks stay, as in ``fourbit.convert``.
            continue
        found[name] = _Experts(name, module, layout, sources)
    return found


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
