"""Dense layers whose place a `Linear4bit` can take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fourbit.integrations import is_conv1d


def is_dense(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear``, or GPT-2's ``Conv1D``, which computes the same.

    What inherits from these may compute something else with its weight.
    """
    return type(module) is nn.Linear or is_conv1d(module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of any kind, in few bits or dense."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features(layer: Any) -> tuple[int, int]:
    """Sizes of the inputs and outputs of a linear layer."""
    if is_conv1d(layer):
        in_features, out_features = layer.weight.shape
        return in_features, out_features
    return layer.in_features, layer.out_features


def weight_by_rows(layer: Any) -> Tensor:
    """The weight [out_features, in_features] of a dense layer; `Conv1D` has its transpose."""
    weight: Tensor = layer.weight
    return weight.t().contiguous() if is_conv1d(layer) else weight
