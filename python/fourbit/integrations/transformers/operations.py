"""One tensor on its way from a file into a model: quantized as it comes, or put together again.

transformers calls `convert` of these with the tensors of one layer, and puts what it gives back
into the model before the next one is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from fourbit import ops
from fourbit.linear import Linear4bit
from fourbit.quantized import quantize

if TYPE_CHECKING:
    from fourbit.integrations.transformers.quantizer import FourbitQuantizer

# The tensors of a quantized weight in a file, as expressions for the ends of their names.
_PACKED = "weight$"
_ABSMAX = r"weight\.absmax$"
_NESTED_ABSMAX = r"weight\.nested_absmax$"
# Read before any tensor is loaded.
_KNOWN = (r"weight\.quant_map$", r"weight\.nested_quant_map$", r"weight\.quant_state\.[\w-]+$")


QuantizedParts: TypeAlias = "tuple[Tensor, Tensor, Tensor | None, Tensor | None]"
"""Packed codes, scales, scales of the scales, their mean; as in `fourbit.QuantizedTensor`."""


def reading(quantizer: FourbitQuantizer) -> WeightConverter:
    """What reads the weights of a quantized folder; plain ones go through it too."""
    patterns = [_PACKED, _ABSMAX, _NESTED_ABSMAX, *_KNOWN]
    return WeightConverter(patterns, "weight", [ReadQuantized(quantizer)])


def without_ours(conversions: Sequence[Any] | None) -> list[Any] | None:
    """Conversions less `reading`, which only loading needs: saving has its own way back."""
    if conversions is None:
        return None
    return [
        conversion
        for conversion in conversions
        if not any(isinstance(op, ReadQuantized) for op in getattr(conversion, "operations", ()))
    ]


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

    def fill(self, model: Any, path: str, weight: QuantizedParts) -> dict[str, Tensor]:
        """The tensors of a layer's weight under their names in the model."""
        self.hf_quantizer.filled(path, model.get_submodule(path))
        names = ("weight", "weight_absmax", "weight_nested_absmax", "weight_nested_offset")
        return {
            f"{path}.{name}": part
            for name, part in zip(names, weight, strict=True)
            if part is not None
        }


class Quantize(_Operation):
    """Quantizes the weight of a linear layer, as `fourbit.quantize` does."""

    def convert(self, input_dict: Mapping[str, Any], *, model: Any, **_: Any) -> dict[str, Tensor]:
        """The quantized parts of those of the tensors that are to be quantized.

        An error is kept until the model is loaded, since transformers would say less.
        """
        made: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            path = name.removesuffix(".weight")
            if path not in self.hf_quantizer.unfilled:
                made[name] = tensor
                continue
            try:
                made |= self.fill(model, path, _quantized(model.get_submodule(path), tensor))
            except (ValueError, TypeError) as error:
                self.hf_quantizer.problems.append(type(error)(f"layer {path}: {error}"))
        return made


def _quantized(layer: Linear4bit, weight: Tensor) -> QuantizedParts:
    shape = (layer.out_features, layer.in_features)
    if tuple(weight.shape) != shape:
        raise ValueError(f"its weight is {tuple(weight.shape)}, and {shape} in the model")
    quantized = quantize(
        weight,
        codebook=layer.codebook,
        block_size=layer.block_size,
        double_quant=layer.double_quant,
    )
    layer.weight_dtype = quantized.dtype
    return quantized.packed, quantized.absmax, quantized.nested_absmax, quantized.nested_offset


class ReadQuantized(_Operation):
    """Puts the stored parts of a quantized weight into the layer."""

    def convert(
        self, input_dict: Mapping[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        """The layer's parameters; a plain weight in the dtype that the model has for it."""
        found: dict[str, Tensor] = {
            pattern: value[0] if isinstance(value, list) else value
            for pattern, value in input_dict.items()
        }
        packed = found[_PACKED]
        path = full_layer_name.removesuffix(".weight")
        stored = self.hf_quantizer.stored.get(path)
        if stored is None:
            dtype = self.hf_quantizer.dtype_in(model, full_layer_name)
            return {full_layer_name: packed.to(dtype)}
        absmax, nested_absmax = found[_ABSMAX], found.get(_NESTED_ABSMAX)
        offset = None
        if stored.nested_offset is not None:
            offset = ops.float_bytes(torch.tensor([stored.nested_offset], device=packed.device))
        parts = (
            packed.contiguous().view(torch.uint8).reshape(-1, 1),
            ops.float_bytes(absmax),
            None if nested_absmax is None else ops.float_bytes(nested_absmax),
            offset,
        )
        return self.fill(model, path, parts)
