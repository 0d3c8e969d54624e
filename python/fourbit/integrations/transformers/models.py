"""A loaded model: what is said of it, what is saved of it, and how it becomes dense again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fourbit.dense import is_linear
from fourbit.experts import (
    ExpertsLayout,
    experts_layouts,
    experts_modules,
    experts_weight,
    part_of,
    remove_experts,
)
from fourbit.file_groups import stored_parts
from fourbit.integrations.transformers.config import NF4Config
from fourbit.linear import Linear4bit
from fourbit.model import replace_module
from fourbit.names_in_files import NamesInFiles
from fourbit.quantized import QuantizedTensor
from fourbit.tensor_file import TORCH_DTYPES


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """The quantized layers of a model, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def described(config: NF4Config, model: nn.Module) -> NF4Config:
    """The config that says how a model is quantized."""
    layers = quantized_layers(model)
    experts = [
        layout
        for module in experts_modules(model).values()
        for layout in experts_layouts(module).values()
    ]
    found: list[Linear4bit | ExpertsLayout] = [*layers.values(), *experts]
    first = found[0]
    dtype = first.weight_dtype if isinstance(first, Linear4bit) else first.dtype
    return config.of_model(
        first.codebook,
        block_size=first.block_size,
        double_quant=first.double_quant,
        experts=bool(experts),
        skip_modules=[
            path
            for path, module in model.named_modules()
            if is_linear(module) and path not in layers
        ],
        dtype=str(dtype).removeprefix("torch."),
    )


def leave_files(model: nn.Module) -> None:
    """Give parameters on the CPU memory of their own.

    What is read without a copy is a part of the mapped file, which stays mapped as long as one
    norm does: all of the 16-bit weights, of a file that someone may write to.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def state_in_files(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's files, by name: those that ``fourbit.convert`` writes.

    What is not quantized has its name in the model, which transformers changes as it saves.

    Raises:
        ValueError: for a weight whose data is not here: offloaded, or sharded over processes.
    """
    names = NamesInFiles(model)
    state: dict[str, Tensor] = {}

    def add(name: str, quantized: QuantizedTensor) -> None:
        for part in stored_parts(name, quantized):
            data = part.tensor().view(TORCH_DTYPES[part.dtype])
            state[part.name] = data.reshape(part.shape)

    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        whole = "weight" if isinstance(module, Linear4bit) and leaf != "bias" else None
        whole = whole or part_of(module, leaf)
        if whole is None:
            state[name] = tensor
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{name} is offloaded; load the model with device_map={{'': 'cpu'}} to save it"
            )
        if hasattr(tensor, "to_local"):
            raise ValueError(
                f"{name} is sharded over processes (FSDP2); save the adapters, which is all that "
                "training changes"
            )
        if leaf != whole:
            continue
        if isinstance(module, Linear4bit):
            add(name, module.quantized())
        else:
            weight = experts_weight(module, leaf)
            for index, source in enumerate(names.of_experts(name, weight.layout)):
                add(source, weight.group(index))
    return state


def make_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Put dense weights in the place of all quantized ones.

    The layers are those that the model's class makes, so that what is saved of it loads.
    """
    for path, layer in quantized_layers(model).items():
        weight = layer.dequantize(dtype)
        dense = _dense_layer(layer)
        dense.weight = nn.Parameter(layer.in_dense_files(weight))
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.data.to(weight.dtype))
        replace_module(model, layer, dense.train(layer.training))
        _move_hook(model.get_submodule(path), layer)
    for module in experts_modules(model).values():
        for name in experts_layouts(module):
            remove_experts(module, name, dtype)
            getattr(module, name).requires_grad_(True)


def _dense_layer(layer: Linear4bit) -> Any:
    """A layer without a bias, to be given a weight."""
    if not layer.transposed_when_dense:
        return nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    with torch.device("meta"):
        return Conv1D(layer.out_features, layer.in_features)


def _move_hook(new: nn.Module, old: Any) -> None:
    """Give a layer that takes another's place the hook that moves its inputs between devices."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
