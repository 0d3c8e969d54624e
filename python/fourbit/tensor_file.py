"""One safetensors file that is not a model's: written as a stream, read strictly.

A model's folder goes through the core, which knows shards, indices and quantized weights. This is
the small twin for files that only Python knows: it holds one tensor in memory at a time, maps
nothing, and takes every file as hostile. Every tensor has a CRC-32 in the metadata of the header,
as has every other string there.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fourbit._core import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    CheckpointError,
    NonFiniteError,
    read_header,
)

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
TORCH_DTYPES = {name: dtype for dtype, name in _FILE_DTYPES.items()}
"""torch's dtypes by the names that safetensors has for them."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_CHECKSUM = "fourbit.crc32."
# What loaders look for.
_FRAMEWORK = {"format": "pt"}
_CHUNK_BYTES = 16 << 20


def file_dtype(name: str, dtype: torch.dtype) -> str:
    """The file format's name of a dtype.

    Raises:
        TypeError: naming the tensor, where there is none.
    """
    try:
        return _FILE_DTYPES[dtype]
    except KeyError:
        raise TypeError(f"{name} is {dtype}, which the file format has no type for") from None


# --- writing --------------------------------------------------------------------------------------


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file. No copy of more than 16 MiB is made of contiguous tensors.

    Args:
        file: open for writing, at its start.
        tensors: plain tensors, on any device.
        metadata: strings of the header, with names of their own.

    Raises:
        NonFiniteError: naming a tensor with NaN or infinity.
        ValueError: if there are more tensors, or is more to say of them, than a reader takes.
        TypeError: for a dtype that safetensors has no name for.
    """
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors are more than the {MAX_TENSORS} a file may have")
    # Wide elements first, so that all are aligned, as in other writers' files.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    checksums = dict.fromkeys(names, 0)
    start = 0
    entries: dict[str, Any] = {}
    for name in names:
        tensor = tensors[name]
        entries[name] = {
            "dtype": file_dtype(name, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes

    def header() -> bytes:
        strings = {**_FRAMEWORK, **metadata}
        strings |= {_CHECKSUM + key: _hex(zlib.crc32(v.encode())) for key, v in metadata.items()}
        strings |= {_CHECKSUM + name: _hex(value) for name, value in checksums.items()}
        text = json.dumps({_METADATA: strings, **entries}, ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8)

    # Its length is known before the checksums are.
    length = len(header())
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header would take {length} bytes, and {MAX_HEADER_BYTES} are allowed; shorten "
            "names and options"
        )
    file.seek(_LENGTH_BYTES + length)
    for name in names:
        for piece in _pieces(tensors[name]):
            if piece.is_floating_point() and not bool(piece.isfinite().all()):
                raise NonFiniteError(f"{name} has NaN or infinity")
            data = _bytes_of(piece)
            checksums[name] = zlib.crc32(data, checksums[name])
            file.write(data)
    file.seek(0)
    file.write(struct.pack("<Q", length) + header())


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a tensor with one dimension, on the CPU."""
    return flat.view(torch.uint8).numpy().data


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in order, on the CPU, some MiB at a time."""
    flat = tensor.detach().contiguous().reshape(-1)
    step = _CHUNK_BYTES // flat.itemsize
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu()


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor.

    Attributes:
        dtype: its type.
        shape: its shape.
        start: position of its first byte in the file.
        size_bytes: its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class TensorFile:
    """A safetensors file, open, its header read and checked against its size.

    The core reads the header, stricter than safetensors' own reader: ``src/checkpoint/header.rs``
    says how. Use it as a context manager.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        tensors: by name.
        metadata: the strings in the header.

    Raises:
        FileNotFoundError: without such a file.
        CheckpointError: naming the file and what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # A link of the user's own is followed, and the file it names taken for what it is.
        real = self.path.resolve(strict=True)
        self.metadata, entries = read_header(real)
        self.tensors: dict[str, StoredTensor] = {}
        for name, dtype, shape, start, size_bytes in entries:
            if dtype not in TORCH_DTYPES:
                raise CheckpointError(f"{self.path}: {name} is {dtype}, which torch has none for")
            self.tensors[name] = StoredTensor(TORCH_DTYPES[dtype], tuple(shape), start, size_bytes)
        self._file = real.open("rb", buffering=0)

    def __enter__(self) -> TensorFile:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor's data, on the CPU, in memory of its own.

        Raises:
            CheckpointError: naming the file and the tensor, if the file has become shorter, or the
                data is not what was written.
        """
        entry = self.tensors[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        checksum = 0
        if entry.size_bytes:
            data = _bytes_of(tensor.view(-1))
            self._file.seek(entry.start)
            self._fill(data, name)
            checksum = zlib.crc32(data)
        self._check(name, checksum)
        return tensor

    def string(self, key: str) -> str:
        """A string of the metadata that was written with a checksum.

        Raises:
            CheckpointError: if it is not there, or not what was written.
        """
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} holds no {key}; it is a file of another kind")
        self._check(key, zlib.crc32(self.metadata[key].encode()))
        return self.metadata[key]

    def _check(self, name: str, checksum: int) -> None:
        if self.metadata.get(_CHECKSUM + name) != _hex(checksum):
            raise CheckpointError(
                f"{self.path}: {name} does not have its checksum; the file is damaged"
            )

    def _fill(self, data: memoryview, what: str) -> None:
        done = 0
        while done < len(data):
            count = self._file.readinto(data[done : done + _CHUNK_BYTES])
            if not count:
                raise CheckpointError(f"{self.path}: {what} ends early; the file was cut off")
            done += count


def strict_json(text: str) -> Any:
    """Parse JSON in which no key stands twice and no number is NaN.

    Raises:
        ValueError: saying what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} stands twice")
            found[key] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
