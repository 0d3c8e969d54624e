"""LoftQ (arXiv 2310.08659) for PEFT's adapters on 4-bit layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit._core import CheckpointError
from fourbit.integrations.peft.dora import reset_magnitude
from fourbit.integrations.peft.layer import LoraLinear4bit
from fourbit.lora import loftq

_PREFIX = "base_model.model."


@torch.no_grad()
def start_loftq(
    layer: LoraLinear4bit, adapter_name: str, weight: Tensor, path: str, *, iterations: int
) -> None:
    """Let an adapter start as the correction of its layer's rounding.

    Args:
        layer: whose weight changes too where there is more than one iteration.
        adapter_name: which adapter.
        weight: before quantization, as a dense checkpoint holds it.
        path: of the layer, for errors.
        iterations: rounds.

    Raises:
        CheckpointError: for a weight that the layer was not quantized from.
    """
    base = layer.get_base_layer()
    weight = base.in_dense_files(weight).to(base.weight.device)
    loftq.check_same_weights(weight, base, path)
    start = loftq.loftq(
        weight,
        r=layer.r[adapter_name],
        scaling=layer.scaling[adapter_name],
        iterations=iterations,
        base=base,
    )
    if iterations > 1:
        base.set_quantized(start.quantized)
    layer.lora_A[adapter_name].weight.copy_(start.a)
    layer.lora_B[adapter_name].weight.copy_(start.b)
    reset_magnitude(layer, adapter_name)


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """What PEFT's function of that name does, for models with `Linear4bit`.

    Args:
        peft_model: with adapters on 4-bit layers; their bases are not changed.
        model_path: the 16-bit folder or file that the model was quantized from, or a state dict; by
            default where the model's configuration says that it came from.
        adapter_name: which adapter.
        callback: is called with the model and the path of each layer when its adapter is replaced;
            where it returns False the adapter is put back.

    Raises:
        ValueError: for a model without 4-bit layers with that adapter.
        FileNotFoundError: if the weights are not there.
        CheckpointError: for weights that the model was not quantized from.
    """
    layers = {
        path.removeprefix(_PREFIX): module
        for path, module in peft_model.named_modules()
        if isinstance(module, LoraLinear4bit) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(f"the model has no 4-bit layer with an adapter named {adapter_name!r}")
    source = loftq.open_weights(source_of(peft_model) if model_path is None else model_path)
    for path, layer in layers.items():
        parts = [layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight]
        if adapter_name in layer.lora_magnitude_vector:
            parts.append(layer.lora_magnitude_vector[adapter_name].weight)
        before = [part.detach().clone() for part in parts]
        start_loftq(layer, adapter_name, source.weight(path), path, iterations=1)
        if callback is not None and not callback(peft_model, path):
            a, b, *magnitude = before
            layer.lora_A[adapter_name].weight.data = a
            layer.lora_B[adapter_name].weight.data = b
            if magnitude:
                layer.lora_magnitude_vector[adapter_name].weight.data = magnitude[0]


def source_of(model: Any) -> Path:
    """The folder that a model was quantized from, where its configuration knows.

    Raises:
        FileNotFoundError: saying what to give instead.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if name and Path(name).is_dir():
        return Path(name)
    try:
        if name:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):
        pass
    raise FileNotFoundError(
        f"LoftQ needs the weights before they were quantized, and {name or 'the model'!r} is no "
        "folder that is here; add the adapter with init_lora_weights=True and call "
        "peft.replace_lora_weights_loftq(model, folder). A trained adapter that is only loaded "
        "needs init_lora_weights true in its adapter_config.json"
    )


def weight_for(model: nn.Module, path: str) -> Tensor:
    """The weight of one layer before quantization, from where the model came from.

    Raises:
        FileNotFoundError: if it is not there.
        CheckpointError: if it is quantized there.
    """
    source = source_of(model)
    try:
        return loftq.open_weights(source).weight(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; to load a trained adapter, set init_lora_weights to true in its "
            "adapter_config.json"
        ) from None
