"""How PEFT lays out the adapters of experts in a file.

PEFT wraps a module of experts once for each of its weights that has an adapter, so that one wrapper
is the base of the next. The first weight in the module's order is the innermost, and of a module at
PATH with n such weights weight i (from 0) has the keys

    PATH + ".base_layer" * (n - 1 - i) + ".lora_A.weight"     [experts * r, in_features]
    PATH + ".base_layer" * (n - 1 - i) + ".lora_B.weight"     [out_features, r * experts]

Rows of A are expert by expert; columns of B are the other way round, all experts' first columns
before all experts' second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fourbit._core import CheckpointError
from fourbit.distributed import whole
from fourbit.lora.config import AdapterConfig
from fourbit.lora.experts import LoraExperts, experts_shape

_A, _B = "lora_A.weight", "lora_B.weight"


def file_a(a: Tensor) -> Tensor:
    """A [experts, r, in_features] as files have it."""
    return a.flatten(0, 1)


def file_b(b: Tensor) -> Tensor:
    """B [experts, out_features, r] as files have it."""
    return b.permute(1, 2, 0).flatten(1)


def memory_a(stored: Tensor, experts: int) -> Tensor:
    """The inverse of `file_a`; a view."""
    return stored.reshape(experts, -1, stored.shape[1])


def memory_b(stored: Tensor, experts: int) -> Tensor:
    """The inverse of `file_b`; a view."""
    return stored.reshape(len(stored), -1, experts).permute(2, 0, 1)


def wrapper_paths(path: str, names: Sequence[str]) -> dict[str, str]:
    """Where the adapter of each weight stands, given the weights in order of use."""
    last = len(names) - 1
    return {name: path + ".base_layer" * (last - i) for i, name in enumerate(names)}


def tensors_of(path: str, layer: LoraExperts) -> dict[str, Tensor]:
    """The tensors of one module's adapters by their keys in a file, less its prefix."""
    tensors: dict[str, Tensor] = {}
    for name, wrapper in wrapper_paths(path, layer.names).items():
        lora = layer.lora(name)
        a, b = (whole(part.detach()) for part in (lora.lora_A, lora.lora_B))
        tensors[f"{wrapper}.{_A}"], tensors[f"{wrapper}.{_B}"] = file_a(a), file_b(b)
    return tensors


def take_experts(
    layers: dict[str, dict[str, Tensor]], path: str, names: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Take the tensors of one module's adapters out of ``{path of a layer: {part: tensor}}``.

    Returns:
        ``{name of the weight: {part: tensor}}``.
    """
    wrappers = wrapper_paths(path, names)
    return {name: layers.pop(wrapper, {}) for name, wrapper in wrappers.items()}


def check_experts(
    base: nn.Module,
    path: str,
    contents: Mapping[str, Mapping[str, Tensor]],
    config: AdapterConfig,
    file: Path,
    *,
    prefix: str,
) -> None:
    """Compare the tensors of one module's adapters with the module.

    Raises:
        CheckpointError: naming the file and the tensor that is missing, too many or of another
            shape.
    """
    for name, wrapper in wrapper_paths(path, tuple(contents)).items():
        experts, inputs, outputs = experts_shape(base, name)
        rank = config.rank(f"{path}.{name}")
        expected = {_A: (experts * rank, inputs), _B: (outputs, rank * experts)}
        parts = contents[name]
        for part in (*expected, *parts):
            key = f"{prefix}{wrapper}.{part}"
            if part not in parts:
                raise CheckpointError(
                    f"{file}: the tensor {key}, the adapter of {path}.{name}, is missing"
                )
            if part not in expected:
                raise CheckpointError(f"{file}: {key} is there, and experts have no DoRA")
            if tuple(parts[part].shape) != expected[part]:
                raise CheckpointError(
                    f"{file}: {key} is {tuple(parts[part].shape)}, not {expected[part]}, which "
                    f"{path}.{name} of {experts} experts has: an adapter for another base, or "
                    "another r"
                )


def fill_experts(layer: LoraExperts, contents: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy an adapter file's tensors into one module's adapters."""
    with torch.no_grad():
        for name, parts in contents.items():
            lora = layer.lora(name)
            lora.lora_A.copy_(memory_a(parts[_A], lora.num_experts))
            lora.lora_B.copy_(memory_b(parts[_B], lora.num_experts))
