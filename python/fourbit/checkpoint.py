"""Checkpoint folders: convert a 16-bit one to 4 bits, verify one, look into one.

The work is done in Rust, with the GIL released; see the `checkpoint` and `convert` modules of
the crate for the format and its guarantees.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from fourbit import _core
from fourbit.codebook import Codebook, as_codebook

__all__ = [
    "CheckpointInfo",
    "ConversionReport",
    "QuantizedWeightInfo",
    "TensorInfo",
    "TensorReport",
    "VerifyReport",
    "convert",
    "inspect",
    "verify",
]

PathLike: TypeAlias = "str | os.PathLike[str]"
"""A path."""

Progress: TypeAlias = Callable[[int, int, str], object]
"""Called with the bytes of the source that are done, all of them, and the tensor under way."""

DEFAULT_MAX_SHARD_BYTES = _core.DEFAULT_MAX_SHARD_BYTES
"""Bytes of an output file, where the caller does not say: 2 GiB."""

DEFAULT_CHUNK_BYTES = _core.DEFAULT_CHUNK_BYTES
"""Memory for data in flight per thread, where the caller does not say: 64 MiB."""


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor of the source.

    Attributes:
        name: Its name.
        action: ``"quantized"`` or ``"kept"``.
        reason: Why, in a few words.
        dtype: Its dtype in the source, as safetensors names it (``"BF16"``).
        shape: Its shape in the source.
        bytes_before: Its bytes in the source.
        bytes_after: Its bytes in the result, scales and tables included (a quant state, a text
            of some 150 bytes, is counted at its longest).
    """

    name: str
    action: str
    reason: str
    dtype: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        tensors: What became of every tensor of the source.
        copied: Names of the other files that were copied.
        skipped: Names of the source's files that were not, with the reason.
        bytes_before: Bytes of the source's weight files.
        bytes_after: Bytes of the result's weight files.
        shards: Number of weight files of the result.
        shards_kept: How many of them an interrupted run had written.
        already_complete: The result was there, and nothing was written.
        seconds: How long it took.
    """

    tensors: tuple[TensorReport, ...]
    copied: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    shards: int
    shards_kept: int
    already_complete: bool
    seconds: float

    @property
    def quantized(self) -> tuple[TensorReport, ...]:
        """The tensors that are in few bits now."""
        return tuple(tensor for tensor in self.tensors if tensor.action == "quantized")

    @property
    def kept(self) -> tuple[TensorReport, ...]:
        """The tensors that were copied as they were, each with its reason."""
        return tuple(tensor for tensor in self.tensors if tensor.action == "kept")


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found, all of it good.

    Attributes:
        shards: Number of weight files.
        tensors: Number of stored tensors.
        quantized: Number of quantized weights.
        bytes: Bytes of the weight files.
        files: Number of other files that were compared with their checksum.
        checksums: Whether every byte was compared with a checksum. False for checkpoints of
            other writers, which have none: only their structure was checked.
    """

    shards: int
    tensors: int
    quantized: int
    bytes: int
    files: int
    checksums: bool


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor.

    Attributes:
        name: Its name.
        dtype: Its dtype as safetensors names it (``"BF16"``).
        shape: Its shape.
        bytes: Its bytes.
        file: The file it is in.
        checksum: Its XXH3 checksum of 128 bits in hexadecimal, if its writer gave it one.
        reason: Why `convert` quantized or kept it, in a few words; None for the scales and tables
            of a quantized weight, and where something else wrote the folder.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str
    checksum: str | None
    reason: str | None


@dataclass(frozen=True)
class QuantizedWeightInfo:
    """A quantized weight, which is stored as several tensors.

    Attributes:
        name: Its name, which is also that of its packed codes.
        codebook: Name of its codebook.
        block_size: Elements that share a scale.
        dtype: Its dtype before, as torch names it (``"bfloat16"``).
        shape: Its shape before.
        double_quant: Whether its scales are quantized too.
        parts: The names of the tensors it is stored as.
        reason: Why `convert` quantized it; None where something else wrote the folder.
    """

    name: str
    codebook: str
    block_size: int
    dtype: str
    shape: tuple[int, ...]
    double_quant: bool
    parts: Mapping[str, str]
    reason: str | None


@dataclass(frozen=True)
class CheckpointInfo:
    """What is in a checkpoint folder.

    Attributes:
        path: Where it is.
        format_version: Version of our additions to the format; None for other writers' folders.
        tensors: Every stored tensor.
        quantized: Every quantized weight.
    """

    path: Path
    format_version: int | None
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    quantized: tuple[QuantizedWeightInfo, ...] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.bytes for tensor in self.tensors)


def convert(
    source: PathLike,
    destination: PathLike,
    *,
    codebook: str | Mapping[int, float] | Codebook = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    only: str | Iterable[str] = (),
    skip: str | Iterable[str] = (),
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a Hugging Face checkpoint folder to 4 bits, streamed.

    Weights of linear layers are quantized, and those of experts, one by one or all in one tensor as
    the source holds them, where every matrix is made of whole blocks. Embeddings, norms, biases,
    output heads, routers of experts, and whatever is tied stay as they are, as do the `Conv1D`
    layers of GPT-2, whose weights are stored transposed: `fourbit.NF4Config` quantizes these as it
    loads the model. The result has the
    tokenizer and other small files beside the weights. bitsandbytes' readers load it too, unless
    experts are quantized, which ``skip="*experts*"`` leaves as they are.

    Memory is bounded by `chunk_bytes` and `threads`, not by the model. A run that was killed or
    stopped continues when it is called again, and ends in the same bytes. Where the finished
    result is there already, nothing is written. The source is never opened for writing.

    Args:
        source: Folder with ``model.safetensors``, or its shards and index.
        destination: Folder to be made, or an empty one.
        codebook: ``"nf4"``, ``"fp4"``, ``"int4"``, or a map or `Codebook` of your own.
        block_size: Elements that share a scale: a power of two from 32 to 4096.
        double_quant: Whether the scales are quantized too.
        only: Glob or globs (``"*.mlp.*"``) over tensor or module names: quantize these matrices,
            whatever their names say, and nothing else. None that is tied or stored transposed.
        skip: Glob or globs: leave these as they are. Wins over `only`.
        max_shard_bytes: Bytes of an output file, at most.
        chunk_bytes: Memory for data in flight, per thread.
        threads: Threads that quantize, at most 1024; None for ``torch.get_num_threads()``. The
            result does not depend on it.
        progress: Called now and then, from the calling thread, with the bytes of the source that
            are done, all of them, and the tensor under way. What it raises stops the conversion.

    Raises:
        CheckpointError: The source is damaged, quantized already, or of a format not known.
        NonFiniteError: A weight to be quantized holds NaN or infinity.
        FileExistsError: The destination holds something else.
        BlockingIOError: Another process is writing to the destination.
        OSError: A file cannot be read or written, or the disk is too small.
        ValueError: An option is out of range, or a glob matches no tensor.
    """
    if threads is None:
        threads = torch.get_num_threads()
    for option, value in (
        ("block_size", block_size),
        ("max_shard_bytes", max_shard_bytes),
        ("chunk_bytes", chunk_bytes),
        ("threads", threads),
    ):
        # What the core cannot hold would be an OverflowError that names nothing.
        if not 0 <= value < 1 << 63:
            raise ValueError(f"option {option} = {value}: it must be from 0 to 2^63 - 1")
    report = _core.convert(
        Path(source),
        Path(destination),
        codebook=as_codebook(codebook).core,
        block_size=block_size,
        double_quant=double_quant,
        only=_globs(only),
        skip=_globs(skip),
        max_shard_bytes=max_shard_bytes,
        chunk_bytes=chunk_bytes,
        threads=threads,
        progress=progress,
    )
    return ConversionReport(
        tensors=tuple(
            TensorReport(
                name=tensor["name"],
                action=tensor["action"],
                reason=tensor["reason"],
                dtype=tensor["dtype"],
                shape=tuple(tensor["shape"]),
                bytes_before=tensor["bytes_before"],
                bytes_after=tensor["bytes_after"],
            )
            for tensor in report["tensors"]
        ),
        copied=tuple(report["copied"]),
        skipped=dict(report["skipped"]),
        bytes_before=report["bytes_before"],
        bytes_after=report["bytes_after"],
        shards=report["shards"],
        shards_kept=report["shards_kept"],
        already_complete=report["already_complete"],
        seconds=report["seconds"],
    )


def _globs(globs: str | Iterable[str]) -> list[str]:
    """A single glob is a list of one, not of its letters."""
    return [globs] if isinstance(globs, str) else list(globs)


def verify(path: PathLike, *, progress: Callable[[int, int], object] | None = None) -> VerifyReport:
    """Checks a checkpoint folder: every byte of it where it is ours.

    Folders of other writers have no checksums; their headers, index and quantized weights are
    checked, and the report says so.

    Args:
        path: The folder.
        progress: Called now and then, from the calling thread, with the bytes that are compared
            and all of them. What it raises stops the work.

    Raises:
        CheckpointError: Something is damaged, missing or out of place; names file and tensor.
        OSError: The folder or a file of it cannot be read.
    """
    threads = torch.get_num_threads()
    return VerifyReport(**_core.verify(Path(path), threads=threads, progress=progress))


def inspect(path: PathLike) -> CheckpointInfo:
    """Lists what is in a checkpoint folder: ours, bitsandbytes' or a plain one.

    Reads headers and quant states, no tensor data.

    Args:
        path: The folder.

    Raises:
        CheckpointError: The folder is damaged or incomplete; names file and tensor.
        OSError: The folder or a file of it cannot be read.
    """
    reader = _core.CheckpointReader(Path(path))
    return CheckpointInfo(
        path=Path(path),
        format_version=reader.format_version,
        tensors=tuple(
            TensorInfo(
                name=tensor["name"],
                dtype=tensor["dtype"],
                shape=tuple(tensor["shape"]),
                bytes=tensor["bytes"],
                file=tensor["file"],
                checksum=tensor["checksum"],
                reason=tensor["reason"],
            )
            for tensor in reader.tensors()
        ),
        quantized=tuple(
            QuantizedWeightInfo(
                name=weight["name"],
                codebook=weight["codebook"].name,
                block_size=weight["block_size"],
                dtype=weight["dtype"],
                shape=tuple(weight["shape"]),
                double_quant=weight["double_quant"],
                parts=weight["parts"],
                reason=weight["reason"],
            )
            for weight in reader.quantized()
        ),
    )
