"""Which weights of a model are quantized in a folder, found out before anything is loaded.

All that can be wrong with a quantized weight is found here, and named; while it loads tensors,
transformers would only say that something was wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourbit import _core
from fourbit._core import CheckpointError
from fourbit.codebook import Codebook
from fourbit.dense import features, is_linear
from fourbit.integrations.transformers.arrange import arrange
from fourbit.integrations.transformers.rooms import ExpertsRoom, LinearRoom, Room
from fourbit.stored_experts import StoredExperts
from fourbit.tensor_file import TORCH_DTYPES


def checkpoint_folder(files: Iterable[str] | None) -> Path:
    """The folder of a checkpoint's files.

    Raises:
        ValueError: if there are no files, or they are of more than one folder.
    """
    folders = {Path(file).parent for file in files or ()}
    if len(folders) != 1:
        raise ValueError(
            "a quantized checkpoint is loaded from the files of one folder, and not from a "
            "state_dict; give the folder to from_pretrained"
        )
    return folders.pop()


def stored_rooms(model: Any, folder: Path) -> list[tuple[Room, torch.dtype]]:
    """The weights of a model that a folder holds quantized, and what their codes are stored as.

    Weights that have no place in the model, such as the head of a model that is loaded without its
    head, are not among them.

    Raises:
        CheckpointError: naming the file and the tensor that is missing or damaged or does not fit
            the model; for a later version of the format; for a folder without quantized weights.
    """
    reader = _core.CheckpointReader(folder)
    quantized = {entry["name"]: entry for entry in reader.quantized()}
    if not quantized:
        raise CheckpointError(
            f"{folder} says that it is quantized, and holds no quantized weight; convert it again, "
            "or load the original with quantization_config=fourbit.NF4Config()"
        )
    tensors = {entry["name"]: entry for entry in reader.tensors()}
    parts = {part for entry in quantized.values() for part in entry["parts"].values()}
    arrangement = arrange(
        model,
        {name: entry["shape"] for name, entry in quantized.items()},
        {name: entry["shape"] for name, entry in tensors.items() if name not in parts},
    )

    def stored_as(entry: Any) -> torch.dtype:
        # bitsandbytes can call bytes a bfloat16.
        return TORCH_DTYPES[tensors[entry["parts"]["packed"]]["dtype"]]

    rooms: list[tuple[Room, torch.dtype]] = []
    for name, target in arrangement.renamed.items():
        entry = quantized[name]
        room = _linear_room(model, target, entry, folder)
        if room is not None:
            rooms.append((room, stored_as(entry)))
    for target, sources in arrangement.experts.items():
        entries = [quantized[name] for name in sources]
        try:
            stored = StoredExperts.of(model, target, entries)
        except ValueError as error:
            raise CheckpointError(f"{folder} does not fit the model: {error}") from None
        experts = ExpertsRoom(target, stored.module, stored.layout, entries)
        rooms.append((experts, stored_as(entries[0])))
    if not rooms:
        raise CheckpointError(
            f"{folder} does not fit the model: a {type(model).__name__} has none of its quantized "
            f"weights, such as {next(iter(quantized))}"
        )
    return rooms


def _linear_room(
    model: nn.Module, target: str, entry: Mapping[str, Any], folder: Path
) -> LinearRoom | None:
    try:
        layer = model.get_submodule(target.removesuffix(".weight"))
    except AttributeError:
        return None
    name = entry["name"]
    if not is_linear(layer):
        kind = type(layer).__name__
        raise CheckpointError(f"{name} in {folder} is quantized, but a {kind} in the model")
    shape = [*features(layer)][::-1]
    if list(entry["shape"]) != shape:
        raise CheckpointError(
            f"{name} in {folder} is {list(entry['shape'])}, and {shape} in the model"
        )
    return LinearRoom(
        target.removesuffix(".weight"),
        layer,
        [entry],
        codebook=Codebook.from_core(entry["codebook"]),
        block_size=entry["block_size"],
        double_quant=entry["double_quant"],
        dtype=getattr(torch, entry["dtype"]),
    )
