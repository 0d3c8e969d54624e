"""One weight on its way from a file into a model: quantized as it comes, or put together again.

transformers collects the tensors of a checkpoint that make up one of the model's, and calls
`convert` of these with them; what it gives back is put into the model before the next is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from fourbit.integrations.transformers.rooms import ExpertsRoom
from fourbit.model_io import read_quantized

if TYPE_CHECKING:
    from fourbit.integrations.transformers.quantizer import FourbitQuantizer


ANY_WEIGHT = "weight$"
"""What matches the names of all weights of layers."""


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
        if set(made) == {ANY_WEIGHT}:
            made = {full_layer_name: made[ANY_WEIGHT]}
        return {name: tensor.to(dtype) for name, tensor in made.items()}


class QuantizeEach(_Operation):
    """Quantizes the matrices of experts one after the other: never are two there at a time."""

    def convert(
        self, input_dict: Mapping[str, Any], *, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        """The parameters of the weight that the matrices make up.

        Args:
            input_dict: what gives each of them, by their names in the checkpoint.
            full_layer_name: that of the weight in the model.
        """
        room = self.hf_quantizer.unfilled[full_layer_name]
        assert isinstance(room, ExpertsRoom)
        try:
            made = room.quantize_each({name: give for name, (give,) in input_dict.items()})
        except (ValueError, TypeError) as error:
            self.hf_quantizer.problems.append(error)
            return {}
        self.hf_quantizer.filled(full_layer_name)
        return made


def _one(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
