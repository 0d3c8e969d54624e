"""Single safetensors files: what is written is what others read; what is read is checked first."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fourbit import CheckpointError, NonFiniteError, _core
from fourbit._core import MAX_HEADER_BYTES, MAX_TENSORS
from fourbit.tensor_file import TORCH_DTYPES, TensorFile, write_tensors


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    with path.open("wb") as file:
        write_tensors(file, tensors, metadata)
    return path


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=source) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=source).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, generator=source, dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(
    contents=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12).filter(
                lambda name: name != "__metadata__"
            ),
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=6,
        unique_by=lambda entry: entry[0],
    ),
    text=st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
)
def test_others_read_what_is_written(tmp_path_factory, contents, text) -> None:
    tensors = {
        name: random_tensor(dtype, shape, seed)
        for seed, (name, dtype, shape) in enumerate(contents)
    }
    path = write(tmp_path_factory.mktemp("file") / "model.safetensors", tensors, note=text)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    with TensorFile(path) as file, safe_open(path, "pt") as other:
        assert other.metadata()["format"] == "pt"
        assert file.metadata == other.metadata()
        assert file.string("note") == text
        for name, tensor in tensors.items():
            for read in (theirs[name], file.read(name)):
                assert read.dtype == tensor.dtype
                assert read.shape == tensor.shape
                assert torch.equal(read, tensor)
            # As other writers do, so that a file can be mapped.
            assert file.tensors[name].start % tensor.itemsize == 0


def test_tensors_in_any_layout_and_larger_than_a_piece(tmp_path: Path) -> None:
    large = torch.arange((16 << 20) // 4 + 1000, dtype=torch.float32)
    tensors = {"large": large, "transposed": large[:6000].view(60, 100).T, "strided": large[:99:7]}
    with TensorFile(write(tmp_path / "x", tensors)) as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="second has NaN"):
        write(tmp_path / "x", {"first": torch.ones(3), "second": torch.tensor([1.0, torch.nan])})
    with pytest.raises(TypeError, match=r"z is torch\.complex64"):
        write(tmp_path / "x", {"z": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="header would take"):
        write(tmp_path / "x", {"a": torch.ones(1)}, note="x" * MAX_HEADER_BYTES)
    with pytest.raises(ValueError, match="262145 tensors are more than"):
        write(tmp_path / "x", dict.fromkeys(map(str, range(MAX_TENSORS + 1)), torch.ones(1)))


def joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "twice"),
        ('{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', "a is F4, which torch"),
        ("{}", "bytes"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: str, message: str) -> None:
    """The core refuses them, whose tests have the others."""
    refused(tmp_path / "x", joined(header.encode(), b"1234"), message)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x"
    refused(path, b"", "bytes")
    refused(path, b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer")
    refused(path, b"\xff" * 40, "header")
    refused(path, struct.pack("<Q", 100) + b"{}", "100")
    refused(path, joined(b'{"\xff":1}', b""), "utf-8|UTF-8")
    with pytest.raises(FileNotFoundError):
        TensorFile(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"not a .*file"):
        TensorFile(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(CheckpointError, match=r"not a .*file"):
            TensorFile(tmp_path / "fifo")


def test_data_is_compared_with_its_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": torch.arange(50.0), "b": torch.arange(9)}, note="text")
    content = path.read_bytes()
    for at in (len(content) - 1, len(content) - 150):
        broken = bytearray(content)
        broken[at] ^= 4
        path.write_bytes(broken)
        with TensorFile(path) as file, pytest.raises(CheckpointError, match=r"x: [ab] does not ha"):
            [file.read(name) for name in file.tensors]
    path.write_bytes(content.replace(b'"text"', b'"test"'))
    with TensorFile(path) as file, pytest.raises(CheckpointError, match="note does not have its"):
        file.string("note")
    path.write_bytes(content)
    with TensorFile(path) as file, pytest.raises(CheckpointError, match="holds no other"):
        file.string("other")
    with TensorFile(path) as file:
        os.truncate(path, len(content) - 1)
        with pytest.raises(CheckpointError, match="ends early"):
            [file.read(name) for name in file.tensors]


FRAGMENTS = (
    *("0", "1", "-1", "1.0", "1e3", "4294967296", "[]", "[0]", "[0,0]", "[3,5]", "{}", "null"),
    *("true", '""', '"F32"', '"BF16"', '"dtype"', '"shape"', '"data_offsets"', '"\\ud800"'),
    *('"__metadata__":{}', "NaN", ",", ":", '{"F32":null}', "[[[[]]]]", "\n", "\\u0000", "é"),
)


def mutated(header: bytes, source: random.Random) -> bytes:
    at, end = sorted(source.randrange(len(header) + 1) for _ in range(2))
    kind = source.randrange(5)
    if kind == 0:
        broken = bytearray(header)
        broken[min(at, len(header) - 1)] ^= 1 << source.randrange(8)
        return bytes(broken)
    if kind == 1:
        return header[:at] + header[at + 1 :]
    if kind == 2:
        return header[:at] + source.choice(FRAGMENTS).encode() + header[at:]
    if kind == 3:
        return header[:at] + source.choice(FRAGMENTS).encode() + header[at + 4 :]
    return header[:at] + header[at : min(end, at + 20)] + header[at:]


def opened(reader: Any, path: Path) -> Any:
    """The reader, or why it refused."""
    try:
        return reader(path)
    except CheckpointError as error:
        return str(error)


def test_it_accepts_what_the_core_accepts(tmp_path: Path) -> None:
    """Of headers that are broken a little, here and there."""
    path = tmp_path / "model.safetensors"
    tensors = {
        "alpha.x": torch.ones(3, 5, dtype=torch.bfloat16),
        "second": torch.ones(4),
        "third": torch.ones(0, 7),
        "fourth": torch.tensor(2.0),
    }
    save_file(tensors, path, {"note": "text"})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length].rstrip(), content[8 + length :]
    source = random.Random(7)
    accepted = 0
    for _ in range(4000):
        broken = mutated(header, source)
        path.write_bytes(joined(broken, data))
        core = opened(_core.CheckpointReader, tmp_path)
        ours = opened(TensorFile, path)
        if not isinstance(ours, TensorFile):
            # The core knows types that torch has not.
            assert isinstance(core, str) or "which torch has none for" in ours, (broken, ours)
            continue
        ours.close()
        assert isinstance(core, _core.CheckpointReader), (broken, core)
        entries = {entry["name"]: entry for entry in core.tensors()}
        assert ours.metadata == core.metadata[path.name]
        assert ours.tensors.keys() == entries.keys()
        for name, tensor in ours.tensors.items():
            assert tensor.dtype == TORCH_DTYPES[entries[name]["dtype"]]
            assert list(tensor.shape) == entries[name]["shape"]
        accepted += 1
    assert 100 < accepted < 3900
