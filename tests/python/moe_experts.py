"""Small mixtures of experts in 4 bits, beside the same numbers in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import fourbit
from fourbit.experts import quantize_experts, set_experts
from lora_models import quantize_linears
from moe_models import moe

WEIGHTS = ("gate_up_proj", "down_proj")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts") and hasattr(module, "is_transposed")


def experts_of(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if is_experts(module)}


def quantized_and_dense(family: str, **own: Any) -> tuple[Any, Any]:
    """A model with 4-bit experts and linear layers, and one with their values in float32."""
    model = moe(family, torch.float32, **own)
    dense = copy.deepcopy(model)
    quantize_linears(model)
    for path, module in experts_of(model).items():
        groups = 1 if family == "GptOss" else 4
        for name in WEIGHTS:
            quantized = quantize_experts(getattr(module, name).data, groups=groups)
            set_experts(module, name, quantized)
            getattr(dense.get_submodule(path), name).data = quantized.dequantize()
    for path, layer in model.named_modules():
        if isinstance(layer, fourbit.Linear4bit):
            dense.get_submodule(path).weight.data = layer.dequantize(torch.float32)
    return model, dense


def shake(model: nn.Module, *, seed: int = 1, size: float = 0.1) -> None:
    """Random adapters: as added they would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, part in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                part.copy_(torch.randn(part.shape, generator=generator) * size)
