"""Compiles kernels of ``cuda/`` for the CPU and runs them, by way of ``emulator.h``.

The same ``.cu`` files that NVRTC compiles are compiled by the C++ compiler (``$CXX``, or ``g++``),
several specialisations to a library. Buffers have guard zones: what a kernel writes outside of them
fails, and what it reads there is NaN.

``README.md`` says what that shows and names what cannot run here.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from fourbit import _core, reference
from fourbit.codebook import Codebook, by_name

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "cuda"
OPTIONS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-gnu-unique",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ALIGNMENT = 256
GUARD_BYTES = 64 << 10
GUARD = 0xFF  # as floats of any width, NaN

Edit: TypeAlias = Callable[[str], str]


class KernelError(Exception):
    """A kernel waited for ever, accessed memory it must not, or failed otherwise."""


@dataclass(frozen=True)
class Specialisation:
    """What a kernel is compiled for."""

    dtype: torch.dtype = torch.float32
    block_size: int = 64
    codebook: Codebook = field(default_factory=lambda: by_name("nf4"))
    double_quant: bool = False
    # An architecture, as 10 major + minor, whose constants are wanted; else those of the newest.
    capability: int | None = None


def unavailable() -> str | None:
    """Why kernels cannot run on this machine, if so: for ``pytest.mark.skipif``."""
    if sys.platform != "linux":
        return "kernels run on the CPU on Linux alone: their shared memory is a section of ELF"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"no C++ compiler {compiler}"


# --- sources ------------------------------------------------------------------------------------


def _floats(numbers: Sequence[float]) -> str:
    literals = (
        "__builtin_bit_cast(float, 0x7fc00000)" if math.isnan(n) else f"{n.hex()}f" for n in numbers
    )
    return "{" + ", ".join(literals) + "}"


def _midpoints(distinct: Sequence[float]) -> list[float]:
    ordered = torch.tensor(distinct, dtype=torch.float32)
    return ((ordered[:-1] + ordered[1:]) / 2).tolist()  # type: ignore[no-any-return]


def definitions(specialisation: Specialisation) -> dict[str, str]:
    """The definitions that specialise a kernel: names and their text."""
    book = specialisation.codebook
    values = [*book.values] + [math.nan] * 256
    distinct = sorted({value + 0.0 for value in values if not math.isnan(value)})
    nested = reference.dynamic_map(signed=True).tolist()
    unsigned = reference.dynamic_map(signed=False).tolist()
    of_architecture = {}
    if specialisation.capability is not None:
        of_architecture["__CUDA_ARCH__"] = str(10 * specialisation.capability)
    return of_architecture | {
        "ELEMENT": ELEMENTS[specialisation.dtype],
        "BLOCK_SIZE": str(specialisation.block_size),
        "CODE_BITS": str(book.code_bits),
        "DOUBLE_QUANT": str(int(specialisation.double_quant)),
        "TIES_UPPER": str(int(book.ties == "upper")),
        "CODEBOOK_VALUES": _floats(values[: 1 << book.code_bits]),
        "CODEBOOK_MIDPOINTS": _floats(_midpoints(distinct)),
        "CODEBOOK_CODES": "{" + ", ".join(str(values.index(value)) for value in distinct) + "}",
        "CODEBOOK_RANKS": str(len(distinct)),
        "NESTED_VALUES": _floats(nested),
        "NESTED_MIDPOINTS": _floats(_midpoints(nested)),
        "UNSIGNED_VALUES": _floats(unsigned),
        "UNSIGNED_MIDPOINTS": _floats(_midpoints(unsigned)),
        "COUNTER_SLOTS": str(_core.COUNTER_SLOTS),
        "SLOT_COUNTERS": str(_core.SLOT_COUNTERS),
    }


def _path(kernel_file: str) -> Path:
    """Of ``cuda/``, or of this folder."""
    path = SOURCES / f"{kernel_file}.cu"
    return path if path.exists() else Path(__file__).with_name(path.name)


def source(kernel_file: str, specialisation: Specialisation) -> str:
    """The whole translation unit of a kernel file, without includes."""
    lines = [f"#define {name} {text}" for name, text in definitions(specialisation).items()]
    for path in _with_headers(_path(kernel_file)):
        lines.append(f'#line 1 "{path.relative_to(ROOT)}"')
        for line in path.read_text().splitlines():
            kept = line != "#pragma once" and not line.startswith('#include "')
            lines.append(line if kept else "")
    return "\n".join(lines) + "\n"


def _with_headers(path: Path) -> list[Path]:
    """A file after the headers that it includes, and they."""
    included = re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE)
    headers = [header for name in included for header in _with_headers(SOURCES / name)]
    return [*dict.fromkeys(headers), path]


# --- libraries ----------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    """Where this process keeps what it compiled."""
    folder = Path(tempfile.mkdtemp(prefix="fourbit-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(text: str, *options: str) -> None:
    command = [os.environ.get("CXX", "g++"), *OPTIONS, *options]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(done.stderr)


@cache
def _header() -> Path:
    """``emulator.h`` in the folder, precompiled: it takes longer than most kernels."""
    header = _folder() / "emulator.h"
    shutil.copyfile(Path(__file__).with_name("emulator.h"), header)
    _compile("", "-x", "c++-header", str(header), "-o", f"{header}.gch")
    return header


@cache
def _library(text: str) -> ctypes.CDLL:
    path = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    _compile(text, "-include", str(_header()), "-shared", "-x", "c++", "-", "-o", str(path))
    return ctypes.CDLL(str(path))


@dataclass(frozen=True)
class Kernels:
    """The kernels of one file, compiled for one specialisation."""

    library: ctypes.CDLL
    suffix: str

    def launch(
        self,
        kernel: str,
        *arguments: object,
        grid: int | tuple[int, ...] = 1,
        block: int | tuple[int, ...] = 256,
        dynamic_bytes: int = 0,
        order: int = 0,
        eager_copies: bool = False,
    ) -> None:
        """Run every thread of a grid.

        Args:
            kernel: its name, ``fourbit_...``.
            arguments: in order: a `Buffer` for a pointer, None for a null one, an int for 64 bits,
                or any value of ctypes.
            grid: blocks, up to three numbers.
            block: threads of a block, likewise.
            dynamic_bytes: of shared memory.
            order: in which threads run: 0, or 1 for the reverse; 2 and 3: the first or the last
                warp as far ahead of the others as it can; 4 and above: shuffled with that seed.
            eager_copies: whether background copies arrive at once, or only when waited for.

        Raises:
            KernelError: naming what the kernel did wrong.
        """
        function = getattr(self.library, f"emulate_{kernel}{self.suffix}")
        function.restype = ctypes.c_char_p
        values = [_as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        failure = function(
            _dimensions(grid), _dimensions(block), dynamic_bytes, pointers, order, int(eager_copies)
        )
        if failure:
            raise KernelError(f"{kernel}: {failure.decode()}")
        for position, argument in enumerate(arguments):
            if isinstance(argument, Buffer) and argument.damaged():
                raise KernelError(f"{kernel}: wrote outside of the buffer of argument {position}")


def load(
    kernel_file: str, specialisations: Sequence[Specialisation], edit: Edit | None = None
) -> list[Kernels]:
    """Compile a kernel file for several specialisations, into one library.

    Args:
        kernel_file: its name in ``cuda/`` or this folder, without the suffix.
        specialisations: each gives one entry of the result.
        edit: changes the source first: for kernels that are wrong on purpose.

    Raises:
        KernelError: with what the compiler says.
    """
    names = _names(kernel_file)
    parts = []
    for index, specialisation in enumerate(specialisations):
        text = source(kernel_file, specialisation)
        text = edit(text) if edit else text
        # Kernels have C names, which namespaces do not tell apart.
        renamed = [f"#define {name} {name}_{index}\n" for name in names]
        undone = [f"#undef {name}\n" for name in (*names, *definitions(specialisation))]
        parts += [*renamed, f"namespace specialisation_{index} {{\n{text}}}\n", *undone]
    library = _library("".join(parts))
    return [Kernels(library, f"_{index}") for index in range(len(specialisations))]


def _names(kernel_file: str) -> list[str]:
    lines = _path(kernel_file).read_text().splitlines()
    starts = "FOURBIT_EMULATE("
    kernels = [line[len(starts) : -1] for line in lines if line.startswith(starts)]
    return [*kernels, *(f"emulate_{kernel}" for kernel in kernels)]


def _dimensions(given: int | tuple[int, ...]) -> ctypes.Array[ctypes.c_uint]:
    numbers = (given,) if isinstance(given, int) else given
    return (ctypes.c_uint * 3)(*numbers, *[1] * (3 - len(numbers)))


def _as_c(argument: object) -> ctypes._SimpleCData:
    if isinstance(argument, Buffer):
        return ctypes.c_void_p(argument.pointer)
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, ctypes._SimpleCData):
        return argument
    raise TypeError(f"a kernel takes no {type(argument).__name__}")


# --- buffers ------------------------------------------------------------------------------------


class Buffer:
    """A copy of a tensor between guard zones.

    Args:
        tensor: what it holds at first, of any dtype.
        misaligned_by: bytes from a multiple of 256.
    """

    def __init__(self, tensor: Tensor, *, misaligned_by: int = 0) -> None:
        self._dtype, self._shape = tensor.dtype, tensor.shape
        content = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._count = len(content)
        self._whole = torch.full(
            (self._count + 2 * GUARD_BYTES + 2 * ALIGNMENT,), GUARD, dtype=torch.uint8
        )
        self._start = -self._whole.data_ptr() % ALIGNMENT + GUARD_BYTES + misaligned_by
        self._content().copy_(content)

    @classmethod
    def empty(cls, count: int, dtype: torch.dtype, *, misaligned_by: int = 0) -> Buffer:
        """For `count` elements that a kernel writes; NaN until then."""
        filled = torch.full((count * dtype.itemsize,), GUARD, dtype=torch.uint8)
        return cls(filled.view(dtype), misaligned_by=misaligned_by)

    def _content(self) -> Tensor:
        return self._whole[self._start : self._start + self._count]

    @property
    def pointer(self) -> int:
        """The address of the first element."""
        return self._whole.data_ptr() + self._start

    def tensor(self) -> Tensor:
        """What it holds now."""
        return self._content().clone().view(self._dtype).reshape(self._shape)

    def damaged(self) -> bool:
        """Whether a guard zone changed."""
        before, after = self._whole[: self._start], self._whole[self._start + self._count :]
        return not bool((before == GUARD).all() and (after == GUARD).all())
