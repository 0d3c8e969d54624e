"""Quantized experts in folders: which tensors of a file make up a weight, and how it is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourbit.codebook import Codebook
from fourbit.experts import (
    PARTS,
    ExpertsLayout,
    experts_layouts,
    set_empty_experts,
    set_group,
)
from fourbit.quantized import QuantizedTensor


@dataclass(frozen=True)
class StoredExperts:
    """A 3-D weight of a model's experts, and what a folder holds of it.

    Attributes:
        module: that has the weight.
        path: of the module.
        name: of the parameter in it.
        layout: of the weight when it is filled.
        entries: what the folder's reader says of each of its quantized weights, in order.
    """

    module: nn.Module
    path: str
    name: str
    layout: ExpertsLayout
    entries: Sequence[Any]

    @classmethod
    def of(cls, model: nn.Module, name: str, entries: Sequence[Any]) -> StoredExperts:
        """What is stored of the weight `name`, or why it cannot be.

        Raises:
            ValueError: for matrices that are quantized in several ways, are not whole blocks, or do
                not add up to the weight.
        """
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        first = entries[0]
        shape = _shape(module, leaf)
        for other in entries:
            for what in ("block_size", "double_quant", "dtype", "shape"):
                if other[what] != first[what]:
                    raise ValueError(
                        f"{first['name']} and {other['name']} go into one weight and differ in "
                        f"{what} ({first[what]}, {other[what]}); convert the model again"
                    )
            if Codebook.from_core(other["codebook"]) != Codebook.from_core(first["codebook"]):
                raise ValueError(
                    f"{first['name']} and {other['name']} go into one weight and have different "
                    "codebooks; convert the model again"
                )
        stored = sum(torch.Size(entry["shape"]).numel() for entry in entries)
        if stored != shape.numel():
            raise ValueError(
                f"{name} is {list(shape)}, and the folder holds {len(entries)} times "
                f"{first['shape']} for it"
            )
        layout = ExpertsLayout(
            shape,
            getattr(torch, first["dtype"]),
            Codebook.from_core(first["codebook"]),
            first["block_size"],
            first["double_quant"],
            len(entries),
        )
        return cls(module, path, leaf, layout, entries)

    def part_names(self) -> Iterator[str]:
        """The names that the parameters of the weight have in the model."""
        for ending in PARTS:
            yield f"{self.path}.{self.name}{ending}" if self.path else self.name + ending

    def fill(
        self, read: Callable[[Mapping[str, Any]], QuantizedTensor], device: torch.device | str
    ) -> None:
        """Read the weight into the module, one stored tensor after the other.

        Args:
            read: gives a quantized weight of the folder.
            device: where it goes if the module is on the meta device.
        """
        weight = getattr(self.module, self.name)
        place = torch.device(device) if weight.is_meta else weight.device
        set_empty_experts(self.module, self.name, self.layout, place)
        for index, entry in enumerate(self.entries):
            set_group(self.module, self.name, index, read(entry))


def numbered_groups(model: nn.Module, quantized: Iterable[str]) -> dict[str, list[str]]:
    """The quantized weights of a folder that make up 3-D weights of a model, in order.

    They have the name of the parameter, with the number of the group if there are several.
    """
    found: dict[str, dict[int, str]] = {}
    for name in quantized:
        stem, _, number = name.rpartition(".")
        if _is_expert_weight(model, name):
            found[name] = {0: name}
        elif number.isdecimal() and _is_expert_weight(model, stem):
            found.setdefault(stem, {})[int(number)] = name
    return {stem: [names[index] for index in sorted(names)] for stem, names in found.items()}


def _is_expert_weight(model: nn.Module, name: str) -> bool:
    """Whether a name is that of a 3-D parameter of a model, quantized or not."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return leaf in module._parameters and len(_shape(module, leaf)) == 3


def _shape(module: nn.Module, leaf: str) -> torch.Size:
    layout = experts_layouts(module).get(leaf)
    shape: torch.Size = getattr(module, leaf).shape
    return shape if layout is None else layout.shape
