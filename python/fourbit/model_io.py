"""`save` and `load`: models and folders.

The files are those of ``fourbit.convert``; this module says which tensor of a model goes where.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fourbit import _core
from fourbit._core import CheckpointError
from fourbit.checkpoint import DEFAULT_MAX_SHARD_BYTES
from fourbit.codebook import Codebook
from fourbit.dense import features, is_linear
from fourbit.distributed import is_distributed, is_sharded
from fourbit.experts import experts_layouts, experts_weight, part_of
from fourbit.file_groups import (
    TensorGroup,
    converted_group,
    expert_groups,
    quantized_group,
    write_groups,
)
from fourbit.integrations import is_conv1d, is_of_transformers
from fourbit.linear import Linear4bit
from fourbit.lora.attach import has_adapter
from fourbit.model import compute_with_fourbit, replace_module
from fourbit.names_in_files import NamesInFiles
from fourbit.operands import float_bytes
from fourbit.quantized import QuantizedTensor
from fourbit.stored_experts import StoredExperts, numbered_groups
from fourbit.tensor_file import TORCH_DTYPES

Model = TypeVar("Model", bound=nn.Module)


# --- save -----------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a quantized model to a folder: what ``fourbit.convert`` writes, from memory.

    A model of transformers has its configuration saved too, its tensors have the names of its
    checkpoints, and transformers with bitsandbytes loads the folder if no experts are quantized.
    The index is written last: before it, nothing is there that loads.

    Every process calls this for a model that is sharded over processes (FSDP2). The first one puts
    tensor after tensor together and writes them, and none returns before all is written.

    Args:
        model: any module; its `Linear4bit` layers and its quantized experts are written as they
            are, all else plain.
        folder: a new or empty folder.
        max_shard_bytes: largest size of one file.

    Raises:
        ValueError: if the model has adapters; they have files of their own. For experts that are
            quantized in groups of which no checkpoint's names are known.
        FileExistsError: if the folder holds a checkpoint.
        RuntimeError: in the other processes, with what the first could not write.
    """
    if has_adapter(model):
        raise ValueError(
            "the model has adapters; save them with fourbit.save_adapter, "
            "or take them out with fourbit.remove_lora first"
        )
    modules = dict(model.named_modules())
    names = NamesInFiles(model)
    written: list[TensorGroup] = []
    plain: dict[str, Tensor] = {}
    for name, tensor in untied_state(model).items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path, model)
        whole = part_of(module, leaf)
        if isinstance(module, Linear4bit) and leaf != "bias":
            if leaf == "weight":
                written.append(quantized_group(names.of(name), module.quantized()))
        elif whole is None:
            plain[name] = tensor
        elif whole == leaf:
            weight = experts_weight(module, leaf)
            written += expert_groups(names.of_experts(name, weight.layout), weight)
    written += [
        converted_group({name: plain[name] for name in members}, names)
        for members in names.together(plain)
    ]
    files = config_files(model, quantized=True)
    write_groups(folder, written, max_shard_bytes, files, sharded=is_sharded(model))


def untied_state(model: nn.Module, *, apart: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict, with tensors that share their memory under their first name alone.

    Names in `apart` are there whatever they share, and the others as if these were not.

    Raises:
        TypeError: for extra state of a module.
        ValueError: for a tensor without data.
    """
    state: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is extra state of a module, which is not supported")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no data; load the model first")
        if name in apart:
            state[name] = tensor
            continue
        key: tuple[Any, ...]
        if is_distributed(tensor):
            # All shards claim the same address; a tied one is one object.
            key = (id(tensor),)
        else:
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor
    return state


def config_files(model: nn.Module, *, quantized: bool = False) -> list[tuple[str, bytes]]:
    """``config.json`` and ``generation_config.json`` of a transformers model.

    Args:
        model: any module; others have no such files.
        quantized: whether to say how its weights are quantized.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return []
    text = without_quantization(config.to_json_string())
    if was_untied(model):
        text = json.dumps({**json.loads(text), "tie_word_embeddings": False}, indent=2) + "\n"
    if quantized:
        text = _with_quantization(text, model)
    files = [("config.json", text.encode())]
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        files.append(("generation_config.json", generation.to_json_string().encode()))
    return files


def _with_quantization(text: str, model: nn.Module) -> str:
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    experts = [layout for module in model.modules() for layout in experts_layouts(module).values()]
    if not layers and not experts:
        return text
    first = layers[0] if layers else experts[0]
    dtype = layers[0].weight_dtype if layers else experts[0].dtype
    return _core.add_quantization_config(
        text,
        codebook=first.codebook.core,
        block_size=first.block_size,
        double_quant=first.double_quant,
        dtype=str(dtype).removeprefix("torch."),
        skipped=[
            path
            for path, module in model.named_modules()
            if is_linear(module) and not isinstance(module, Linear4bit)
        ],
        experts=bool(experts),
    )


def was_untied(model: nn.Module) -> bool:
    """Whether head and input embeddings, once one weight, have become two."""
    config: Any = getattr(model, "config", None)
    get_head: Any = getattr(model, "get_output_embeddings", None)
    get_input: Any = getattr(model, "get_input_embeddings", None)
    head, embeddings = (get() if callable(get) else None for get in (get_head, get_input))
    if not getattr(config, "tie_word_embeddings", False) or head is None or embeddings is None:
        return False
    adapted = any(hasattr(part, "base_layer") for part in (head, embeddings))
    return adapted or head.weight is not embeddings.weight


def without_quantization(config: str) -> str:
    """The text of a ``config.json`` less its ``quantization_config``."""
    fields = json.loads(config)
    fields.pop("quantization_config", None)
    return json.dumps(fields, indent=2) + "\n"


# --- load -----------------------------------------------------------------------------------------


Made: TypeAlias = "tuple[list[str], Callable[[list[Tensor]], dict[str, Tensor]]]"
"""Names of stored tensors, and what makes tensors of the model, by name, of them."""


@dataclass(frozen=True)
class Arrangement:
    """Where the tensors of a folder go in a model.

    Attributes:
        renamed: the names that quantized weights have in the model, where not their own.
        made: what tensors of the model are made of some of the others.
        experts: for 3-D weights of experts, the quantized weights that make them up, in order.
    """

    renamed: Mapping[str, str]
    made: Sequence[Made]
    experts: Mapping[str, Sequence[str]]


def _arrange(
    model: nn.Module, quantized: Mapping[str, Any], plain: Mapping[str, Any]
) -> Arrangement:
    """Where things go: by their names, or as transformers' table says."""
    if is_of_transformers(model):
        from fourbit.integrations.transformers.arrange import arrange

        return arrange(
            model,
            {name: entry["shape"] for name, entry in quantized.items()},
            {name: entry["shape"] for name, entry in plain.items()},
        )
    return Arrangement({}, (), numbered_groups(model, quantized))


def load(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
) -> Model:
    """Fill a model from a folder of ours or of bitsandbytes, in place, tensor by tensor.

    Linear layers whose weights are quantized in the folder become `Linear4bit`, and 3-D weights of
    experts become those of `fourbit.experts`. Every tensor is compared with its checksum where the
    folder has one (all of ours do).

    Args:
        model: with the folder's names, or of transformers; it may be on the meta device.
        folder: of `save`, ``fourbit.convert`` or bitsandbytes; a plain safetensors folder works.
        device: where tensors go whose place in the model is on the meta device.

    Returns:
        The model.

    Raises:
        FileNotFoundError: without such a folder.
        CheckpointError: naming the file and the tensor that is damaged, missing, left over or of
            another shape. Names and shapes are checked before the model is touched.
        ValueError: for a buffer on the meta device that no file holds: it is computed when the
            model is made.
    """
    reader = _core.CheckpointReader(Path(folder))
    stored = {entry["name"]: entry for entry in reader.tensors()}
    quantized = {entry["name"]: entry for entry in reader.quantized()}
    of_quantized = {part for entry in quantized.values() for part in entry["parts"].values()}
    plain = {name: entry for name, entry in stored.items() if name not in of_quantized}
    state = model.state_dict(keep_vars=True)
    of_made: set[str] = set()
    arrangement = _arrange(model, quantized, plain)
    of_experts = {
        target: [quantized.pop(name) for name in names]
        for target, names in arrangement.experts.items()
    }
    places = arrangement.renamed
    quantized = {places.get(name, name): entry for name, entry in quantized.items()}
    # What they become is known without their data.
    for names, make in arrangement.made:
        entries = [plain.pop(name) for name in names]
        meta = [torch.empty(e["shape"], dtype=_torch_dtype(e), device="meta") for e in entries]
        for name, whole in make(meta).items():
            plain[name] = {**entries[0], "shape": list(whole.shape)}
            of_made.add(name)
    experts = _check_names(folder, model, state, quantized, plain, of_experts)
    _check_buffers(model, state)

    def read(name: str) -> Tensor:
        entry = stored[name]
        data = torch.empty(entry["bytes"], dtype=torch.uint8)
        reader.read_into(name, data)
        return data

    def fill(name: str, data: Tensor) -> None:
        target = state[name]
        place = torch.device(device) if target.is_meta else target.device
        _assign(model, target, data.to(device=place, dtype=target.dtype))

    for name, entry in quantized.items():
        tensor = read_quantized(entry, read)
        path = name.removesuffix(".weight")
        layer: Any = model.get_submodule(path)
        tensor = tensor.to(device if layer.weight.is_meta else layer.weight.device)
        if isinstance(layer, Linear4bit):
            layer.set_quantized(tensor)
        else:
            new = Linear4bit.from_quantized(tensor, bias=layer.bias)
            new.transposed_when_dense = is_conv1d(layer)
            replace_module(model, layer, new.train(layer.training))

    for weight in experts:
        weight.fill(lambda entry: read_quantized(entry, read), device)
        if is_of_transformers(model):
            compute_with_fourbit(weight.module)

    def read_plain(name: str) -> Tensor:
        return read(name).view(_torch_dtype(stored[name])).reshape(stored[name]["shape"])

    for name in (name for name in plain if name not in of_made):
        fill(name, read_plain(name))
    for names, make in arrangement.made:
        for name, whole in make([read_plain(name) for name in names]).items():
            fill(name, whole)
    return model


def _torch_dtype(entry: Any) -> torch.dtype:
    try:
        return TORCH_DTYPES[entry["dtype"]]
    except KeyError:
        raise CheckpointError(
            f"{entry['name']} is {entry['dtype']}, which torch has no type for"
        ) from None


def read_quantized(entry: Any, read: Callable[[str], Tensor]) -> QuantizedTensor:
    """A quantized weight of a folder.

    Args:
        entry: what the folder's reader says of it.
        read: gives the bytes of a stored tensor by its name.
    """
    # All parts are read, so that all are compared with their checksums.
    parts = {part: read(name) for part, name in entry["parts"].items()}
    nested_offset = None
    if entry["double_quant"]:
        nested_offset = float_bytes(torch.tensor([entry["nested_offset"]], dtype=torch.float32))
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
    of_experts: Mapping[str, list[Any]],
) -> list[StoredExperts]:
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
        if not is_linear(layer):
            raise refuse(f"{path} is quantized, but a {type(layer).__name__} in the model")
        shape = [*features(layer)][::-1]
        if shape != list(entry["shape"]):
            raise refuse(f"{name} is {entry['shape']}, and the layer {shape}")
        for leaf, tensor in layer.state_dict(keep_vars=True).items():
            if leaf != "bias":
                packed.add(f"{path}.{leaf}")
                filled.add(id(tensor))
    experts: list[StoredExperts] = []
    for name, entries in of_experts.items():
        try:
            experts.append(StoredExperts.of(model, name, entries))
        except ValueError as error:
            raise refuse(str(error)) from None
        for part in experts[-1].part_names():
            packed.add(part)
            filled.add(id(state.get(part)))
    for name, entry in plain.items():
        if name not in state:
            raise refuse(f"the model has no tensor {name}")
        if name in packed or state[name].dtype == torch.uint8 != TORCH_DTYPES.get(entry["dtype"]):
            raise refuse(f"{name} is quantized in the model, but not in the folder")
        if list(state[name].shape) != list(entry["shape"]):
            raise refuse(f"{name} is {entry['shape']}, and {list(state[name].shape)} in the model")
        if entry["dtype"] not in TORCH_DTYPES:
            raise refuse(f"{name} is {entry['dtype']}, which torch has no type for")
        filled.add(id(state[name]))
    # By identity: a tied or shared tensor is filled under any of its names.
    missing = [name for name, tensor in state.items() if id(tensor) not in filled]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise refuse(f"it has no tensor {missing[0]}{more}")
    return experts


def _check_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Buffers that are not in state dicts must have their data already."""
    stored = {id(tensor) for tensor in state.values()}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in stored:
            raise ValueError(
                f"the buffer {name} is on the meta device, and no file holds it; make the model "
                "with accelerate.init_empty_weights(include_buffers=False)"
            )
