"""What is in a model folder, as a table, a summary and JSON."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from fourbit.cli import screen

if TYPE_CHECKING:
    from fourbit.checkpoint import CheckpointInfo


@dataclass(frozen=True)
class Row:
    """A tensor of the model, or several that differ in their layer's number only.

    Attributes:
        name: of the tensor; layers that were put together have a star for their number.
        shape: before quantization.
        stored_as: dtype, or codebook and block size.
        nbytes: in the files, scales and tables included.
        quantized: whether it is.
        tensors: how many there are.
        reason: why it is quantized or not, where the folder records it.
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    nbytes: int
    quantized: bool
    tensors: int = 1
    reason: str | None = None

    @property
    def numbers(self) -> int:
        """Elements before quantization."""
        return self.tensors * math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """Every tensor of a model folder.

    Attributes:
        path: the folder.
        format_version: of our additions to the files; None for those of other programs.
        rows: one a tensor, in natural order.
    """

    path: str
    format_version: int | None
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, info: CheckpointInfo) -> Contents:
        """The parts of quantized weights put together, other tensors as they are."""
        nbytes = {tensor.name: tensor.bytes for tensor in info.tensors}
        parts = {part for weight in info.quantized for part in weight.parts.values()}
        rows = [
            Row(
                weight.name,
                weight.shape,
                f"{weight.codebook}, blocks of {weight.block_size}"
                + (", scales in 8 bits" if weight.double_quant else ""),
                sum(nbytes[part] for part in set(weight.parts.values())),
                quantized=True,
                reason=weight.reason,
            )
            for weight in info.quantized
        ]
        rows += [
            Row(
                tensor.name,
                tensor.shape,
                tensor.dtype,
                tensor.bytes,
                quantized=False,
                reason=tensor.reason,
            )
            for tensor in info.tensors
            if tensor.name not in parts
        ]
        rows.sort(key=lambda row: _natural(row.name))
        return cls(str(info.path), info.format_version, tuple(rows))

    def table(self, *, every: bool = False) -> Table:
        """For a terminal.

        Args:
            every: a line for each tensor, not for each kind of tensor.
        """
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("tensor", overflow="fold")
        table.add_column("shape", no_wrap=True)
        table.add_column("stored as", no_wrap=True)
        table.add_column("bits a number", justify="right", no_wrap=True)
        table.add_column("size", justify="right", no_wrap=True)
        explained = any(row.reason for row in self.rows)
        if explained:
            table.add_column("why", overflow="fold")
        for row in self.rows if every else _grouped(self.rows):
            shape = str(list(row.shape))
            table.add_row(
                screen.plain(row.name),
                screen.plain(f"{row.tensors} x {shape}" if row.tensors > 1 else shape),
                row.stored_as,
                f"{_bits(row.nbytes, row.numbers):.3f}" if row.numbers else "",
                screen.size(row.nbytes),
                *([screen.plain(row.reason or "")] if explained else ()),
            )
        return table

    def summary(self) -> list[str]:
        """Lines for people: what is quantized, what is not, and the whole."""
        quantized, plain = self._halves()
        whole = f"{screen.count(_numbers(self.rows))} parameters, {screen.size(_size(self.rows))}"
        if not quantized:
            return [f"not quantized: {whole}"]
        writer = (
            "another program, in bitsandbytes' layout"
            if self.format_version is None
            else f"fourbit, format {self.format_version}"
        )
        lines = [
            f"{title:<15}{screen.plural(len(rows), 'tensor')}, {screen.count(_numbers(rows))} "
            f"parameters, {screen.size(_size(rows))}"
            for title, rows in (("quantized:", quantized), ("not quantized:", plain))
        ]
        lines[0] += f" ({_bits(_size(quantized), _numbers(quantized)):.3f} bits a parameter)"
        return [
            *lines,
            f"{'in all:':<15}{whole} ({_bits(_size(self.rows), _numbers(self.rows)):.3f} bits a "
            "parameter)",
            f"{'written by:':<15}{writer}",
        ]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        halves = zip(("quantized", "plain"), self._halves(), strict=True)
        return {
            "path": self.path,
            "format_version": self.format_version,
            **{
                name: {"tensors": len(rows), "parameters": _numbers(rows), "bytes": _size(rows)}
                for name, rows in halves
            },
            "parameters": _numbers(self.rows),
            "bytes": _size(self.rows),
            "bits_per_parameter": _bits(_size(self.rows), _numbers(self.rows)),
            "stored_as": dict(Counter(row.stored_as for row in self.rows)),
            "tensors": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "stored_as": row.stored_as,
                    "bytes": row.nbytes,
                    "quantized": row.quantized,
                    "reason": row.reason,
                }
                for row in self.rows
            ],
        }

    def _halves(self) -> tuple[list[Row], list[Row]]:
        return [r for r in self.rows if r.quantized], [r for r in self.rows if not r.quantized]


def _numbers(rows: Iterable[Row]) -> int:
    return sum(row.numbers for row in rows)


def _size(rows: Iterable[Row]) -> int:
    return sum(row.nbytes for row in rows)


def _bits(nbytes: int, numbers: int) -> float:
    return 8 * nbytes / max(1, numbers)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _grouped(rows: Iterable[Row]) -> list[Row]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name)
        key = (kind, row.shape, row.stored_as, row.quantized, row.reason)
        groups.setdefault(key, []).append(row)
    return [
        Row(kind, shape, stored_as, _size(members), quantized, len(members), reason)
        if len(members) > 1
        else members[0]
        for (kind, shape, stored_as, quantized, reason), members in groups.items()
    ]
