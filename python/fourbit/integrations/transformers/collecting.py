"""What collects the tensors of a checkpoint that make up one of the model's.

These take the places of transformers' own converters where weights are, or will be, in few bits,
and leave everything else to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.core_model_loading import WeightConverter

from fourbit.integrations.transformers.operations import ANY_WEIGHT, Cast, Join, QuantizeEach
from fourbit.integrations.transformers.rooms import ExpertsRoom

if TYPE_CHECKING:
    from fourbit.integrations.transformers.quantizer import FourbitQuantizer

# What the names of a quantized weight's other tensors have after its own; nothing else ends so.
_PART = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+)$")


class _Collecting(WeightConverter):  # type: ignore[misc]
    """A converter of ours, perhaps in the place of one of transformers.

    Args:
        quantizer: that loads the model.
        sources: expressions for the names of tensors in a checkpoint.
        targets: what they are in the model.
        operations: for weights that are not quantized.
        original: the converter of transformers whose place this takes.
    """

    def __init__(
        self,
        quantizer: FourbitQuantizer,
        sources: list[str],
        targets: list[str],
        operations: Sequence[Any] = (),
        original: Any = None,
    ) -> None:
        super().__init__(
            source_patterns=sources,
            target_patterns=targets,
            operations=[*operations, Cast(quantizer)],
        )
        self.original = original

    @classmethod
    def instead_of(cls, original: Any, quantizer: FourbitQuantizer) -> _Collecting:
        """One that takes the place of a converter of transformers."""
        # The patterns as they were written: converters process them when they are made.
        sources, targets = (
            list(original._original_source_patterns),
            list(original._original_target_patterns),
        )
        new = cls(quantizer, sources, targets, original.operations, original)
        for name in ("scope_prefix", "base_model_prefix"):
            setattr(new, name, getattr(original, name))
        return new

    @property
    def _quantizer(self) -> FourbitQuantizer:
        quantizer: FourbitQuantizer = self.operations[-1].hf_quantizer
        return quantizer


class Reading(_Collecting):
    """Collects the tensors that a folder holds of a quantized weight."""

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in the model of the weight that a tensor is a part of."""
        found: tuple[str, str | None] = super().rename_source_key(_PART.sub("", source_key))
        return found if found[1] is not None else (source_key, None)

    def add_tensor(self, target_key: str, source_key: str, pattern: str, future: Any) -> None:
        """Collect a tensor: those of a quantized weight each under its own name."""
        if target_key in self._quantizer.unfilled:
            pattern = source_key
        super().add_tensor(target_key, source_key, pattern, future)

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        """What transformers calls when all tensors are collected."""
        if layer_name in self._quantizer.unfilled:
            self.operations = [Join(self._quantizer)]
        return super().convert(layer_name, *args, **kwargs)


class Quantizing(_Collecting):
    """Collects the matrices of experts that are to be quantized, and reads them one by one.

    transformers would make one tensor of them first, and hold all of them meanwhile, twice.
    """

    def add_tensor(self, target_key: str, source_key: str, pattern: str, future: Any) -> None:
        """Collect a matrix, and remember its name."""
        super().add_tensor(target_key, source_key, pattern, future)
        if not hasattr(self, "names"):
            self.names: dict[str, list[str]] = {}
        self.names.setdefault(pattern, []).append(source_key)

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        """What transformers calls when all matrices are collected."""
        room = self._quantizer.unfilled.get(layer_name)
        names = {name for collected in self.names.values() for name in collected}
        # A checkpoint with names of its own is put together first, as transformers does it.
        self.one_by_one = isinstance(room, ExpertsRoom) and names == set(room.sources)
        if self.one_by_one:
            self.operations = [QuantizeEach(self._quantizer)]
            self.quantization_operation = None
        return super().convert(layer_name, *args, **kwargs)

    def materialize_tensors(self) -> Any:
        """The matrices, or what gives them."""
        if not self.one_by_one:
            return super().materialize_tensors()
        collected = self.collected_tensors
        givers = {
            name: [_giver(value)]
            for pattern, names in self.names.items()
            for name, value in zip(names, collected[pattern], strict=True)
        }
        collected.clear()
        return givers


def _giver(value: Any) -> Callable[[], Tensor]:
    """What gives a tensor that is read now, or later, or was already."""
    if isinstance(value, Future):
        return value.result
    return value if callable(value) else lambda: value


def reading_weights(quantizer: FourbitQuantizer) -> Reading:
    """What reads the weights of linear layers, and all others that are called so."""
    return Reading(quantizer, [ANY_WEIGHT], ["weight"])


def reading_experts(
    quantizer: FourbitQuantizer, conversions: Sequence[Any], patterns: set[str], leaves: set[str]
) -> list[Any]:
    """The conversions of transformers, with what reads quantized experts among them.

    Args:
        quantizer: that loads the model.
        conversions: of transformers for the model.
        patterns: of those that put experts together which the folder holds quantized.
        leaves: names of parameters that the folder holds as they are, quantized.
    """
    as_they_are = [Reading(quantizer, [f"{leaf}$"], [leaf]) for leaf in sorted(leaves)]
    return [*as_they_are, *_instead(Reading, quantizer, conversions, patterns)]


def quantizing_experts(
    quantizer: FourbitQuantizer, conversions: Sequence[Any], patterns: set[str]
) -> list[Any]:
    """The conversions of transformers, with what quantizes experts one by one among them.

    Args:
        quantizer: that loads the model.
        conversions: of transformers for the model.
        patterns: of those that put experts together which are to be quantized.
    """
    return _instead(Quantizing, quantizer, conversions, patterns)


def _instead(
    kind: type[_Collecting],
    quantizer: FourbitQuantizer,
    conversions: Sequence[Any],
    patterns: set[str],
) -> list[Any]:
    return [
        kind.instead_of(conversion, quantizer)
        if isinstance(conversion, WeightConverter) and patterns & set(conversion.source_patterns)
        else conversion
        for conversion in conversions
    ]


def without_ours(conversions: Sequence[Any] | None) -> list[Any] | None:
    """Conversions with those of transformers back in their places; saving reverses them."""
    if conversions is None:
        return None
    back = [c.original if isinstance(c, _Collecting) else c for c in conversions]
    return [conversion for conversion in back if conversion is not None]
