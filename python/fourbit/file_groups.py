"""Tensors on their way into the files of a folder, one group after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fourbit import _core
from fourbit.codebook import Codebook
from fourbit.distributed import is_distributed, whole, write_once
from fourbit.experts import QuantizedExperts
from fourbit.names_in_files import NamesInFiles
from fourbit.operands import float_values
from fourbit.quantized import QuantizedTensor
from fourbit.tensor_file import file_dtype


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one file: names, dtypes and shapes, and how to get them when they are written."""

    entries: list[tuple[str, str, list[int]]]
    tensors: Callable[[], Iterator[Tensor]]


def converted_group(members: Mapping[str, Tensor], names: NamesInFiles) -> TensorGroup:
    """What a file holds of tensors that are written together; it is made when it is written."""
    meta = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in members.items()
    }

    def tensors() -> Iterator[Tensor]:
        yield from names.in_files({name: whole(t) for name, t in members.items()}).values()

    return TensorGroup(
        [
            (name, file_dtype(name, tensor.dtype), list(tensor.shape))
            for name, tensor in names.in_files(meta).items()
        ],
        tensors,
    )


def quantized_group(name: str, quantized: QuantizedTensor) -> TensorGroup:
    """A quantized weight, which is called `name` there."""
    return _group(stored_parts(name, quantized))


def expert_groups(names: Sequence[str], weight: QuantizedExperts) -> list[TensorGroup]:
    """A 3-D weight of experts, whose groups are quantized weights of these names.

    One that is sharded over processes is put together once, when its first group is written.
    """
    sharded = is_distributed(weight.packed)
    offset = weight.nested_offset
    if sharded and offset is not None:
        offset = whole(offset)
    layout = weight.layout
    groups: list[TensorGroup] = []
    for index, name in enumerate(names):
        take = partial(_whole_group if sharded else QuantizedExperts.group, weight, index)
        plan = _Plan(
            layout.codebook,
            layout.block_size,
            layout.dtype,
            layout.group_shape,
            None if offset is None else offset[4 * index : 4 * (index + 1)],
        )
        groups.append(_group(_stored_parts(name, plan, take)))
    return groups


@lru_cache(maxsize=1)
def _gathered(weight: QuantizedExperts) -> QuantizedExperts:
    packed, absmax, nested_absmax, nested_offset = (
        None if part is None else whole(part) for part in weight.parts
    )
    assert packed is not None
    assert absmax is not None
    return QuantizedExperts(weight.layout, packed, absmax, nested_absmax, nested_offset)


def _whole_group(weight: QuantizedExperts, index: int) -> QuantizedTensor:
    return _gathered(weight).group(index)


def _group(parts: Sequence[StoredPart]) -> TensorGroup:
    return TensorGroup(
        [(part.name, part.dtype, part.shape) for part in parts],
        lambda: (part.tensor() for part in parts),
    )


@dataclass(frozen=True)
class StoredPart:
    """One of the tensors that a quantized weight is in a file, and how to get its bytes."""

    name: str
    dtype: str
    shape: list[int]
    tensor: Callable[[], Tensor]


def stored_parts(name: str, quantized: QuantizedTensor) -> list[StoredPart]:
    """The tensors of a file that hold a quantized weight, which is called `name` there."""
    plan = _Plan(
        quantized.codebook,
        quantized.block_size,
        quantized.dtype,
        quantized.shape,
        quantized.nested_offset,
    )
    return _stored_parts(name, plan, lambda: quantized)


class _Plan(NamedTuple):
    """What is known of a quantized weight before it is written."""

    codebook: Codebook
    block_size: int
    dtype: torch.dtype
    shape: torch.Size
    nested_offset: Tensor | None


def _stored_parts(
    name: str, plan: _Plan, quantized: Callable[[], QuantizedTensor]
) -> list[StoredPart]:
    offset = plan.nested_offset
    parts, state = _core.quantized_layout(
        name,
        codebook=plan.codebook.core,
        block_size=plan.block_size,
        dtype=str(plan.dtype).removeprefix("torch."),
        shape=list(plan.shape),
        nested_offset=None if offset is None else float_values(whole(offset).cpu()).item(),
    )
    return [
        StoredPart(
            part["name"],
            part["dtype"],
            part["shape"],
            partial(_part, quantized, part["part"], state),
        )
        for part in parts
    ]


def _part(quantized: Callable[[], QuantizedTensor], part: str, state: bytes) -> Tensor:
    if part == "quant_map":
        return torch.tensor(quantized().codebook.values, dtype=torch.float32)
    if part == "nested_quant_map":
        return torch.tensor(_core.Codebook.by_name("dynamic-signed").values, dtype=torch.float32)
    if part == "quant_state":
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)
    tensor: Tensor | None = getattr(quantized(), part)
    assert tensor is not None, part
    return tensor


def write_groups(
    folder: str | os.PathLike[str],
    groups: list[TensorGroup],
    max_shard_bytes: int,
    files: list[tuple[str, bytes]],
    *,
    sharded: bool = False,
) -> None:
    """Write a checkpoint; after an error or an interrupt, nothing is there that loads.

    Tensors of a `sharded` model are written by the first process (`write_once`).
    """

    def write(tensors: Iterator[Tensor]) -> None:
        writer = _core.CheckpointWriter(
            Path(folder),
            [group.entries for group in groups],
            max_shard_bytes=max_shard_bytes,
            files=files,
        )
        names = (name for group in groups for name, _, _ in group.entries)
        try:
            for name, tensor in zip(names, tensors, strict=True):
                data = tensor.detach().cpu().contiguous().reshape(-1)
                writer.write(name, data.view(torch.uint8))
            writer.finish()
        except BaseException:
            writer.discard()
            raise

    with torch.no_grad():
        all_tensors = (tensor for group in groups for tensor in group.tensors())
        try:
            write_once(all_tensors, write, sharded=sharded)
        finally:
            _gathered.cache_clear()
