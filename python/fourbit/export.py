"""`export_merged`: a plain 16-bit checkpoint out of a 4-bit model and its adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit import _core
from fourbit._core import NonFiniteError
from fourbit.checkpoint import DEFAULT_MAX_SHARD_BYTES
from fourbit.linear import Linear4bit
from fourbit.lora import LoraLinear, lora_modules, merged_weight
from fourbit.model_io import (
    TensorGroup,
    config_files,
    plain_group,
    untied_state,
    was_untied,
    without_quantization,
    write_groups,
)
from fourbit.tensor_file import file_dtype

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def export_merged(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a plain checkpoint with the adapters added to the weights they were trained on.

    Each weight is dequantized, the adapter added in float32, and the sum rounded once; nothing of
    the adapter is lost to 4 bits. Weights are made one at a time, and the model is not changed.

    Args:
        model: with adapters of ours, or without.
        folder: a new or empty folder.
        base: the folder whose tokenizer and other small files are copied; by default the one that
            the model was loaded from, where that is known.
        tokenizer_from: a folder whose tokenizer takes the place of the base's: training may have
            given it another chat template, and saved it with the adapter.
        dtype: of all floating-point tensors; by default each weight has the dtype it had before it
            was quantized.
        max_shard_bytes: largest size of one file.

    Raises:
        FileExistsError: if the folder holds a checkpoint.
        FileNotFoundError: if `base` or `tokenizer_from` does not exist.
        ValueError: for a `dtype` that is not floating point, or a model that is sharded over
            processes.
        NonFiniteError: naming a weight that training has made NaN or infinite, or that does not
            fit `dtype`; nothing is there that loads.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; use bfloat16, float16 or float32")
    adapters = lora_modules(model)
    bases = {f"{path}.base_layer" for path in adapters}
    # Further names of layers that stand in several places are left out, as those of tensors are.
    adapter_paths = [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoraLinear)
    ]
    # With its adapter added, a weight is tied to no other any more.
    state = untied_state(model, apart={f"{path}.base_layer.weight" for path in adapter_paths})
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear4bit) and path not in bases
    }
    groups: list[TensorGroup] = []
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if path in bases:
            path = path.removesuffix(".base_layer")
            if leaf == "weight":
                groups.append(_merged_group(f"{path}.weight", adapters[path], dtype))
            elif leaf == "bias":
                groups.append(plain_group(f"{path}.bias", tensor, _cast(tensor, dtype)))
        elif any(path == p or path.startswith(f"{p}.") for p in adapter_paths):
            continue
        elif path in layers and leaf.startswith("weight"):
            if leaf == "weight":
                groups.append(_dense_group(name, layers[path], dtype))
        else:
            groups.append(plain_group(name, tensor, _cast(tensor, dtype)))
    write_groups(folder, groups, max_shard_bytes, _plain_files(model, base, tokenizer_from, dtype))


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    return dtype if tensor.is_floating_point() else None


def _merged_group(name: str, layer: LoraLinear, dtype: torch.dtype | None) -> TensorGroup:
    base = layer.base_layer
    own = base.weight_dtype if isinstance(base, Linear4bit) else base.weight.dtype
    target = dtype or own

    def tensors() -> Iterator[Tensor]:
        yield _finite(name, merged_weight(layer).to(target))

    shape = [layer.out_features, layer.in_features]
    return TensorGroup([(name, file_dtype(name, target), shape)], tensors)


def _finite(name: str, weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise NonFiniteError(
            f"{name} has NaN or infinity in {weight.dtype}: the training diverged, or the numbers "
            "do not fit the dtype"
        )
    return weight


def _dense_group(name: str, layer: Linear4bit, dtype: torch.dtype | None) -> TensorGroup:
    target = dtype or layer.weight_dtype

    def tensors() -> Iterator[Tensor]:
        yield _finite(name, layer.dequantize(target))

    shape = [layer.out_features, layer.in_features]
    return TensorGroup([(name, file_dtype(name, target), shape)], tensors)


def _plain_files(
    model: nn.Module,
    base: str | os.PathLike[str] | None,
    tokenizer_from: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
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
        files = dict(config_files(model, {}))
    if tokenizer_from is not None:
        own = _tokenizer_files(Path(tokenizer_from))
        files = {name: data for name, data in files.items() if name not in TOKENIZER_FILES} | own
    if "config.json" in files:
        fields = json.loads(without_quantization(files["config.json"].decode()))
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in fields:
                fields[key] = str(dtype).removeprefix("torch.")
        _follow_model(fields, model)
        files["config.json"] = (json.dumps(fields, indent=2) + "\n").encode()
    return list(files.items())


def _follow_model(fields: dict[str, Any], model: nn.Module) -> None:
    """Correct what training may have changed since the base's configuration was written."""
    config: Any = getattr(model, "config", None)
    get_text: Any = getattr(config, "get_text_config", None)
    if not callable(get_text):
        return
    text = fields.get("text_config")
    text = text if isinstance(text, dict) else fields
    vocabulary = getattr(get_text(), "vocab_size", None)
    if vocabulary is not None and "vocab_size" in text:
        text["vocab_size"] = vocabulary
    if was_untied(model):
        fields["tie_word_embeddings"] = text["tie_word_embeddings"] = False


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    files = {
        name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()
    }
    if not files:
        raise FileNotFoundError(f"{folder} holds no tokenizer")
    return files
