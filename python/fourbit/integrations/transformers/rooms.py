"""Places in a model for weights in few bits, and how a weight comes into its own.

A `Room` is made while the model is on the meta device, and filled when its weight was read: with a
dense one that is quantized then, or with the stored parts of one that already was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.dense import features
from fourbit.experts import (
    PARTS,
    ExpertsLayout,
    join_groups,
    quantize_experts,
    set_empty_experts,
)
from fourbit.integrations import is_conv1d
from fourbit.linear import Linear4bit
from fourbit.model import replace_module
from fourbit.quantized import QuantizedTensor, quantize


class Room(ABC):
    """A weight of a model that is, or will be, in few bits.

    Attributes:
        name: of the weight in the model; the names of its parts begin with it.
        module: that has it.
        entries: what a folder's reader says of each quantized tensor that makes it up, in order;
            empty for a weight that is quantized as it is read.
    """

    def __init__(self, name: str, module: nn.Module, entries: Sequence[Any] = ()) -> None:
        self.name = name
        self.module: Any = module
        self.entries = entries

    def fill(self, *parts: Tensor | None) -> dict[str, Tensor]:
        """The parameters of the weight, under their names in the model."""
        return {
            self.name + ending: part
            for ending, part in zip(PARTS, parts, strict=True)
            if part is not None
        }

    def check(self, weight: Tensor, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` for a dense weight of another shape."""
        if tuple(weight.shape) != tuple(shape):
            raise ValueError(f"it is {tuple(weight.shape)}, and {tuple(shape)} in the model")

    @abstractmethod
    def make(self, model: nn.Module, read_as: torch.dtype) -> None:
        """Make the room, on the meta device.

        Args:
            model: that has it.
            read_as: the dtype that the weight is read in; until then the model says that it has
                this one, since transformers casts what it reads to what the model has.
        """

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters for a dense weight.

        Raises:
            ValueError: for a weight of another shape, or that is not finite.
            TypeError: for a weight that is no floating-point number.
        """

    @abstractmethod
    def join(self, stored: Sequence[QuantizedTensor]) -> dict[str, Tensor]:
        """The parameters for what the folder holds, one tensor for each of the `entries`."""


class LinearRoom(Room):
    """The weight of a linear layer, which becomes a `Linear4bit`.

    Args:
        path: of the layer in the model.
        layer: the dense one, whose weight a checkpoint holds transposed if it is a `Conv1D`.
        entries: as in `Room`.
        layout: codebook, block_size, double_quant and dtype, as `Linear4bit` takes them.
    """

    def __init__(
        self, path: str, layer: nn.Module, entries: Sequence[Any] = (), **layout: Any
    ) -> None:
        super().__init__(f"{path}.weight", layer, entries)
        self._layout = layout

    def make(self, model: nn.Module, read_as: torch.dtype) -> None:
        """Put an empty 4-bit layer in the place of the dense one."""
        layer = self.module
        new = Linear4bit(*features(layer), bias=False, device="meta", **self._layout)
        new.transposed_when_dense = is_conv1d(layer)
        new.bias = layer.bias
        new.weight = nn.Parameter(new.weight.to(read_as), requires_grad=False)
        replace_module(model, layer, new.train(layer.training))
        self.module = new

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `fourbit.quantize_model` does it."""
        layer = self.module
        shape = (layer.out_features, layer.in_features)
        self.check(weight, shape[::-1] if layer.transposed_when_dense else shape)
        quantized = quantize(
            layer.in_dense_files(weight),
            codebook=layer.codebook,
            block_size=layer.block_size,
            double_quant=layer.double_quant,
        )
        layer.weight_dtype = quantized.dtype
        return self.join([quantized])

    def join(self, stored: Sequence[QuantizedTensor]) -> dict[str, Tensor]:
        """The parts of the only tensor there is."""
        (one,) = stored
        return self.fill(one.packed, one.absmax, one.nested_absmax, one.nested_offset)


class ExpertsRoom(Room):
    """A 3-D weight of experts.

    Args:
        name: of the parameter in the model.
        module: that has it.
        layout: of the weight.
        entries: as in `Room`.
        sources: names of the tensors of a checkpoint that make it up, in order, if it is quantized
            as they are read.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layout: ExpertsLayout,
        entries: Sequence[Any] = (),
        sources: Sequence[str] = (),
    ) -> None:
        super().__init__(name, module, entries)
        self.layout = layout
        self.sources = sources

    def make(self, model: nn.Module, read_as: torch.dtype) -> None:
        """Put empty parts in the place of the dense parameter."""
        from fourbit.integrations.transformers.experts import use_fourbit

        leaf = self.name.rpartition(".")[2]
        set_empty_experts(self.module, leaf, self.layout)
        empty = getattr(self.module, leaf).to(read_as)
        setattr(self.module, leaf, nn.Parameter(empty, requires_grad=False))
        use_fourbit(self.module)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Each of the checkpoint's tensors on its own, as ``fourbit.convert`` does it."""
        layout = self.layout
        self.check(weight, layout.shape)
        quantized = quantize_experts(
            weight,
            codebook=layout.codebook,
            block_size=layout.block_size,
            double_quant=layout.double_quant,
            groups=layout.groups,
        )
        return self.fill(*quantized.parts)

    def quantize_each(self, sources: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """The parameters for dense matrices, which are read one after the other.

        Args:
            sources: what gives each of the checkpoint's tensors, by name.

        Raises:
            ValueError: naming a tensor that is not finite or of another size.
            TypeError: naming a tensor that is no floating-point number.
        """
        layout = self.layout
        size = layout.shape.numel() // layout.groups
        stored: list[QuantizedTensor] = []
        for name in self.sources:
            weight = sources[name]()
            try:
                if weight.numel() != size:
                    raise ValueError(f"it has {weight.numel()} elements, and {size} in the model")
                one = quantize(
                    weight,
                    codebook=layout.codebook,
                    block_size=layout.block_size,
                    double_quant=layout.double_quant,
                )
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from None
            stored.append(one)
        return self.join(stored)

    def join(self, stored: Sequence[QuantizedTensor]) -> dict[str, Tensor]:
        """One after the other."""
        return self.fill(*join_groups(stored, self.layout.shape).parts)
