"""Registers, shared memory and spills of every kernel, for every architecture: what NVRTC says.

``python tests/kernels/resources.py cuda/RESOURCES.md`` writes the table of them; tests hold it to
having no spills. No GPU is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

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


def requests(*, every: bool) -> list[Request]:
    """What is compiled: every combination of dtype and architecture, and on one architecture every
    block size and width of codes; or, in a fraction of the time, a part in which every kernel is
    compiled for every architecture, and every dtype, the outermost block sizes and every width
    for some.
    """
    result = []
    for file, dtypes, code_bits, _ in _core.kernel_register():
        for dtype, oldest in dtypes:
            main = every or dtype in ("bfloat16", dtypes[0][0] if len(dtypes) == 1 else "")
            targets = [
                target
                for target in TARGETS
                if target >= oldest and (main or target in (oldest, ONE_TARGET))
            ]
            result += [Request(file, target, dtype) for target in targets]
            if len(dtypes) == 1 or not main:  # of one specialisation, or one that stands for it
                continue
            sizes = BLOCK_SIZES if every else (BLOCK_SIZES[0], BLOCK_SIZES[-1])
            result += [
                Request(file, ONE_TARGET, dtype, block_size=size) for size in sizes if size != 64
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


def all_usages(*, every: bool = True) -> list[Usage]:
    """Of all `requests`, compiled by as many threads as there are processors."""
    nvrtc.load()
    with ThreadPoolExecutor() as pool:
        logs = pool.map(lambda request: (request, request.compiled()[1]), requests(every=every))
        return [usage for request, log in logs for usage in usages(request, log)]


Rows: TypeAlias = dict[tuple[str, ...], dict[int, str]]


def rows_of(found: Iterable[Usage]) -> Rows:
    """The table's lines: for each kernel and specialisation, the cell of each architecture."""
    rows: Rows = {}
    for usage in found:
        r = usage.request
        double = "yes" if r.double_quant else "no"
        key = (usage.kernel, r.dtype, str(r.block_size), str(r.code_bits), double)
        star = "*" if usage.spill_bytes else ""
        cell = f"{usage.registers} / {usage.shared_bytes}{star}"
        rows.setdefault(key, {})[r.capability] = cell
    return rows


def compiler() -> str:
    """The NVRTC at hand, as the table names it."""
    _, (major, minor) = nvrtc.load()
    return f"NVRTC {major}.{minor}"


def table(found: Iterable[Usage]) -> str:
    """As Markdown, with the compiler in the first line."""
    lines = [
        f"# Registers and shared memory of the kernels, by {compiler()}",
        "",
        "Registers a thread / bytes of shared memory that the kernel declares (what a launch adds",
        "stands in the kernels' files). A star would mark a spill; there is none. Every dtype is",
        "compiled for every architecture; block sizes, widths of codes and plain scales for one.",
        "",
        "Made by `python tests/kernels/resources.py cuda/RESOURCES.md`: with NVRTC, without a GPU.",
        "",
        "| " + " | ".join([*COLUMNS, *(f"sm_{target}" for target in TARGETS)]) + " |",
        "|---" * (len(COLUMNS) + len(TARGETS)) + "|",
    ]
    for key, cells in rows_of(found).items():
        columns = [*key, *(cells.get(target, "") for target in TARGETS)]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def read(text: str) -> tuple[str, Rows]:
    """What `table` wrote: the compiler, and the lines.

    Raises:
        ValueError: for anything else.
    """
    first, *lines = text.splitlines()
    _, by, made_by = first.partition(", by ")
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    if not by or not cells or cells[0] != [*COLUMNS, *(f"sm_{target}" for target in TARGETS)]:
        raise ValueError(f"no table of resources: {first!r}")
    rows: Rows = {}
    for line in cells[2:]:
        key, of_targets = tuple(line[: len(COLUMNS)]), line[len(COLUMNS) :]
        rows[key] = {t: cell for t, cell in zip(TARGETS, of_targets, strict=True) if cell}
    return made_by, rows


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(all_usages()))
