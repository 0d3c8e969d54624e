"""The table by which transformers makes a model's tensors of a checkpoint's, and back.

A checkpoint may call tensors by other names than the model does, and hold several for one of the
model's: the experts of a layer are stored one by one and computed with as one. Which does what
stands in transformers, and is asked here, never written down. This is the only place that touches
``conversion_mapping`` and ``core_model_loading``, which are private.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fourbit._core import CheckpointError

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        dot_natural_key,
        rename_source_key,
    )
except ImportError as error:
    import transformers

    raise ImportError(
        f"transformers {transformers.__version__} does not say how checkpoints call tensors "
        f"({error}); install a version that fourbit supports"
    ) from error


class Conversions:
    """What a checkpoint of a model holds for each of its tensors.

    Args:
        model: of transformers; its data is not looked at.
    """

    def __init__(self, model: Any) -> None:
        """Read the table for the model's class."""
        self._model = model
        # Without the prefixes that a file may have and a file that is written need not.
        table = [
            transform
            for transform in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(transform, PrefixChange)
        ]
        reversed_table = [transform.reverse_transform() for transform in table[::-1]]
        self._converters = [t for t in reversed_table if isinstance(t, WeightConverter)]
        self._renamings = [t for t in reversed_table if not isinstance(t, WeightConverter)]

    def together(self, names: Iterable[str]) -> list[list[str]]:
        """Names of the model's tensors, each with those that it goes into files with."""
        groups: dict[tuple[str, int], list[str]] = {}
        for name in sorted(names, key=dot_natural_key):
            converter, key, _ = self._converter(name)
            # A tensor that is only renamed is alone, whatever its new name is.
            groups.setdefault((name, 0) if converter is None else (key, id(converter)), []).append(
                name
            )
        return list(groups.values())

    def only_renames(self, name: str) -> bool:
        """Whether a file holds a tensor of the model as it is."""
        return self._converter(name)[0] is None

    def to_files(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size] | None = None
    ) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds of one of the groups of `together`.

        Args:
            tensors: the model's, by name; of tensors on the meta device, names and shapes come out.
            shapes: that some of the model's parameters are to be taken to have.
        """
        converter, key, _ = self._converter(next(iter(tensors)))
        if converter is None:
            return {self._renamed(name): t for name, t in tensors.items()}
        converter = deepcopy(converter)
        for name, tensor in tensors.items():
            _, _, pattern = self._converter(name)
            converter.add_tensor(key, name, pattern, tensor)
        model = self._model if shapes is None else _Resized(self._model, shapes)
        made = converter.convert(key, model=model, config=self._model.config)
        return {self._renamed(name): _one(t) for name, t in made.items()}

    def _renamed(self, name: str) -> str:
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def _converter(self, name: str) -> tuple[Any, str, str | None]:
        """What takes a tensor apart, what it calls the result, and its pattern that matches."""
        for converter in self._converters:
            key, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return converter, key, pattern
        return None, name, None


class _Resized:
    """A model that says of some parameters that they have other shapes."""

    def __init__(self, model: Any, shapes: Mapping[str, torch.Size]) -> None:
        self._model = model
        self._shapes = shapes

    def get_parameter(self, name: str) -> Any:
        shape = self._shapes.get(name)
        if shape is None:
            return self._model.get_parameter(name)
        return torch.empty(shape, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Naming:
    """The names that a checkpoint's tensors have in a model, and what is made of several of them.

    Args:
        model: of transformers; it may be on the meta device. Its names are those it has now: a
            layer that is quantized later has its weight under the same name.
        stored: the shapes of the checkpoint's tensors, where they may be others than the model's
            under the same name: then the table says how the one is made of the other.
    """

    def __init__(self, model: Any, stored: Mapping[str, Sequence[int]] | None = None) -> None:
        transforms = get_model_conversion_mapping(model)
        self._model = model
        self._state = model.state_dict()
        self._stored = stored or {}
        self._prefix = model.base_model_prefix
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}

    def place(self, name: str) -> tuple[str, str | None]:
        """Where a tensor goes: a name in the model, and what it is made by.

        The latter is None for a tensor that is there as it is, under this name or another; it is a
        pattern of the table for one that goes into a tensor of several.
        """
        # A model that has the name as it is needs no table.
        here = self._state.get(name)
        shape = self._stored.get(name)
        if here is not None and (
            shape is None or here.dtype == torch.uint8 or tuple(here.shape) == tuple(shape)
        ):
            return name, None
        found: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        return found

    def sorted(self, names: Iterable[str]) -> list[str]:
        """Names in the order in which tensors are put together: numbers in them count."""
        return sorted(names, key=dot_natural_key)

    def make(
        self,
        target: str,
        sources: Sequence[str],
        tensors: Sequence[Tensor],
        shapes: Mapping[str, torch.Size] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of the model, by name, that are made of some of a checkpoint.

        Args:
            target: the name that `place` gave for all of them.
            sources: their names in the checkpoint, sorted.
            tensors: they themselves.
            shapes: that some of the model's parameters are to be taken to have.

        Raises:
            CheckpointError: if they are not those that the table expects.
        """
        patterns = [self.place(name)[1] for name in sources]
        if patterns[0] is None:
            return {target: tensors[0]}
        converter = deepcopy(self._by_pattern[patterns[0]])
        for name, pattern, tensor in zip(sources, patterns, tensors, strict=True):
            converter.add_tensor(target, name, pattern, tensor)
        try:
            model = self._model if shapes is None else _Resized(self._model, shapes)
            made = converter.convert(target, model=model, config=self._model.config)
        except Exception as error:
            # Whatever it is, the tensors are not those that the table of transformers expects.
            names = f"{sources[0]} and {len(sources) - 1} more"
            raise CheckpointError(f"{target} cannot be made of {names}: {error}") from error
        return {name: _one(tensor) for name, tensor in made.items()}


def _one(tensor: Any) -> Tensor:
    found: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return found
