"""Which layers of a model are quantized in a folder, found out before anything is loaded.

All that can be wrong with a quantized weight is found here, and named; while it loads tensors,
transformers would only say that something was wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourbit import _core
from fourbit._core import CheckpointError
from fourbit.codebook import Codebook
from fourbit.integrations.conversions import Naming
from fourbit.tensor_file import TORCH_DTYPES


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer whose weight a folder holds quantized.

    Attributes:
        path: of the layer in the model.
        codebook: of its weight.
        block_size: of its weight.
        double_quant: whether its scales are quantized.
        nested_offset: the mean of the scales, with double quantization.
        dtype: of the weight before.
        storage: what the packed codes are stored as: bitsandbytes can call bytes a bfloat16.
    """

    path: str
    codebook: Codebook
    block_size: int
    double_quant: bool
    nested_offset: float | None
    dtype: torch.dtype
    storage: torch.dtype


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


def stored_layers(model: Any, folder: Path) -> dict[str, StoredLayer]:
    """The layers of a model that a folder holds quantized, by path.

    Weights that have no place in the model, such as the head of a model that is loaded without its
    head, are not among them.

    Raises:
        CheckpointError: naming the file and the tensor that is missing or damaged or does not fit
            the model; for a later version of the format; for a folder without quantized weights.
    """
    reader = _core.CheckpointReader(folder)
    quantized = reader.quantized()
    if not quantized:
        raise CheckpointError(
            f"{folder} says that it is quantized, and holds no quantized weight; convert it again"
        )
    dtypes = {entry["name"]: entry["dtype"] for entry in reader.tensors()}
    naming = Naming(model)
    found: dict[str, StoredLayer] = {}
    for entry in quantized:
        name, pattern = naming.place(entry["name"])
        if pattern is not None:
            raise CheckpointError(
                f"{entry['name']} in {folder} is quantized, and the model makes {name} of several "
                f"such tensors; convert it again with skip=['{entry['name']}']"
            )
        path = name.removesuffix(".weight")
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            continue
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(
                f"{entry['name']} in {folder} is quantized, but a {type(layer).__name__} in the "
                "model"
            )
        shape = [layer.out_features, layer.in_features]
        if list(entry["shape"]) != shape:
            raise CheckpointError(
                f"{entry['name']} in {folder} is {list(entry['shape'])}, and {shape} in the model"
            )
        found[path] = StoredLayer(
            path,
            Codebook.from_core(entry["codebook"]),
            entry["block_size"],
            entry["double_quant"],
            entry["nested_offset"],
            getattr(torch, entry["dtype"]),
            TORCH_DTYPES[dtypes[entry["parts"]["packed"]]],
        )
    return found
