"""`merge` and `unmerge`: the adapter inside the frozen weights, and out again bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fourbit._core import NonFiniteError
from fourbit.experts import QuantizedExperts, join_groups, set_experts
from fourbit.linear import Linear4bit
from fourbit.lora.attach import LoraLayer, lora_modules
from fourbit.lora.experts import (
    LoraExperts,
    dense_experts,
    merged_experts,
    original_experts,
    stored_experts,
)
from fourbit.lora.layer import DenseOriginal, LoraLinear, base_weight, merged_weight
from fourbit.lora.loftq import requantize
from fourbit.quantized import QuantizedTensor


@dataclass(frozen=True)
class LayerMerge:
    """What rounding left of one layer's change ``D``, the merged weight less the base.

    With ``E`` the change that the layer has after rounding to 4 (or 16) bits:

    Attributes:
        relative_error: ``‖E - D‖ / ‖D‖``: 0 is exact, 1 says that as much noise as change went in.
        survived: ``<E, D> / ‖D‖²``: the part of the change that is there: 1 is all of it.
        change: ``‖D‖ / ‖W‖``: how large the change is beside the base.
    """

    relative_error: float
    survived: float
    change: float


@dataclass(frozen=True)
class MergeReport:
    """How well a merge went, by path of the layer, or of the 3-D weight of experts.

    Layers without any change count as exact.
    """

    layers: Mapping[str, LayerMerge]

    @property
    def worst(self) -> str:
        """The path of the layer with the largest relative error."""
        return max(self.layers, key=lambda path: self.layers[path].relative_error)

    @property
    def mean_relative_error(self) -> float:
        """Of all layers alike."""
        return sum(layer.relative_error for layer in self.layers.values()) / len(self.layers)

    def __str__(self) -> str:
        """One line for a report."""
        worst = self.layers[self.worst]
        return (
            f"merged {len(self.layers)} layers; error relative to the adapter's change: mean "
            f"{self.mean_relative_error:.2f}, worst {worst.relative_error:.2f} ({self.worst})"
        )


@torch.no_grad()
def merge(model: nn.Module) -> MergeReport:
    """Add the adapters to the frozen weights, in place: no adapter has to be computed any more.

    The sum is made in float32. A dense weight is rounded to its dtype; a 4-bit one is quantized
    again in its own format, which loses part of a small change: the report says how much. To keep
    all of it, use ``fourbit.export_merged``. The weights before the merge stay in memory until
    `unmerge` or `remove_lora`, and modules of `modules_to_save` are in place already. A state dict
    taken meanwhile holds merged weights beside the adapter; `fourbit.save_adapter` writes the
    adapter alone.

    Returns:
        What became of every layer.

    Raises:
        ValueError: if the model has no adapter, or is merged.
        NonFiniteError: naming the layer whose adapter has NaN or infinity; nothing is changed.
        TypeError: for a base in another library's format; nothing is changed.
    """
    layers = _layers(model)
    for path, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{path} is merged already; call fourbit.unmerge first")
    report: dict[str, LayerMerge] = {}
    try:
        for path, layer in layers.items():
            if isinstance(layer, LoraExperts):
                for name in layer.names:
                    report[f"{path}.{name}"] = _merge_experts(path, layer, name)
            else:
                report[path] = _merge_layer(path, layer)
    except BaseException:
        for layer in layers.values():
            if layer.merged:
                _unmerge(layer)
        raise
    return MergeReport(report)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the frozen weights back as they were before `merge`, bit for bit, in place.

    Raises:
        ValueError: if the model has no adapter, or is not merged.
    """
    layers = _layers(model)
    for path, layer in layers.items():
        if not layer.merged:
            raise ValueError(f"{path} is not merged; there is nothing to undo")
    for layer in layers.values():
        _unmerge(layer)


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_modules(model)
    if not layers:
        raise ValueError("the model has no adapter; call fourbit.add_lora or load_adapter first")
    return layers


def _unmerge(layer: LoraLayer) -> None:
    if isinstance(layer, LoraExperts):
        _unmerge_experts(layer)
    else:
        _unmerge_layer(layer)


# --- linear layers --------------------------------------------------------------------------------


def _merge_layer(path: str, layer: LoraLinear) -> LayerMerge:
    base = layer.base_layer
    wanted = merged_weight(layer)
    if not wanted.isfinite().all():
        raise NonFiniteError(f"the adapter of {path} gives NaN or infinity; it cannot be merged")
    before = base_weight(base)
    original = _stored(base)
    # Requantizing moves even an unchanged weight a little where its scales are quantized too.
    if not torch.equal(wanted, before):
        _store(base, wanted, original)
    layer._original = original
    if not base_weight(base).isfinite().all():
        # float16 ends at 65504.
        _unmerge_layer(layer)
        raise NonFiniteError(f"the merged weight of {path} does not fit {base.weight.dtype}")
    return _compare([(before, wanted, base_weight(base))])


def _unmerge_layer(layer: LoraLinear) -> None:
    base, original = layer.base_layer, layer._original
    device = base.weight.device
    if isinstance(original, QuantizedTensor) and isinstance(base, Linear4bit):
        base.set_quantized(original.to(device))
    elif isinstance(original, DenseOriginal):
        weight = original.weight
        if weight.device != device:
            weight = nn.Parameter(weight.detach().to(device), requires_grad=False)
        base.weight = weight
    layer._original = None


def _stored(base: nn.Linear) -> QuantizedTensor | DenseOriginal:
    return base.quantized() if isinstance(base, Linear4bit) else DenseOriginal(base.weight)


def _store(base: nn.Linear, weight: Tensor, original: QuantizedTensor | DenseOriginal) -> None:
    # New parameters, so that the old memory stays as it is for the way back.
    if isinstance(base, Linear4bit) and isinstance(original, QuantizedTensor):
        base.set_quantized(requantize(weight, original))
    else:
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)


# --- experts --------------------------------------------------------------------------------------


def _merge_experts(path: str, layer: LoraExperts, name: str) -> LayerMerge:
    wanted = merged_experts(layer, name)
    before = original_experts(layer, name)
    base, lora = layer.base_layer, layer.lora(name)
    lora._original = stored_experts(base, name)
    store_experts(base, name, wanted, lora._original, path=f"{path}.{name}")
    after = dense_experts(stored_experts(base, name), wanted.device)
    return _compare(zip(before, wanted, after, strict=True))


def store_experts(
    base: nn.Module,
    name: str,
    weight: Tensor,
    like: QuantizedExperts | DenseOriginal,
    *,
    path: str,
) -> None:
    """Put another 3-D weight in the place of a module's, in the format of the one that was there.

    It gets new memory, so that the old one stays as it is for `restore_experts`.

    Args:
        base: the module of experts.
        name: of the weight.
        weight: float32, in the shape before quantization.
        like: the weight before all merges.
        path: of the weight, for errors.

    Raises:
        NonFiniteError: if it has NaN or infinity, or does not fit the dtype; nothing is changed.
    """
    if not weight.isfinite().all():
        raise NonFiniteError(f"the adapter of {path} gives NaN or infinity; it cannot be merged")
    if isinstance(like, QuantizedExperts):
        set_experts(base, name, requantize_experts(weight, like))
        return
    dense = weight.to(like.weight.dtype)
    if not dense.isfinite().all():
        # float16 ends at 65504.
        raise NonFiniteError(f"the merged {path} does not fit {dense.dtype}")
    base.register_parameter(name, nn.Parameter(dense, requires_grad=False))


def requantize_experts(weight: Tensor, like: QuantizedExperts) -> QuantizedExperts:
    """Another 3-D weight in the format of a quantized one; an unchanged group keeps its bytes.

    Args:
        weight: float32, of the shape before quantization.
        like: what says how.
    """
    groups = []
    for index, piece in enumerate(weight.reshape(like.layout.groups, -1)):
        old = like.group(index)
        # Requantizing moves even an unchanged weight a little where its scales are quantized too.
        same = torch.equal(old.dequantize(torch.float32).view(-1), piece)
        groups.append(old if same else requantize(piece.view(old.shape), old))
    return join_groups(groups, like.layout.shape)


def restore_experts(base: nn.Module, name: str, original: QuantizedExperts | DenseOriginal) -> None:
    """Put a 3-D weight back that `store_experts` has replaced, on the device of the other."""
    device = getattr(base, name).device
    if isinstance(original, QuantizedExperts):
        set_experts(base, name, original.to(device))
        return
    weight = cast(nn.Parameter, original.weight)
    if weight.device != device:
        weight = nn.Parameter(weight.detach().to(device), requires_grad=False)
    base.register_parameter(name, weight)


def _unmerge_experts(layer: LoraExperts) -> None:
    for name in layer.names:
        lora = layer.lora(name)
        if lora._original is not None:
            restore_experts(layer.base_layer, name, lora._original)
            lora._original = None


# --- the report -----------------------------------------------------------------------------------


def _compare(pieces: Iterable[tuple[Tensor, Tensor, Tensor]]) -> LayerMerge:
    """Of one weight in pieces: what it was, what it should be, what it is; all float32."""
    squares = {"base": 0.0, "change": 0.0, "error": 0.0}
    overlap = 0.0
    for before, wanted, after in pieces:
        change, error = wanted - before, after - wanted
        for name, part in (("base", before), ("change", change), ("error", error)):
            squares[name] += torch.linalg.vector_norm(part).item() ** 2
        overlap += torch.sum((after - before) * change, dtype=torch.float64).item()
    if squares["change"] == 0:
        return LayerMerge(relative_error=0.0, survived=1.0, change=0.0)
    return LayerMerge(
        relative_error=math.sqrt(squares["error"] / squares["change"]),
        survived=overlap / squares["change"],
        change=math.sqrt(squares["change"] / max(squares["base"], 1e-76)),
    )
