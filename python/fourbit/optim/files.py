"""`save_optimizer` and `load_optimizer`: the state of an optimizer in one safetensors file.

Tensors are named ``state.<parameter>.<field>``: the parameter by its name where all parameter
groups name theirs, else by its index in the state dict; the fields are those of `state`. The
header's metadata holds under ``fourbit.optimizer`` a JSON object:

===================  ===============================================================================
``version``          1; readers refuse another
``param_groups``     those of the state dict. A list stands for a tuple, ``{"list": [...]}`` for a
                     list, and ``{"tensor": NAME}`` for an option that is a tensor of the file
``without_state``    indices of parameters that have not been stepped yet
``skipped_updates``  the optimizer's count
===================  ===============================================================================

and a CRC-32 of it and of each tensor under ``fourbit.crc32.<name>``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit._core import CheckpointError
from fourbit.distributed import is_distributed
from fourbit.files import replace_file
from fourbit.optim.adamw import PagedAdamW
from fourbit.tensor_file import TensorFile, strict_json, write_tensors

FORMAT_VERSION = 1
_OPTIONS = "fourbit.optimizer"
# Longer names of parameters are not used: the header has a name a dozen times.
_MAX_LABEL_BYTES = 1000
# One number, of any type.
_MAX_OPTION_BYTES = 8
_LISTS = ("params", "param_names")


def save_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]) -> None:
    """Write an optimizer's state and options, exactly.

    The file is written under a temporary name, flushed to the disk and renamed: a killed process
    leaves the file that was there before. Tensors are written one after the other, from whatever
    device they are on; of those on a GPU some MiB at a time are copied.

    Args:
        optimizer: a `PagedAdamW` of plain parameters, or accelerate's wrapper of one.
        path: of the file; an older one is replaced. Its folder must exist.

    Raises:
        ValueError: for sharded state (FSDP2), and for an option or an entry of the state dict that
            is neither a tensor nor JSON's.
        TypeError: for another optimizer.
        NonFiniteError: naming state that holds NaN or infinity.
        OSError: if the file cannot be written.
    """
    optimizer = unwrapped(optimizer)
    state_dict = optimizer.state_dict()
    states: dict[Any, Any] = state_dict["state"]
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    labels = _labels(groups)
    _refuse_strangers(set(state_dict) - {"state", "param_groups"} | set(states) - set(labels))
    tensors: dict[str, Tensor] = {}
    for index, state in states.items():
        for field, value in state.items():
            name = f"state.{labels[index]}.{field}"
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
            if is_distributed(value):
                raise ValueError(
                    f"{name} is sharded over processes (FSDP2); save the optimizer with "
                    "torch.distributed.checkpoint"
                )
            tensors[name] = value
    options = {
        "version": FORMAT_VERSION,
        "param_groups": [_encoded(group, at, tensors) for at, group in enumerate(groups)],
        "without_state": [index for index in labels if not states.get(index)],
        "skipped_updates": optimizer.skipped_updates,
    }
    metadata = {_OPTIONS: json.dumps(options, ensure_ascii=False)}
    # A link stays one: the file it names is replaced.
    replace_file(
        Path(os.path.realpath(path)),
        lambda file: write_tensors(file, tensors, metadata),
    )


def load_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]) -> None:
    """Go on from a file of `save_optimizer`, in the same bits.

    As with ``load_state_dict``, the options come from the file, `state_bits` and the learning rate
    included, and parameters are matched by their order; where the file and the optimizer both name
    them, the names must agree. Any pager and device will do. State is read tensor by tensor.

    Args:
        optimizer: a `PagedAdamW`, wrapped or not, made with the same parameters in the same groups.
        path: of the file.

    Raises:
        FileNotFoundError: without such a file.
        TypeError: for another optimizer.
        CheckpointError: naming the file and the tensor or option that is damaged, missing, unknown,
            or of another shape. The optimizer is as it was then.
    """
    optimizer = unwrapped(optimizer)
    with TensorFile(path) as file:
        options = _options(file)
        try:
            groups = [_decoded(group, file) for group in options["param_groups"]]
        except RecursionError:
            raise CheckpointError(f"{file.path}: an option is nested too deeply") from None
        labels = _labels(groups)
        _check_parameters(optimizer, groups, file)
        states = _stored_states(file, labels, options["without_state"])
        _check_sizes(optimizer, groups, states)
        try:
            optimizer.load_state_dict({"state": states, "param_groups": groups})
        except CheckpointError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{file.path}: {error}") from error
    optimizer.skipped_updates = options["skipped_updates"]


def unwrapped(optimizer: torch.optim.Optimizer) -> PagedAdamW:
    """The optimizer itself, where accelerate's ``prepare`` has wrapped it.

    Raises:
        TypeError: if it is another optimizer.
    """
    own = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(own, PagedAdamW):
        raise TypeError(f"the optimizer is a {type(own).__name__}, not a PagedAdamW")
    return own


def _labels(groups: list[dict[str, Any]]) -> dict[int, str]:
    """What stands for each parameter in the names of tensors, by index."""
    indices = [index for group in groups for index in group["params"]]
    names = [name for group in groups for name in group.get("param_names") or ()]
    if (
        len(names) == len(indices)
        and all(_is_label(name) for name in names)
        and len(set(names)) == len(names)
    ):
        return dict(zip(indices, names, strict=True))
    return {index: str(index) for index in indices}


def _is_label(name: object) -> bool:
    """Whether a parameter's name may be part of a tensor's."""
    if not isinstance(name, str) or not name or not name.isprintable():
        return False
    return len(name.encode()) <= _MAX_LABEL_BYTES


# --- writing --------------------------------------------------------------------------------------


def _refuse_strangers(keys: set[Any]) -> None:
    for key in sorted(keys, key=str):
        raise ValueError(
            f"the state dict has an entry {key!r} (of a hook?), which the file has no place for; "
            "save that apart"
        )


def _encoded(group: Mapping[str, Any], at: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A parameter group as JSON; its tensors go to `tensors`."""
    encoded: dict[str, Any] = {}
    for option, value in group.items():
        if isinstance(value, Tensor):
            name = f"param_groups.{at}.{option}"
            if value.nbytes > _MAX_OPTION_BYTES:
                raise ValueError(f"the option {option} is a tensor of {value.numel()} elements")
            tensors[name] = value
            encoded[option] = {"tensor": name}
        elif option in _LISTS:
            encoded[option] = list(value)
        else:
            encoded[option] = _json_value(value, option)
    return encoded


def _json_value(value: Any, option: str) -> Any:
    if isinstance(value, tuple):
        return [_json_value(item, option) for item in value]
    if isinstance(value, list):
        return {"list": [_json_value(item, option) for item in value]}
    try:
        if value is None or isinstance(value, bool | int | float | str):
            json.dumps(value, allow_nan=False)
            return value
    except ValueError:
        raise ValueError(f"the option {option} is {value}, which JSON has no number for") from None
    raise ValueError(
        f"the option {option} is a {type(value).__name__}, which the file has no place for"
    )


# --- reading --------------------------------------------------------------------------------------


def _options(file: TensorFile) -> dict[str, Any]:
    """The JSON object of the header, its entries checked for their types."""
    try:
        options = strict_json(file.string(_OPTIONS))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: {_OPTIONS} is broken: {error}") from None
    version = options.get("version") if isinstance(options, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file.path} is of version {version!r} and this fourbit reads {FORMAT_VERSION}; "
            "load it with the one that wrote it"
        )
    groups, bare = options.get("param_groups"), options.get("without_state")
    good = (
        isinstance(groups, list)
        and all(isinstance(group, dict) and _are_indices(group.get("params")) for group in groups)
        and all(
            _are_strings(group["param_names"]) and len(group["param_names"]) == len(group["params"])
            for group in groups
            if "param_names" in group
        )
        and _are_indices(bare)
        and _are_indices([options.get("skipped_updates")])
    )
    if not good:
        raise CheckpointError(f"{file.path}: {_OPTIONS} is not what is written there")
    return dict(options)


def _are_indices(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _decoded(group: dict[str, Any], file: TensorFile) -> dict[str, Any]:
    """A parameter group of JSON, with its tensors."""
    decoded = {}
    for option, value in group.items():
        if isinstance(value, dict) and value.keys() == {"tensor"}:
            name = value["tensor"]
            if not isinstance(name, str) or name not in file.tensors:
                raise CheckpointError(f"{file.path}: the tensor {name!r} is missing")
            if file.tensors[name].size_bytes > _MAX_OPTION_BYTES:
                raise CheckpointError(f"{file.path}: {name} is no option: it has many elements")
            decoded[option] = file.read(name)
        elif option in _LISTS:
            decoded[option] = value
        else:
            decoded[option] = _python_value(value)
    return decoded


def _python_value(value: Any) -> Any:
    """A value as it was before `_json_value`; RecursionError where that cannot have written it."""
    if isinstance(value, list):
        return tuple(_python_value(item) for item in value)
    if isinstance(value, dict) and isinstance(value.get("list"), list):
        return [_python_value(item) for item in value["list"]]
    return value


def _check_parameters(
    optimizer: PagedAdamW, groups: list[dict[str, Any]], file: TensorFile
) -> None:
    """As many parameters in each group as in the optimizer, and of the same names."""
    sizes = [len(group["params"]) for group in groups]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != wanted:
        raise CheckpointError(
            f"{file.path} is of groups of {sizes} parameters, and the optimizer has {wanted}"
        )
    if sorted(index for group in groups for index in group["params"]) != [*range(sum(sizes))]:
        raise CheckpointError(f"{file.path}: the parameters are not numbered from 0 on")
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        if "param_names" in group and "param_names" in own:
            for name, own_name in zip(group["param_names"], own["param_names"], strict=True):
                if name != own_name:
                    raise CheckpointError(
                        f"{file.path} has the parameter {name} where the optimizer has {own_name}; "
                        "give the optimizer its parameters in the file's order"
                    )


class _StoredState(Mapping[str, Tensor]):
    """The fields of one parameter, read from the file when they are asked for."""

    def __init__(self, file: TensorFile, names: dict[str, str]) -> None:
        self.file = file
        self.names = names

    def __getitem__(self, field: str) -> Tensor:
        return self.file.read(self.names[field])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    # Not by value, which would read the data.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _stored_states(
    file: TensorFile, labels: dict[int, str], without_state: list[int]
) -> dict[int, _StoredState]:
    """What the file holds of each parameter: nothing of some, and of the others something."""
    bare = set(without_state)
    names: dict[str, dict[str, str]] = {
        label: {} for index, label in labels.items() if index not in bare
    }
    for name in file.tensors:
        if name.startswith("param_groups."):
            continue
        label, _, field = name.removeprefix("state.").rpartition(".")
        if not name.startswith("state.") or label not in names:
            raise CheckpointError(f"{file.path}: {name} belongs to nothing the file describes")
        names[label][field] = name
    for label, fields in names.items():
        if not fields:
            raise CheckpointError(f"{file.path}: the tensors state.{label}.* are missing")
    return {
        index: _StoredState(file, names[label]) for index, label in labels.items() if label in names
    }


def _check_sizes(
    optimizer: PagedAdamW, groups: list[dict[str, Any]], states: dict[int, _StoredState]
) -> None:
    """No tensor is larger than its parameter: nothing is read that cannot be state of it."""
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for index, param in zip(group["params"], own["params"], strict=True):
            state = states.get(index)
            if state is None:
                continue
            for name in state.names.values():
                stored = state.file.tensors[name]
                if stored.size_bytes > 4 * max(1, param.numel()):
                    raise CheckpointError(
                        f"{state.file.path}: {name} has shape {list(stored.shape)}, and its "
                        f"parameter {list(param.shape)}"
                    )
