"""Models and folders: `save`, `load` and `export_merged`, and `quantize_model` before them.

The files are those of ``fourbit.convert``; this module says which tensor of a model goes where.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fourbit import _core, ops
from fourbit._core import CheckpointError
from fourbit.codebook import Codebook, as_codebook
from fourbit.linear import Linear4bit
from fourbit.lora.attach import has_adapter, lora_modules
from fourbit.lora.layer import LoraLinear, merged_weight
from fourbit.quantized import QuantizedTensor

Model = TypeVar("Model", bound=nn.Module)

DEFAULT_SHARD_BYTES = 2 << 30

_FILE_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _FILE_DTYPES.items()}


# --- quantize a model in memory -------------------------------------------------------------------


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
        only: glob patterns over paths of layers; others stay, and heads and routers that match do
            not.
        skip: glob patterns over paths of layers that stay.

    Returns:
        The model.

    Raises:
        NonFiniteError: naming the layer and the first weight that is NaN or infinite.
        ValueError: for a pattern that matches no linear layer, or a model without any to quantize.
    """
    book = as_codebook(codebook)
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Linear4bit)
    }
    for pattern in (*only, *skip):
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise ValueError(f"the pattern {pattern!r} matches no linear layer of the model")
    tied = _tied_parameters(model)

    def wanted(path: str, layer: nn.Linear) -> bool:
        if id(layer.weight) in tied or layer.weight.numel() < block_size:
            return False
        if any(fnmatchcase(path, pattern) for pattern in skip):
            return False
        if only:
            return any(fnmatchcase(path, pattern) for pattern in only)
        return _core.kept_module(path) is None and layer is not _output_embeddings(model)

    targets = {path: layer for path, layer in layers.items() if wanted(path, layer)}
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    for path, layer in targets.items():
        try:
            quantized = Linear4bit.from_linear(
                layer, codebook=book, block_size=block_size, double_quant=double_quant
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {path}: {error}") from None
        _replace_module(model, layer, quantized.train(layer.training))
    return model


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


def _replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that it has: layers may be shared."""
    if old is model:
        raise ValueError("the model is itself a linear layer; use fourbit.Linear4bit.from_linear")
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


# --- save -----------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a quantized model to a folder: what ``fourbit.convert`` writes, from memory.

    A model of transformers has its configuration saved too, and transformers with bitsandbytes
    loads the folder. The index is written last: before it, nothing is there that loads.

    Args:
        model: any module; its `Linear4bit` layers are written as they are, all else plain.
        folder: a new or empty folder.
        max_shard_bytes: largest size of one file.

    Raises:
        ValueError: if the model has adapters; they have files of their own.
        FileExistsError: if the folder holds a checkpoint.
    """
    if has_adapter(model):
        raise ValueError(
            "the model has adapters; save them with fourbit.save_adapter, "
            "or take them out with fourbit.remove_lora first"
        )
    layers = {
        path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    written: list[_Group] = []
    for name, tensor in _untied_state(model).items():
        path, _, leaf = name.rpartition(".")
        if path not in layers:
            written.append(_plain_group(name, tensor))
        elif leaf == "weight":
            written.append(_quantized_group(name, layers[path]))
        elif leaf == "bias":
            written.append(_plain_group(name, tensor))
    _write(folder, written, max_shard_bytes, _config_files(model, layers))


@dataclass(frozen=True)
class _Group:
    """Tensors of one file: names, dtypes and shapes, and how to get them when they are written."""

    entries: list[tuple[str, str, list[int]]]
    tensors: Callable[[], Iterator[Tensor]]


def _plain_group(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> _Group:
    def tensors() -> Iterator[Tensor]:
        yield tensor if dtype is None else tensor.to(dtype)

    return _Group([(name, _file_dtype(name, dtype or tensor.dtype), list(tensor.shape))], tensors)


def _quantized_group(name: str, layer: Linear4bit) -> _Group:
    quantized = layer.quantized()
    offset = quantized.nested_offset
    parts, state = _core.quantized_layout(
        name,
        codebook=quantized.codebook.core,
        block_size=quantized.block_size,
        dtype=str(quantized.dtype).removeprefix("torch."),
        shape=list(quantized.shape),
        nested_offset=None if offset is None else ops.float_values(offset.cpu()).item(),
    )

    def tensors() -> Iterator[Tensor]:
        for part in parts:
            yield _part(quantized, part["part"], state)

    return _Group([(part["name"], part["dtype"], part["shape"]) for part in parts], tensors)


def _part(quantized: QuantizedTensor, part: str, state: bytes) -> Tensor:
    if part == "quant_map":
        return torch.tensor(quantized.codebook.values)
    if part == "nested_quant_map":
        return torch.tensor(_core.Codebook.by_name("dynamic-signed").values)
    if part == "quant_state":
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)
    tensor: Tensor | None = getattr(quantized, part)
    assert tensor is not None, part
    return tensor


def _file_dtype(name: str, dtype: torch.dtype) -> str:
    try:
        return _FILE_DTYPES[dtype]
    except KeyError:
        raise TypeError(f"{name} is {dtype}, which the file format has no type for") from None


def _untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with tensors that share their memory under their first name alone."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is extra state of a module, which is not supported")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no data; load the model first")
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor
    return state


def _write(
    folder: str | os.PathLike[str],
    groups: list[_Group],
    max_shard_bytes: int,
    files: list[tuple[str, bytes]],
) -> None:
    writer = _core.CheckpointWriter(
        Path(folder),
        [group.entries for group in groups],
        max_shard_bytes=max_shard_bytes,
        files=files,
    )
    try:
        with torch.no_grad():
            for group in groups:
                for (name, _, _), tensor in zip(group.entries, group.tensors(), strict=True):
                    data = tensor.detach().cpu().contiguous().reshape(-1)
                    writer.write(name, data.view(torch.uint8))
        writer.finish()
    except BaseException:
        writer.discard()
        raise


def _config_files(
    model: nn.Module, layers: Mapping[str, Linear4bit]
) -> list[tuple[str, bytes]]:
    """``config.json`` and ``generation_config.json`` of a transformers model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return []
    text = _without_quantization(config.to_json_string())
    if layers:
        first = next(iter(layers.values()))
        skipped = [
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path not in layers
        ]
        text = _core.add_quantization_config(
            text,
            codebook=first.codebook.core,
            block_size=first.block_size,
            double_quant=first.double_quant,
            dtype=str(first.weight_dtype).removeprefix("torch."),
            skipped=skipped,
        )
    files = [("config.json", text.encode())]
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        files.append(("generation_config.json", generation.to_json_string().encode()))
    return files


def _without_quantization(config: str) -> str:
    fields = json.loads(config)
    fields.pop("quantization_config", None)
    return json.dumps(fields, indent=2) + "\n"


# --- load -----------------------------------------------------------------------------------------


def load(
    model: Model, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> Model:
    """Fill a model from a folder of ours or of bitsandbytes, in place, tensor by tensor.

    Linear layers whose weights are quantized in the folder become `Linear4bit`. Every tensor is
    compared with its checksum where the folder has one (all of ours do).

    Args:
        model: with the folder's names; it may be on the meta device.
        folder: of `save`, ``fourbit.convert`` or bitsandbytes; a plain safetensors folder works.
        device: where tensors go whose place in the model is on the meta device.

    Returns:
        The model.

    Raises:
        FileNotFoundError: without such a folder.
        CheckpointError: naming the file and the tensor that is damaged, missing, left over or of
            another shape. Names and shapes are checked before the model is touched.
    """
    reader = _core.CheckpointReader(Path(folder))
    stored = {entry["name"]: entry for entry in reader.tensors()}
    quantized = {entry["name"]: entry for entry in reader.quantized()}
    of_quantized = {part for entry in quantized.values() for part in entry["parts"].values()}
    plain = {name: entry for name, entry in stored.items() if name not in of_quantized}
    state = model.state_dict(keep_vars=True)
    _check_names(folder, model, state, quantized, plain)

    def read(name: str) -> Tensor:
        entry = stored[name]
        data = torch.empty(entry["bytes"], dtype=torch.uint8)
        reader.read_into(name, data)
        return data

    for name, entry in quantized.items():
        tensor = _read_quantized(entry, read)
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        place = layer.weight.device
        tensor = tensor.to(device if place.type == "meta" else place)
        if isinstance(layer, Linear4bit):
            layer.set_quantized(tensor)
        else:
            new = Linear4bit.from_quantized(tensor, bias=layer.bias)
            _replace_module(model, layer, new.train(layer.training))
    for name, entry in plain.items():
        tensor = read(name).view(_TORCH_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        target = state[name]
        place = torch.device(device) if target.is_meta else target.device
        _assign(model, target, tensor.to(device=place, dtype=target.dtype))
    return model


def _read_quantized(entry: Any, read: Callable[[str], Tensor]) -> QuantizedTensor:
    # All parts are read, so that all are compared with their checksums.
    parts = {part: read(name) for part, name in entry["parts"].items()}
    nested_offset = None
    if entry["double_quant"]:
        nested_offset = ops.float_bytes(torch.tensor([entry["nested_offset"]]))
    return QuantizedTensor(
        parts["packed"].reshape(-1, 1),
        parts["absmax"],
        parts.get("nested_absmax"),
        nested_offset,
        Codebook.from_core(entry["codebook"]),
        entry["block_size"],
        torch.Size(entry["shape"]),
        getattr(torch, entry["dtype"]),
    )


def _assign(model: nn.Module, target: Tensor, tensor: Tensor) -> None:
    if not target.is_meta:
        target.data = tensor
        return
    # A meta tensor cannot take data: a new one goes wherever the old one is, ties included.
    new = nn.Parameter(tensor, target.requires_grad) if isinstance(target, nn.Parameter) else tensor
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, held in slots.items():
                if held is target:
                    slots[name] = new  # type: ignore[assignment]


def _check_names(
    folder: str | os.PathLike[str],
    model: nn.Module,
    state: Mapping[str, Tensor],
    quantized: Mapping[str, Any],
    plain: Mapping[str, Any],
) -> None:
    """Every tensor of the folder has its place, and every place its tensor."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{os.fspath(folder)} does not fit the model: {what}")

    filled: set[int] = set()
    packed: set[str] = set()
    for name, entry in quantized.items():
        path = name.removesuffix(".weight")
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise refuse(f"the model has no layer {path}") from None
        if not isinstance(layer, nn.Linear):
            raise refuse(f"{path} is quantized, but a {type(layer).__name__} in the model")
        if [layer.out_features, layer.in_features] != list(entry["shape"]):
            raise refuse(
                f"{name} is {entry['shape']}, "
                f"and the layer {[layer.out_features, layer.in_features]}"
            )
        packed.update(f"{path}.{leaf}" for leaf in layer.state_dict() if leaf != "bias")
    for name, entry in plain.items():
        if name not in state:
            raise refuse(f"the model has no tensor {name}")
        if name in packed or state[name].dtype == torch.uint8 != _TORCH_DTYPES.get(entry["dtype"]):
            raise refuse(f"{name} is quantized in the model, but not in the folder")
        if list(state[name].shape) != list(entry["shape"]):
            raise refuse(f"{name} is {entry['shape']}, and {list(state[name].shape)} in the model")
        if entry["dtype"] not in _TORCH_DTYPES:
            raise refuse(f"{name} is {entry['dtype']}, which torch has no type for")
        filled.add(id(state[name]))
    missing = [
        name for name, tensor in state.items() if name not in packed and id(tensor) not in filled
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise refuse(f"it has no tensor {missing[0]}{more}")


# --- export ---------------------------------------------------------------------------------------


def export_merged(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a plain checkpoint with the adapters added to the weights they were trained on.

    Each weight is dequantized, the adapter added in float32, and the sum rounded once; nothing of
    the adapter is lost to 4 bits. Weights are made one at a time, and the model is not changed.

    Args:
        model: with adapters of ours, or without.
        folder: a new or empty folder.
        base: the folder whose tokenizer and other small files are copied; by default the one that
            the model was loaded from, where that is known.
        dtype: of all floating-point tensors; by default each weight has the dtype it had before it
            was quantized.
        max_shard_bytes: largest size of one file.

    Raises:
        FileExistsError: if the folder holds a checkpoint.
        FileNotFoundError: if `base` does not exist.
        ValueError: for a `dtype` that is not floating point.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; use bfloat16, float16 or float32")
    adapters = lora_modules(model)
    bases = {f"{path}.base_layer" for path in adapters}
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear4bit) and path not in bases
    }
    groups: list[_Group] = []
    for name, tensor in _untied_state(model).items():
        path, _, leaf = name.rpartition(".")
        if path in bases:
            path = path.removesuffix(".base_layer")
            if leaf == "weight":
                groups.append(_merged_group(f"{path}.weight", adapters[path], dtype))
            elif leaf == "bias":
                groups.append(_plain_group(f"{path}.bias", tensor, _cast(tensor, dtype)))
        elif any(path == p or path.startswith(f"{p}.") for p in adapters):
            continue
        elif path in layers and leaf.startswith("weight"):
            if leaf == "weight":
                groups.append(_dense_group(name, layers[path], dtype))
        else:
            groups.append(_plain_group(name, tensor, _cast(tensor, dtype)))
    _write(folder, groups, max_shard_bytes, _plain_files(model, base, dtype))


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    return dtype if tensor.is_floating_point() else None


def _merged_group(name: str, layer: LoraLinear, dtype: torch.dtype | None) -> _Group:
    base = layer.base_layer
    own = base.weight_dtype if isinstance(base, Linear4bit) else base.weight.dtype
    target = dtype or own

    def tensors() -> Iterator[Tensor]:
        yield merged_weight(layer).to(target)

    shape = [layer.out_features, layer.in_features]
    return _Group([(name, _file_dtype(name, target), shape)], tensors)


def _dense_group(name: str, layer: Linear4bit, dtype: torch.dtype | None) -> _Group:
    target = dtype or layer.weight_dtype

    def tensors() -> Iterator[Tensor]:
        yield layer.dequantize(target)

    shape = [layer.out_features, layer.in_features]
    return _Group([(name, _file_dtype(name, target), shape)], tensors)


def _plain_files(
    model: nn.Module, base: str | os.PathLike[str] | None, dtype: torch.dtype | None
) -> list[tuple[str, bytes]]:
    """The base's small files, with a configuration that knows nothing of quantization."""
    config: Any = getattr(model, "config", None)
    if base is None:
        known = Path(getattr(config, "_name_or_path", "") or "")
        base = known if (known / "config.json").is_file() else None
    files: dict[str, bytes] = {}
    if base is not None:
        folder = Path(base)
        files = {name: (folder / name).read_bytes() for name in _core.small_files(folder)}
        files["config.json"] = (folder / "config.json").read_bytes()
    elif hasattr(config, "to_json_string"):
        files = dict(_config_files(model, {}))
    if "config.json" in files:
        fields = json.loads(_without_quantization(files["config.json"].decode()))
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in fields:
                fields[key] = str(dtype).removeprefix("torch.")
        files["config.json"] = (json.dumps(fields, indent=2) + "\n").encode()
    return list(files.items())
