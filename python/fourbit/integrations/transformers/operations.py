"""One weight on its way from a file into a model: quantized as it comes, or put together again.

transformers collects the tensors of a checkpoint that make up one of the model's, and calls
`convert` of these with them; what it gives back is put into the model before the next is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from fourbit.model_io import read_quantized

if TYPE_CHECKING:
    from fourbit.integrations.transformers.quantizer import FourbitQuantizer


class _Operation(ConversionOps):  # type: ignore[misc]
    """An operation of one quantizer.

    A copy of it is the same one: transformers copies operations for each tensor, and all of them
    report to the quantizer that loads the model.
    """

    def __init__(self, quantizer: FourbitQuantizer) -> None:
        # transformers knows by this name that no dtype is to be changed on the way here.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return self


class Quantize(_Operation):
    """Quantizes weights as they are read."""

    def convert(self, input_dict: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
        """The parameters of those weights that are to be quantized; the others as they are.

        An error is kept until the model is loaded, since transformers would say less.
        """
        made: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = _one(value)
            room = self.hf_quantizer.unfilled.get(name)
            if room is None:
                made[name] = weight
                continue
            try:
                made |= room.quantize(weight)
            except (ValueError, TypeError) as error:
                self.hf_quantizer.problems.append(type(error)(f"{name}: {error}"))
            else:
                self.hf_quantizer.filled(name)
        return made


class Join(_Operation):
    """Puts a quantized weight together from what a folder holds of it."""

    def convert(
        self, input_dict: Mapping[str, Any], *, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        """The parameters of the weight.

        Args:
            input_dict: the tensors, by their names in the folder.
            full_layer_name: that of the weight in the model.
        """
        room = self.hf_quantizer.unfilled[full_layer_name]

        def read(name: str) -> Tensor:
            tensor = _one(input_dict[name])
            return tensor.contiguous().view(-1).view(torch.uint8)

        stored = [read_quantized(entry, read) for entry in room.entries]
        made = room.join([one.to(one.packed.device) for one in stored])
        self.hf_quantizer.filled(full_layer_name)
        return made


class Cast(_Operation):
    """Gives a tensor that is not quantized the dtype that the model has for it."""

    def convert(
        self, input_dict: Mapping[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        """The tensors, under the names that they came with."""
        dtype = self.hf_quantizer.dtype_in(model, full_layer_name)
        made = {name: _one(value) for name, value in input_dict.items()}
        if set(made) == {_WEIGHT}:
            made = {full_layer_name: made[_WEIGHT]}
        return {name: tensor.to(dtype) for name, tensor in made.items()}


def _one(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


# --- what collects the tensors of a folder --------------------------------------------------------

_WEIGHT = "weight$"
# What the names of a quantized weight's other tensors have after its own; nothing else ends so.
_PART = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+)$")


class Reading(WeightConverter):  # type: ignore[misc]
    """Collects the tensors of a quantized weight, and does with others what another one does.

    Args:
        quantizer: that loads the model.
        sources: expressions for the names of weights in a folder, without the endings of parts.
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
        super().__init__(sources, targets, [*operations, Cast(quantizer)])
        self.original = original

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

    @property
    def _quantizer(self) -> FourbitQuantizer:
        quantizer: FourbitQuantizer = self.operations[-1].hf_quantizer
        return quantizer


def reading_weights(quantizer: FourbitQuantizer) -> Reading:
    """What reads the weights of linear layers, and all others that are called so."""
    return Reading(quantizer, [_WEIGHT], ["weight"])


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
    found: list[Any] = [Reading(quantizer, [f"{leaf}$"], [leaf]) for leaf in sorted(leaves)]
    for conversion in conversions:
        new = conversion
        if isinstance(conversion, WeightConverter) and patterns & set(conversion.source_patterns):
            # The patterns as they are written, which converters process when they are made.
            sources, targets = (
                list(conversion._original_source_patterns),
                list(conversion._original_target_patterns),
            )
            new = Reading(quantizer, sources, targets, conversion.operations, conversion)
            for name in ("scope_prefix", "base_model_prefix"):
                setattr(new, name, getattr(conversion, name))
        found.append(new)
    return found


def without_ours(conversions: Sequence[Any] | None) -> list[Any] | None:
    """Conversions with those of transformers back in their places; saving reverses them."""
    if conversions is None:
        return None
    back = [c.original if isinstance(c, Reading) else c for c in conversions]
    return [conversion for conversion in back if conversion is not None]
