"""What a checkpoint of a model calls its tensors, and holds of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fourbit.experts import ExpertsLayout
from fourbit.integrations import is_of_transformers

if TYPE_CHECKING:
    from fourbit.integrations.conversions import Conversions


class NamesInFiles:
    """The names of a model's tensors in files: its own, or those that transformers has for it.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        """Read the table of transformers, where the model is one of its."""
        self._table: Conversions | None = None
        self._experts: Mapping[str, tuple[str, ...] | None] = {}
        self._groups: dict[str, list[str]] = {}
        if is_of_transformers(model):
            from fourbit.integrations.conversions import Conversions
            from fourbit.integrations.transformers.expert_names import expert_sources

            self._table = Conversions(model)
            self._experts = expert_sources(model)
            together = self._table.together(model.state_dict())
            self._groups = {name: group for group in together for name in group}

    def of(self, name: str) -> str:
        """The name of a quantized weight, which a file holds as it is."""
        if self._table is None or not self._table.only_renames(name):
            return name
        (found,) = self._table.to_files({name: torch.empty(0)})
        return found

    def of_experts(self, name: str, layout: ExpertsLayout) -> tuple[str, ...]:
        """The names of the groups of a 3-D weight: numbered ones if it is none of transformers'.

        Raises:
            ValueError: for other groups than a checkpoint of transformers has.
        """
        sources = self._experts.get(name)
        if sources is not None and len(sources) == layout.groups:
            return sources
        if layout.groups == 1:
            return (name,)
        if self._table is None:
            return tuple(f"{name}.{index}" for index in range(layout.groups))
        raise ValueError(
            f"{name} is quantized in {layout.groups} groups, and a checkpoint of the model holds "
            f"{'no tensors' if sources is None else len(sources)} for it; quantize it in one group"
        )

    def together(self, names: Iterable[str]) -> list[list[str]]:
        """Names of tensors that are not quantized, each with those that it is written with."""
        if self._table is None:
            return [[name] for name in names]
        wanted = list(names)
        wanted_set = set(wanted)
        groups = {min(group): group for group in map(self._group, wanted)}
        whole = [group for group in groups.values() if wanted_set.issuperset(group)]
        done = {name for group in whole for name in group}
        # What is made of several, some of which are quantized, stays as it is.
        return [*whole, *([name] for name in wanted if name not in done)]

    def in_files(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a file holds of one of the groups of `together`."""
        if self._table is None or set(tensors) != set(self._group(next(iter(tensors)))):
            return tensors
        return self._table.to_files(tensors)

    def _group(self, name: str) -> list[str]:
        return self._groups.get(name, [name])
