"""`export_merged`: a plain 16-bit checkpoint out of a 4-bit model and its adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fourbit import _core
from fourbit._core import NonFiniteError
from fourbit.checkpoint import DEFAULT_MAX_SHARD_BYTES
from fourbit.distributed import refuse_sharded
from fourbit.experts import experts_layouts, experts_weight, part_of
from fourbit.file_groups import TensorGroup, write_groups
from fourbit.integrations import is_of_transformers
from fourbit.linear import Linear4bit
from fourbit.lora import LoraExperts, LoraLayer, LoraLinear, merged_experts, merged_weight
from fourbit.lora.attach import has_peft_adapter
from fourbit.model_io import config_files, untied_state, was_untied, without_quantization
from fourbit.tensor_file import file_dtype

if TYPE_CHECKING:
    from fourbit.integrations.conversions import Conversions

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
    the adapter is lost to 4 bits. Weights are made one at a time, and the model is not changed. Of
    models of transformers the tensors have the names that their checkpoints have, which may hold
    the weights of experts one by one.

    Args:
        model: with adapters of ours, or of PEFT (the active ones are added), or without.
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
        ValueError: for a `dtype` that is not floating point, a model that is sharded over
            processes, or an adapter of PEFT that is not LoRA.
        NonFiniteError: naming a weight that training has made NaN or infinite, or that does not
            fit `dtype`; nothing is there that loads.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; use bfloat16, float16 or float32")
    refuse_sharded(model, "export the model")
    if has_peft_adapter(model):
        from fourbit.integrations.peft.export import base_model, peft_members

        model = base_model(model)
        members = peft_members(model)
    else:
        members = _members(model)
    table = _table(model)
    together = [[name] for name in members] if table is None else table.together(members)
    groups = [_group({name: members[name] for name in names}, dtype, table) for names in together]
    write_groups(folder, groups, max_shard_bytes, _plain_files(model, base, tokenizer_from, dtype))


@dataclass(frozen=True)
class Member:
    """One of the model's tensors, as it would be without adapters and in 16 bits.

    Attributes:
        dtype: its own.
        shape: its own.
        make: gives it in a dtype, rounded once.
        trained: whether it is a stored tensor no more: then it is looked through for NaN.
    """

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[torch.dtype], Tensor]
    trained: bool = True


def _members(model: nn.Module) -> dict[str, Member]:
    """What is written of a model, under the names it has there without adapters."""
    # Further names of layers that stand in several places are left out, as those of tensors are.
    everywhere = list(model.named_modules(remove_duplicate=False))
    adapter_paths = {path for path, module in everywhere if isinstance(module, LoraLayer)}
    # With its adapter added, a weight is tied to no other any more.
    state = untied_state(model, apart={f"{path}.base_layer.weight" for path in adapter_paths})
    modules = dict(model.named_modules())
    found: dict[str, Member] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        adapter = next((above for above in paths_above(name) if above in adapter_paths), None)
        if adapter is not None:
            inside = name.removeprefix(f"{adapter}.")
            if adapter not in modules or not inside.startswith("base_layer."):
                continue
            name = f"{adapter}.{inside.removeprefix('base_layer.')}"
        layer = modules.get(adapter or "")
        if isinstance(layer, LoraExperts) and owner is layer.base_layer and leaf in layer.names:
            found[name] = _merged_experts(layer, leaf)
        elif isinstance(layer, LoraLinear) and leaf == "weight":
            found[name] = _merged(layer)
        elif (member := frozen_member(owner, leaf, tensor)) is not None:
            found[name] = member
    return found


def frozen_member(owner: nn.Module | None, leaf: str, tensor: Tensor) -> Member | None:
    """A tensor that no adapter changes; None for one that is a part of another's quantized form.

    Args:
        owner: the module whose tensor it is.
        leaf: its name there.
        tensor: as it is stored.
    """
    if isinstance(owner, Linear4bit) and leaf.startswith("weight"):
        if leaf != "weight":
            return None
        return linear_member(owner, owner.dequantize)
    if owner is not None and (of := part_of(owner, leaf)) is not None:
        if of != leaf:
            return None
        weight = experts_weight(owner, leaf)
        return Member(weight.layout.dtype, weight.layout.shape, weight.dequantize)
    return Member(tensor.dtype, tensor.shape, tensor.to, trained=False)


def linear_member(layer: Linear4bit, make: Callable[[torch.dtype], Tensor]) -> Member:
    """The weight of a layer.

    Args:
        layer: in few bits.
        make: gives the weight [out_features, in_features] in a dtype.
    """
    shape = (layer.out_features, layer.in_features)
    return Member(
        layer.weight_dtype,
        torch.Size(shape[::-1] if layer.transposed_when_dense else shape),
        lambda dtype: layer.in_dense_files(make(dtype)),
    )


def paths_above(name: str) -> Iterator[str]:
    """The paths of the modules that hold a tensor, from the outside."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _merged(layer: LoraLinear) -> Member:
    base = layer.base_layer

    def make(dtype: torch.dtype) -> Tensor:
        return merged_weight(layer).to(dtype)

    if isinstance(base, Linear4bit):
        return linear_member(base, make)
    return Member(base.weight.dtype, base.weight.shape, make)


def _merged_experts(layer: LoraExperts, name: str) -> Member:
    layout = experts_layouts(layer.base_layer).get(name)
    if layout is None:
        weight: Tensor = getattr(layer.base_layer, name)
        own, shape = weight.dtype, weight.shape
    else:
        own, shape = layout.dtype, layout.shape
    return Member(own, shape, lambda dtype: merged_experts(layer, name).to(dtype))


def _group(
    members: Mapping[str, Member], dtype: torch.dtype | None, table: Conversions | None
) -> TensorGroup:
    """What a checkpoint holds of tensors that are written together, made when it is written."""

    def whole(name: str, member: Member) -> Tensor:
        tensor = member.make(_target(member, dtype))
        if member.trained and not tensor.isfinite().all():
            raise NonFiniteError(
                f"{name} has NaN or infinity in {tensor.dtype}: the training diverged, or the "
                "numbers do not fit the dtype"
            )
        return tensor

    def in_files(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if table is None:
            return tensors
        return table.to_files(tensors, {name: m.shape for name, m in members.items()})

    def tensors() -> Iterator[Tensor]:
        yield from in_files({n: whole(n, member) for n, member in members.items()}).values()

    empty = {
        name: torch.empty(member.shape, dtype=_target(member, dtype), device="meta")
        for name, member in members.items()
    }
    entries = [
        (name, file_dtype(name, tensor.dtype), list(tensor.shape))
        for name, tensor in in_files(empty).items()
    ]
    return TensorGroup(entries, tensors)


def _target(member: Member, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and member.dtype.is_floating_point else member.dtype


def _table(model: nn.Module) -> Conversions | None:
    """How checkpoints hold the tensors of a model of transformers; None for any other model."""
    if not is_of_transformers(model):
        return None
    from fourbit.integrations.conversions import Conversions

    return Conversions(model)


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
        files = dict(config_files(model))
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
