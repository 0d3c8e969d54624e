"""Compiles kernels for the emulator, and calls them with torch tensors on the CPU.

`prefix` makes the definitions that specialise a kernel; `Kernels` is a compiled translation unit.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fourbit import _core, reference

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
GUARD = 256


def _floats(values: list[float]) -> str:
    return "{" + ", ".join(f"{value.hex()}f" for value in values) + "}"


def _midpoints(values: list[float]) -> list[float]:
    ordered = torch.tensor(sorted(set(values)), dtype=torch.float32)
    return ((ordered[1:] + ordered[:-1]) / 2).tolist()


@functools.cache
def prefix(
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    codebook: str = "nf4",
    double_quant: bool = False,
) -> str:
    """The definitions before a kernel's source."""
    values = list(reference.CODEBOOKS[codebook])
    signed = _core.Codebook.by_name("dynamic-signed").values
    unsigned = _core.Codebook.by_name("dynamic-unsigned").values
    definitions = {
        "ELEMENT": ELEMENTS[dtype],
        "BLOCK_SIZE": str(block_size),
        "CODE_BITS": str(reference.code_bits(torch.tensor(values))),
        "DOUBLE_QUANT": str(int(double_quant)),
        "CODEBOOK_VALUES": _floats(values),
        "NESTED_VALUES": _floats(signed),
        "NESTED_MIDPOINTS": _floats(_midpoints(signed)),
        "UNSIGNED_VALUES": _floats(unsigned),
        "UNSIGNED_MIDPOINTS": _floats(_midpoints(unsigned)),
    }
    return "".join(f"#define {name} {value}\n" for name, value in definitions.items())


class Guarded:
    """A copy of a tensor between zones that no kernel may write, and that read as NaN."""

    def __init__(self, tensor: Tensor, misalign: int = 0) -> None:
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._memory = torch.full((len(data) + 2 * GUARD + 64 + misalign,), 0xFF).to(torch.uint8)
        self._start = GUARD + -(self._memory.data_ptr() + GUARD) % 64 + misalign
        self._end = self._start + len(data)
        self._memory[self._start : self._end] = data
        self._like = tensor
        self.pointer = self._memory.data_ptr() + self._start

    def tensor(self) -> Tensor:
        """What it holds now."""
        for zone in (self._memory[: self._start], self._memory[self._end :]):
            assert (zone == 0xFF).all(), "a kernel wrote outside its tensor"
        data = self._memory[self._start : self._end].clone()
        return data.view(self._like.dtype).reshape(self._like.shape)


class Kernels:
    """A kernel source, compiled."""

    def __init__(self, name: str, prefix: str, suffix: str = "") -> None:
        source = (REPOSITORY / "cuda" / f"{name}.cu").read_text()
        shared = [REPOSITORY / "cuda/common.cuh", REPOSITORY / "tests/kernels/emulator.h"]
        unit = prefix + source + suffix
        key = hashlib.sha256("".join([unit, *(p.read_text() for p in shared)]).encode())
        folder = Path(tempfile.gettempdir()) / f"fourbit-kernels-{os.getuid()}"
        folder.mkdir(exist_ok=True)
        library = folder / f"{name}-{key.hexdigest()[:24]}.so"
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}")
            include = [f"-I{REPOSITORY / 'cuda'}", "-include", str(shared[1])]
            subprocess.run(
                ["g++", *FLAGS, *include, "-", "-o", str(partial)],
                input=unit.encode(),
                check=True,
            )
            partial.rename(library)
        self._library = ctypes.CDLL(str(library))

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, ...],
        block: int,
        shared_bytes: int,
        *arguments: Guarded | ctypes._SimpleCData[int] | None,
        order: int = 0,
        eager: bool = False,
    ) -> None:
        """Run a kernel. A tensor is passed as its address, None as a null pointer."""
        function = getattr(self._library, f"emulate_{kernel}")
        function.restype = ctypes.c_char_p
        values = [
            ctypes.c_void_p(a.pointer if isinstance(a, Guarded) else None)
            if a is None or isinstance(a, Guarded)
            else a
            for a in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        dims = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        threads = (ctypes.c_uint * 3)(block, 1, 1)
        failure = function(dims, threads, shared_bytes, pointers, order, int(eager))
        assert not failure, failure.decode()


@functools.cache
def compiled(name: str, prefix: str, suffix: str = "") -> Kernels:
    """`Kernels`, once for each source."""
    return Kernels(name, prefix, suffix)
