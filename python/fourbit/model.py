"""`quantize_model`: 4-bit layers in the place of a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from fourbit import _core
from fourbit.codebook import Codebook, as_codebook
from fourbit.experts import experts_layouts
from fourbit.linear import Linear4bit

Model = TypeVar("Model", bound=nn.Module)


def quantize_model(
    model: Model,
    *,
    codebook: str | Mapping[int, float] | Codebook = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Model:
    """Put `Linear4bit` in the place of a model's linear layers, one after the other, in place.

    Output heads, routers of experts, layers tied to another module and layers smaller than one
    block stay as they are, as ``fourbit.convert`` leaves them.

    Args:
        model: any module.
        codebook: "nf4", "fp4", "int4", an ``{index: value}`` map or a `Codebook`.
        block_size: elements of a weight that share a scale.
        double_quant: whether the scales are quantized too.
        only: glob patterns over paths of layers, as ``fourbit.convert`` takes them; others stay,
            and heads and routers that match do not.
        skip: glob patterns over paths of layers that stay.

    Returns:
        The model.

    Raises:
        NonFiniteError: naming the layer and the first weight that is NaN or infinite.
        ValueError: for a pattern that matches no linear layer, or a model without any to quantize.
    """
    book = as_codebook(codebook)
    targets = layers_to_quantize(model, block_size=block_size, only=only, skip=skip)
    for path, layer in targets.items():
        try:
            quantized = Linear4bit.from_linear(
                layer, codebook=book, block_size=block_size, double_quant=double_quant
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {path}: {error}") from None
        replace_module(model, layer, quantized.train(layer.training))
    return model


def hidden_numbers(model: nn.Module) -> int:
    """How many more numbers a model has than its parameters have elements.

    A byte of a 4-bit weight stands for two, and bytes of scales for none.
    """
    hidden = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            parts = module.named_parameters(recurse=False)
            packed = sum(part.numel() for name, part in parts if name.startswith("weight"))
            hidden += module.in_features * module.out_features - packed
        for layout in experts_layouts(module).values():
            hidden += layout.shape.numel() - sum(layout.part_sizes())
    return hidden


def layers_to_quantize(
    model: nn.Module,
    *,
    block_size: int = 64,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    keep: Callable[[str], bool] = lambda path: False,
) -> dict[str, nn.Linear]:
    """The layers that `quantize_model` replaces, by path; the model may be on the meta device.

    Args:
        model: any module.
        block_size: layers smaller than a block stay.
        only: as in `quantize_model`.
        skip: as in `quantize_model`.
        keep: says of a path that its layer stays, whatever `only` says.

    Raises:
        ValueError: for a pattern that is no glob or matches no linear layer, or if there is
            nothing to quantize.
    """
    # What inherits from nn.Linear may compute something else with its weight.
    layers = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    named, skipped = _core.matched_modules(list(only), list(skip), list(layers))
    tied = _tied_parameters(model)
    head = _output_embeddings(model)

    def wanted(path: str, layer: nn.Linear, named: bool) -> bool:
        if id(layer.weight) in tied or layer.weight.numel() < block_size or keep(path):
            return False
        return named if only else _core.kept_module(path) is None and layer is not head

    targets = {
        path: layer
        for (path, layer), is_named, is_skipped in zip(layers.items(), named, skipped, strict=True)
        if not is_skipped and wanted(path, layer, is_named)
    }
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantize: all that it has are heads, "
            "routers, tied, smaller than a block, or left out by the options"
        )
    return targets


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _tied_parameters(model: nn.Module) -> set[int]:
    """The parameters that more than one module holds."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that it has: layers may be shared."""
    if old is model:
        raise ValueError("the model is itself a linear layer; use fourbit.Linear4bit.from_linear")
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
