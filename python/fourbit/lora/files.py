"""`save_adapter` and `load_adapter`: adapters as PEFT writes and reads them.

A folder with ``adapter_model.safetensors`` and ``adapter_config.json``. Keys are those of PEFT:
``base_model.model.<path>.lora_A.weight`` [r, in_features], ``.lora_B.weight`` [out_features, r],
``.lora_magnitude_vector`` [out_features], and the plain names of `modules_to_save`;
`fourbit.lora.experts_files` says how experts' adapters are laid out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fourbit._core import CheckpointError, NonFiniteError
from fourbit.distributed import is_sharded, write_once
from fourbit.files import sync_folder, write_aside
from fourbit.lora.attach import (
    LoraLayer,
    adapter_state,
    build_experts,
    build_layers,
    find_saved,
    install,
    lora_modules,
    refuse_adapters,
)
from fourbit.lora.config import CONFIG_NAME, AdapterConfig, TargetRule, named, read_config
from fourbit.lora.experts import LoraExperts
from fourbit.lora.experts_files import check_experts, fill_experts, take_experts, tensors_of
from fourbit.lora.layer import LoraLinear
from fourbit.lora.targets import (
    ALL_LINEAR,
    find_experts,
    find_targets,
    linear_layers,
    shortest_names,
)
from fourbit.tensor_file import TensorFile

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# In the metadata of the tensors, where `AdapterConfig.to_peft` cannot say it.
_DROPOUT = "lora_dropout"


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write the model's adapter as PEFT does; other tools read it on the 16-bit base.

    Files are written under temporary names, flushed to the disk and renamed, the config last: what
    a killed process leaves behind is the adapter that was there before, or does not load.

    Every process calls this for a model that is sharded over processes (FSDP2): the first one
    writes, and none returns before the files are there. Under DDP the first alone calls it.

    Args:
        model: with an adapter; merged or not makes no difference.
        directory: made if it does not exist; an adapter in it is replaced.
        base_model_name_or_path: what the config names as the base; by default what the model says
            it was loaded from.

    Raises:
        ValueError: if the model has no adapter.
        NonFiniteError: naming the parameter that training has made NaN or infinite.
        OSError: if the folder cannot be written.
        RuntimeError: in the other processes, with what the first could not write.
    """
    state = adapter_state(model)
    parts = _adapter_tensors(model)
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(model, "name_or_path", None) or None
    causal = type(model).__name__.endswith("ForCausalLM")
    # Whole paths: PEFT takes a name for the end of any other, "norm" for that of "input_layernorm".
    fields = replace(state.config, modules_to_save=tuple(state.saved)).to_peft(
        base_model_name_or_path=base_model_name_or_path,
        task_type="CAUSAL_LM" if causal else None,
    )
    config = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
    folder = Path(directory)
    metadata = {"format": "pt"}
    if fields["lora_dropout"] != state.config.lora_dropout:
        metadata[_DROPOUT] = repr(state.config.lora_dropout)

    def write(whole: Iterator[Tensor]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in zip(parts, whole, strict=True):
            key = _PREFIX + name
            # In memory of its own, for a file that holds it alone.
            tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
            _check_finite(tensors[key], key, "the model")
        folder.mkdir(parents=True, exist_ok=True)
        _replace_files(folder, safetensors.torch.save(tensors, metadata=metadata), config)

    write_once(parts.values(), write, sharded=is_sharded(model))


def load_adapter(
    model: Model, directory: str | os.PathLike[str], *, trainable: bool = True
) -> Model:
    """Put an adapter from a folder on a model, in place, and freeze everything else.

    Folders of `save_adapter`, of PEFT and of Trainer checkpoints with PEFT adapters load alike.
    Adapters in 16 bits are kept in float32.

    Args:
        model: the base, dense or in 4 bits, without an adapter.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: whether to go on training it.

    Returns:
        The model. It is unchanged if anything is wrong.

    Raises:
        FileNotFoundError: if the folder holds no adapter, or an incomplete one.
        CheckpointError: naming the field of the config that is not supported, or the tensor that
            is missing, too many, of another shape (the adapter of another base) or broken.
        NonFiniteError: naming a tensor with NaN or infinity.
        ValueError: if the model has an adapter already.
    """
    refuse_adapters(model)
    folder = Path(directory)
    config_path, weights_path = _find_files(folder)
    config, rule = read_config(config_path)
    if any(part.is_meta for part in model.parameters()):
        raise ValueError("the model is on the meta device; load its weights before the adapter's")
    tensors, config = _read_tensors(weights_path, config)
    contents = _sort(tensors, model, config, weights_path)
    experts = _check_experts(model, config, rule, contents, weights_path)
    targets = _check_targets(model, rule, contents, weights_path)
    config = _named_config(model, config, rule, contents)
    _check_shapes(config, targets, contents, weights_path)
    saved_states = _check_saved(model, config, contents, weights_path)
    generator = torch.Generator()
    linears = build_layers(targets, config, generator=generator)
    for path, layer in linears.items():
        _fill(layer, contents.layers[path])
    mixtures = build_experts(model, experts, config, generator=generator)
    for path, mixture in mixtures.items():
        fill_experts(mixture, contents.experts[path])
    layers: dict[str, LoraLayer] = {**linears, **mixtures}
    install(model, config, layers, trainable=trainable)
    for path, tensors in saved_states.items():
        model.get_submodule(path).load_state_dict(tensors)
    return model


# --- writing ------------------------------------------------------------------------------------


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_modules(model).items():
        if isinstance(layer, LoraExperts):
            tensors.update(tensors_of(path, layer))
            continue
        own = layer.state_dict()
        tensors.update({f"{path}.{part}": own[part] for part in _PARTS if part in own})
    for path in adapter_state(model).saved:
        own = model.get_submodule(path).state_dict()
        tensors.update({f"{path}.{name}": tensor for name, tensor in own.items()})
    return tensors


def _replace_files(folder: Path, weights: bytes, config: bytes) -> None:
    asides: list[Path] = []
    try:
        asides.append(write_aside(folder / WEIGHTS_NAME, lambda file: file.write(weights)))
        old_config = folder / CONFIG_NAME
        if not _holds(old_config, config):
            asides.append(write_aside(old_config, lambda file: file.write(config)))
            # New weights under the old config would load as something that nobody trained.
            old_config.unlink(missing_ok=True)
            sync_folder(folder)
        for aside, name in zip(asides, (WEIGHTS_NAME, CONFIG_NAME), strict=False):
            aside.replace(folder / name)
            sync_folder(folder)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except FileNotFoundError:
        return False


# --- reading ------------------------------------------------------------------------------------


@dataclass
class _Contents:
    """An adapter file by what its tensors are for: ``{path: {part or name: tensor}}``.

    Those of experts: ``{path: {name of the weight: {part: tensor}}}``.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    experts: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def _find_files(folder: Path) -> tuple[Path, Path]:
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if config.is_file() and weights.is_file():
        return config, weights
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of an adapter")
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run code and is never read; "
            "save the adapter again as safetensors"
        )
    missing = CONFIG_NAME if weights.is_file() else WEIGHTS_NAME
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; there are adapters in its folders {', '.join(found[:4])}" if found else ""
    raise FileNotFoundError(f"{folder} holds no complete adapter: {missing} is missing{hint}")


def _read_tensors(path: Path, config: AdapterConfig) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The tensors, and the config with what is said beside them."""
    # Stricter than the reader below, which lets a key stand twice.
    with TensorFile(path) as file:
        dropout = file.metadata.get(_DROPOUT)
    if dropout is not None:
        try:
            config = replace(config, lora_dropout=float(dropout))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; adapters are floating point")
        _check_finite(tensor, name, str(path))
    return tensors, config


def _sort(
    tensors: Mapping[str, Tensor], model: nn.Module, config: AdapterConfig, path: Path
) -> _Contents:
    contents = _Contents()
    modules = dict(model.named_modules())
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX).replace("_orig_mod.", "")
        if name.endswith(".lora_magnitude_vector.weight"):
            name = name.removesuffix(".weight")
        part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
        if part is not None:
            contents.layers.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
            continue
        if ".lora_" in name:
            raise CheckpointError(
                f"{path}: {key} is not supported; only adapters of linear layers are"
            )
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            _check_same_base(key, tensor, modules.get(layer), path)
            continue
        owner = _owner(name, modules, config)
        if owner is None:
            raise CheckpointError(f"{path}: {key} names nothing that this model has")
        contents.saved.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = tensor
    return contents


def _owner(name: str, modules: Mapping[str, nn.Module], config: AdapterConfig) -> str | None:
    """The module that a tensor replaces: one of `modules_to_save`, else its direct owner.

    PEFT saves embeddings along with an adapter when the vocabulary has grown, and says so nowhere.
    """
    parts = name.split(".")
    owners = [".".join(parts[:count]) for count in range(1, len(parts))]
    for owner in owners:
        if owner in modules and named(config.modules_to_save, owner):
            return owner
    return owners[-1] if owners and owners[-1] in modules else None


def _check_same_base(key: str, tensor: Tensor, layer: nn.Module | None, path: Path) -> None:
    """PEFT saves the frozen weight of an output layer along with its adapter."""
    weight = getattr(layer, "weight", None)
    same = (
        isinstance(weight, Tensor)
        and weight.shape == tensor.shape
        and torch.equal(weight.detach().cpu(), tensor.to(weight.dtype))
    )
    if not same:
        raise CheckpointError(f"{path}: {key} differs from the model: an adapter for another base")


def _check_experts(
    model: nn.Module, config: AdapterConfig, rule: TargetRule, contents: _Contents, path: Path
) -> dict[str, tuple[str, ...]]:
    """The weights of experts that have adapters; their tensors move to ``contents.experts``."""
    try:
        experts = find_experts(model, rule)
    except ValueError as error:
        raise CheckpointError(f"{path.with_name(CONFIG_NAME)}: {error}") from None
    for name, weights in experts.items():
        contents.experts[name] = take_experts(contents.layers, name, weights)
        check_experts(
            model.get_submodule(name), name, contents.experts[name], config, path, prefix=_PREFIX
        )
    return experts


def _check_targets(
    model: nn.Module, rule: TargetRule, contents: _Contents, path: Path
) -> dict[str, nn.Linear]:
    linear = linear_layers(model)
    for name in contents.layers:
        if name not in linear:
            raise CheckpointError(
                f"{path}: the model has no linear layer {name}: an adapter for another base"
            )
    for name, parts in contents.layers.items():
        for part in ("lora_A.weight", "lora_B.weight"):
            if part not in parts:
                raise CheckpointError(f"{path}: the tensor {_PREFIX}{name}.{part} is missing")
    try:
        expected = find_targets(model, rule)
    except ValueError as error:
        raise CheckpointError(f"{path.with_name(CONFIG_NAME)}: {error}") from None
    for name in expected:
        if name not in contents.layers:
            raise CheckpointError(
                f"{path}: the tensor {_PREFIX}{name}.lora_A.weight is missing, though the config's "
                "target_modules name the layer"
            )
    for name in contents.layers:
        if name not in expected:
            raise CheckpointError(
                f"{path}: {_PREFIX}{name}.lora_A.weight is not among the config's target_modules"
            )
    return expected


def _named_config(
    model: nn.Module, config: AdapterConfig, rule: TargetRule, contents: _Contents
) -> AdapterConfig:
    """The config with targets and saved modules as `save_adapter` will write them."""
    if rule.limited or rule.target_modules == ALL_LINEAR:
        config = replace(config, target_modules=shortest_names(contents.layers, model))
    unlisted = [path for path in contents.saved if not named(config.modules_to_save, path)]
    return replace(config, modules_to_save=(*config.modules_to_save, *unlisted))


def _check_shapes(
    config: AdapterConfig, targets: Mapping[str, nn.Linear], contents: _Contents, path: Path
) -> None:
    for name, layer in targets.items():
        rank = config.rank(name)
        expected: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (rank, layer.in_features),
            "lora_B.weight": (layer.out_features, rank),
        }
        if config.use_dora:
            expected["lora_magnitude_vector"] = (layer.out_features,)
        parts = contents.layers[name]
        for part in (*expected, *parts):
            key = f"{_PREFIX}{name}.{part}"
            if part not in parts:
                raise CheckpointError(f"{path}: the tensor {key} is missing")
            if part not in expected:
                raise CheckpointError(f"{path}: {key} is there, but the config's use_dora is false")
            if tuple(parts[part].shape) != expected[part]:
                raise CheckpointError(
                    f"{path}: {key} is {tuple(parts[part].shape)}, not {expected[part]}: "
                    "an adapter for another base, or another r"
                )


def _check_saved(
    model: nn.Module, config: AdapterConfig, contents: _Contents, path: Path
) -> dict[str, dict[str, Tensor]]:
    try:
        modules = find_saved(model, config)
    except ValueError as error:
        raise CheckpointError(f"{path.with_name(CONFIG_NAME)}: {error}") from None
    for owner, module in modules.items():
        for layer in (*contents.layers, *contents.experts):
            if f"{layer}.".startswith(f"{owner}."):
                raise CheckpointError(
                    f"{path}: {layer} has an adapter, and {owner} is also there as a whole"
                )
        tensors, expected = contents.saved.get(owner, {}), module.state_dict()
        for name in (*expected, *tensors):
            key = f"{_PREFIX}{owner}.{name}"
            if name not in tensors:
                raise CheckpointError(f"{path}: the tensor {key} is missing")
            if name not in expected:
                raise CheckpointError(f"{path}: {key} names nothing that this model has")
            if tensors[name].shape != expected[name].shape:
                raise CheckpointError(
                    f"{path}: {key} is {tuple(tensors[name].shape)}, not "
                    f"{tuple(expected[name].shape)}: an adapter for another base"
                )
    return {owner: contents.saved[owner] for owner in modules}


def _fill(layer: LoraLinear, parts: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        layer.lora_A.weight.copy_(parts["lora_A.weight"])
        layer.lora_B.weight.copy_(parts["lora_B.weight"])
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.copy_(parts["lora_magnitude_vector"])


def _check_finite(tensor: Tensor, name: str, where: str) -> None:
    if not tensor.isfinite().all():
        raise NonFiniteError(f"{where}: {name} has NaN or infinity")
