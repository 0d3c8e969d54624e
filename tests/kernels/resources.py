"""Registers, shared memory and spills of every kernel, for every architecture: what NVRTC says.

``python tests/kernels/resources.py FILE`` writes the table of them; tests hold it to having no
spills. No GPU is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fourbit import _core, nvrtc
from fourbit.codebook import Codebook
from fourbit.layout import BLOCK_SIZES

TARGETS = (75, 80, 86, 89, 90, 100, 120)
COLUMNS = ("kernel", "dtype", "block", "bits", "double")
# Where one architecture must stand for all.
ONE_TARGET = 90


@dataclass(frozen=True)
class Request:
    """A kernel file and what it is compiled for."""

    file: str
    capability: int
    dtype: str
    block_size: int = 64
    code_bits: int = 4
    double_quant: bool = True

    def codebook(self) -> _core.Codebook:
        """One of that width that uses all of it."""
        if self.code_bits == 4:
            return _core.Codebook.by_name("nf4")
        last = (1 << self.code_bits) - 1
        entries = {i: 2 * i / last - 1 for i in range(last + 1)}
        return Codebook(entries, name=f"resources-{self.code_bits}-bits").core

    def compiled(self) -> tuple[bytes, str]:
        """Machine code and log."""
        return _core.compile_kernel(
            self.file,
            capability=self.capability,
            dtype=self.dtype,
            block_size=self.block_size,
            codebook=self.codebook(),
            double_quant=self.double_quant,
        )


@dataclass(frozen=True)
class Usage:
    """What one kernel takes."""

    request: Request
    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def requests() -> list[Request]:
    """Every file for every architecture and dtype; every block size and width for one."""
    result = []
    for file, dtypes, code_bits, _ in _core.kernel_register():
        for dtype, oldest in dtypes:
            targets = [target for target in TARGETS if target >= oldest]
            result += [Request(file, target, dtype) for target in targets]
            if len(dtypes) == 1:  # of one specialisation
                continue
            result += [
                Request(file, ONE_TARGET, dtype, block_size=size)
                for size in (BLOCK_SIZES if len(code_bits) > 1 else BLOCK_SIZES[::7])
                if size != 64
            ]
            result += [
                Request(file, ONE_TARGET, dtype, code_bits=bits) for bits in code_bits if bits != 4
            ]
            result.append(Request(file, ONE_TARGET, dtype, double_quant=False))
    return result


def usages(request: Request, log: str) -> list[Usage]:
    """What the compiler's log says of each kernel.

    Raises:
        ValueError: for a log without a kernel.
    """
    result = []
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    for kernel, text in zip(parts[1::2], parts[2::2], strict=True):
        stack = _number(r"(\d+) bytes stack frame", text)
        spills = [_number(rf"(\d+) bytes spill {what}", text) for what in ("stores", "loads")]
        result.append(
            Usage(
                request,
                kernel,
                registers=_number(r"Used (\d+) registers", text),
                shared_bytes=_number(r"(\d+) bytes smem", text, default=0),
                stack_bytes=stack,
                spill_bytes=max(spills),
            )
        )
    if not result:
        raise ValueError(f"no kernel in the compiler's log: {log!r}")
    return sorted(result, key=lambda usage: usage.kernel)


def _number(pattern: str, text: str, default: int | None = None) -> int:
    match = re.search(pattern, text)
    if match is None and default is not None:
        return default
    if match is None:
        raise ValueError(f"no {pattern!r} in {text!r}")
    return int(match[1])


def all_usages() -> list[Usage]:
    """Of all `requests`, compiled by as many threads as there are processors."""
    nvrtc.load()
    with ThreadPoolExecutor() as pool:
        logs = pool.map(lambda request: (request, request.compiled()[1]), requests())
        return [usage for request, log in logs for usage in usages(request, log)]


def table(found: Iterable[Usage]) -> str:
    """As Markdown: a line for each kernel and specialisation, a column for each architecture."""
    _, (major, minor) = nvrtc.load()
    lines = [
        "# Registers and shared memory of the kernels",
        "",
        f"By NVRTC {major}.{minor}: registers a thread / bytes of shared memory that the kernel",
        "declares. A star marks a spill, of which there must be none.",
        "",
        "| " + " | ".join([*COLUMNS, *(f"sm_{target}" for target in TARGETS)]) + " |",
        "|---" * (len(COLUMNS) + len(TARGETS)) + "|",
    ]
    rows: dict[tuple[object, ...], dict[int, str]] = {}
    for usage in found:
        r = usage.request
        double = "yes" if r.double_quant else "no"
        key = (usage.kernel, r.dtype, r.block_size, r.code_bits, double)
        star = "*" if usage.spill_bytes else ""
        cell = f"{usage.registers} / {usage.shared_bytes}{star}"
        rows.setdefault(key, {})[r.capability] = cell
    for key, cells in rows.items():
        columns = [*map(str, key), *(cells.get(target, "") for target in TARGETS)]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(all_usages()))
