"""Where the 3-D weights of experts lie in checkpoints.

transformers computes with one 3-D parameter for all experts of a layer. Checkpoints hold it

- in matrices, two for each expert where gate and up are one parameter (Mixtral, Qwen2-MoE,
  Qwen3-MoE, Qwen3-Next, Qwen3.5-MoE, OLMoE, DeepSeek-V2 and V3, GLM-4-MoE, Phi-MoE, Jamba,
  Nemotron-H and most others);
- as it is (gpt-oss, Gemma 4, Qwen3-VL-MoE as transformers 5 writes it), perhaps under another
  name (Granite-MoE, Aria);
- with its elements in another order (Inkling, which interleaves gate and up).

Packed codes cannot be put in another order, so that experts of the last kind stay in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fourbit._core import CheckpointError
from fourbit.experts import experts_layouts
from fourbit.integrations.conversions import Conversions, Naming

ExpertSources: TypeAlias = "dict[str, tuple[str, ...] | None]"
"""For the name of each 3-D weight of experts, the names of the tensors that checkpoints hold it as,
in the order of its elements; None where they hold them in another order."""

PROBE_COLUMNS = 2
"""Columns of what stands for a weight while its rows are followed. Two tell a cut between columns,
or a transposition, from one between rows."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows the experts interface of transformers.

    Its forward is then exchanged by name, ``config._experts_implementation``, and can be ours.
    """
    return hasattr(getattr(module, "config", None), "_experts_implementation") and all(
        hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias")
    )


def expert_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the 3-D weights of a model's experts, quantized or not, by name."""
    shapes: dict[str, torch.Size] = {}
    for path, module in model.named_modules():
        if not is_experts(module):
            continue
        layouts = experts_layouts(module)
        for name, parameter in module.named_parameters(recurse=False):
            shape = layouts[name].shape if name in layouts else parameter.shape
            if len(shape) == 3:
                shapes[f"{path}.{name}" if path else name] = shape
    return shapes


def expert_sources(model: Any) -> ExpertSources:
    """Where checkpoints hold the 3-D weights of a model's experts, quantized or not.

    Found by sending row numbers through the conversions by which transformers saves the model.

    Args:
        model: of transformers; it may be on the meta device.

    Returns:
        For each weight the names of its tensors. As many as there are names are the groups of
        `fourbit.experts.ExpertsLayout`: each tensor is quantized on its own.
    """
    shapes = expert_shapes(model)
    sources: ExpertSources = dict.fromkeys(shapes)
    if not shapes:
        return sources
    conversions = Conversions(model)
    for names in conversions.together(model.state_dict()):
        if any(name in shapes for name in names) and all(name in shapes for name in names):
            sources |= _sources_together(conversions, {name: shapes[name] for name in names})
    return sources


def sources_of(
    naming: Naming,
    target: str,
    stored: Mapping[str, Sequence[int]],
    experts: Mapping[str, torch.Size],
) -> dict[str, tuple[str, ...]] | None:
    """Which of a checkpoint's tensors make up weights of experts, in the order of their elements.

    Args:
        naming: of the model.
        target: the name that it gives for all of the tensors.
        stored: the shapes of the tensors, by name, sorted.
        experts: the shapes of the model's weights of experts.

    Returns:
        For each weight the names of its tensors; None where they are put together otherwise than
        one after the other, or make something else.
    """
    probes = _probes(stored)
    narrow = {name: torch.Size((*shape[:-1], PROBE_COLUMNS)) for name, shape in experts.items()}
    try:
        made = naming.make(target, list(probes), list(probes.values()), narrow)
    except CheckpointError:
        return None
    found: dict[str, tuple[str, ...]] = {}
    for name, whole in made.items():
        if whole.shape != narrow.get(name):
            return None
        # Where each number has come to be.
        places = torch.full((sum(probe.numel() for probe in probes.values()),), -1)
        places[whole.flatten().long()] = torch.arange(whole.numel())
        pieces = {source: places[probe.long()] for source, probe in probes.items()}
        there = {source: piece for source, piece in pieces.items() if int(piece.max()) >= 0}
        names = _in_order(there, 0, whole.numel())
        if names is None:
            return None
        found[name] = names
    return found


def _sources_together(conversions: Conversions, shapes: Mapping[str, torch.Size]) -> ExpertSources:
    """The sources of weights that one conversion takes apart together."""
    probes = _probes(shapes)
    try:
        pieces = conversions.to_files(probes, {name: probe.shape for name, probe in probes.items()})
    except Exception:
        # Whatever transformers raises: it cannot take these weights apart by their rows alone.
        return dict.fromkeys(shapes)
    return {
        name: _in_order(pieces, int(probe.flatten()[0]), probe.numel())
        for name, probe in probes.items()
    }


def _probes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Stand-ins for tensors, with a few of their columns and every element another number."""
    probes: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        narrow = (*shape[:-1], PROBE_COLUMNS)
        end = start + math.prod(narrow)
        probes[name] = torch.arange(start, end, dtype=torch.int32).view(narrow)
        start = end
    return probes


def _in_order(pieces: Mapping[str, Tensor], start: int, count: int) -> tuple[str, ...] | None:
    """The pieces that make up a run of numbers, in its order, if each is a run of its own."""
    found: dict[int, tuple[str, int]] = {}
    for name, piece in pieces.items():
        numbers = piece.flatten()
        first, size = int(numbers[0]), numbers.numel()
        if start <= first < start + count:
            whole = torch.arange(first, first + size, dtype=numbers.dtype)
            if piece.shape[-1] != PROBE_COLUMNS or not torch.equal(numbers, whole):
                return None
            found[first] = (name, size)
    at, names = start, []
    while at in found:
        name, size = found[at]
        names.append(name)
        at += size
    alike = len({size for _, size in found.values()}) == 1
    return tuple(names) if at == start + count and alike else None
