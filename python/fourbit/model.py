"""`quantize_model`: 4-bit layers in the place of a model's linear layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from fourbit.codebook import Codebook, as_codebook
from fourbit.experts import experts_layouts, quantize_experts, set_experts
from fourbit.linear import Linear4bit
from fourbit.targets import Targets, weights_to_quantize

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

    GPT-2's `Conv1D` is one: its weight is transposed first, which ``fourbit.convert`` does not do.
    The 3-D weights of transformers' mixtures of experts are quantized too. Output heads, routers of
    experts, layers tied to another module and layers smaller than one block stay as they are, as
    ``fourbit.convert`` leaves them.

    Args:
        model: any module.
        codebook: "nf4", "fp4", "int4", an ``{index: value}`` map or a `Codebook`.
        block_size: elements of a weight that share a scale.
        double_quant: whether the scales are quantized too.
        only: glob patterns over paths of layers, as ``fourbit.convert`` takes them; others stay,
            and heads and routers that match do not. Weights of experts go by their names
            (``model.layers.0.mlp.experts.gate_up_proj``).
        skip: glob patterns over paths of layers that stay.

    Returns:
        The model.

    Raises:
        NonFiniteError: naming the layer and the first weight that is NaN or infinite.
        ValueError: for a pattern that matches no linear layer, or a model without any to quantize.

    Warns:
        UserWarning: naming experts that stay in 16 bits since they cannot be quantized.
    """
    book = as_codebook(codebook)
    targets = weights_to_quantize(model, block_size=block_size, only=only, skip=skip)
    for path, layer in targets.layers.items():
        try:
            quantized = Linear4bit.from_linear(
                layer, codebook=book, block_size=block_size, double_quant=double_quant
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {path}: {error}") from None
        replace_module(model, layer, quantized.train(layer.training))
    for name, sources in targets.experts.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        try:
            weight = quantize_experts(
                module.get_parameter(leaf),
                codebook=book,
                block_size=block_size,
                double_quant=double_quant,
                groups=len(sources),
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"experts {name}: {error}") from None
        set_experts(module, leaf, weight)
        compute_with_fourbit(module)
    warn_of_kept_experts(targets)
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


def compute_with_fourbit(module: nn.Module) -> None:
    """Have a module of transformers' experts computed by `fourbit.experts.experts_forward`."""
    from fourbit.integrations.transformers.experts import use_fourbit

    use_fourbit(module)


def warn_of_kept_experts(targets: Targets) -> None:
    """Say which experts stay in 16 bits: they may be most of the model."""
    if targets.kept_experts:
        name, reason = next(iter(targets.kept_experts.items()))
        more = len(targets.kept_experts) - 1
        warnings.warn(
            f"experts stay in 16 bits: {name}{f' and {more} more' if more else ''}; {reason}",
            stacklevel=3,
        )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that it has: layers may be shared."""
    if old is model:
        raise ValueError("the model is itself a linear layer; use fourbit.Linear4bit.from_linear")
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
