"""Rows of ``cpu.py``, their goals, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fourbit_bench import tables
from fourbit_bench.cpu_timing import MIB, Rates

OURS, DENSE = "fourbit", "torch"
BNB, REPACKED = "bitsandbytes", "bitsandbytes repacked"
COLUMNS = (OURS, DENSE, BNB, REPACKED)

Floor: TypeAlias = Literal["copy", "read"]


@dataclass(frozen=True)
class Goal:
    """What a row shall reach.

    Attributes:
        text: how the table says it, without the limit.
        value: what was reached.
        limit: of the value.
        most: whether the value must not be above the limit, and not not below.
    """

    text: str
    value: float
    limit: float
    most: bool = False

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.value <= self.limit if self.most else self.value >= self.limit

    def __str__(self) -> str:
        """One line."""
        relation, verdict = "<=" if self.most else ">=", "met" if self.met else "NOT MET"
        return f"{self.text} {self.value:.2f}, goal {relation} {self.limit:g}: {verdict}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the work.
        seconds: by column; ours first.
        amount: bytes that ours has to move.
        floor: of which rate that is bounded.
        faster: (column, how many times as long as ours it shall take at least).
        at_most: (column, how many times its time ours may take).
        share: of the floor's rate, that ours shall reach.
        goals: others.
        peaks: peak memory in bytes, by column.
        remark: what else is to be known.
    """

    name: str
    seconds: Mapping[str, float]
    amount: float | None = None
    floor: Floor = "read"
    faster: Sequence[tuple[str, float]] = ()
    at_most: Sequence[tuple[str, float]] = ()
    share: float | None = None
    goals: Sequence[Goal] = ()
    peaks: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""

    def of_floor(self, rates: Rates) -> float | None:
        """The share of the machine's rate."""
        if self.amount is None:
            return None
        return self.amount / self.seconds[OURS] / getattr(rates, self.floor)

    def all_goals(self, rates: Rates) -> list[Goal]:
        """With what was reached; those against calls that were not timed are left out."""
        ours, found = self.seconds[OURS], []
        for column, limit in self.faster:
            if column in self.seconds:
                found.append(Goal(f"{column} / {OURS}", self.seconds[column] / ours, limit))
        for column, limit in self.at_most:
            if column in self.seconds:
                text = f"{OURS} / {column}"
                found.append(Goal(text, ours / self.seconds[column], limit, most=True))
        share = self.of_floor(rates)
        if self.share is not None and share is not None:
            found.append(Goal(f"of {self.floor} bandwidth", share, self.share))
        return [*found, *self.goals]

    def as_json(self, rates: Rates) -> dict[str, Any]:
        """Everything that is known of it."""
        ours = self.seconds[OURS]
        return {
            "row": self.name,
            "milliseconds": {name: 1e3 * value for name, value in self.seconds.items()},
            "ratios": {name: value / ours for name, value in self.seconds.items() if name != OURS},
            "bytes": self.amount,
            "floor": self.floor,
            "share_of_floor": self.of_floor(rates),
            "peak_bytes": dict(self.peaks),
            "goals": [
                {"goal": g.text, "value": g.value, "limit": g.limit, "met": g.met}
                for g in self.all_goals(rates)
            ],
            "remark": self.remark,
        }

    def as_cells(self, rates: Rates) -> list[str]:
        """Its line of the table."""
        share = self.of_floor(rates)
        ours = self.seconds[OURS]

        def time(column: str) -> str:
            if column not in self.seconds:
                return ""
            value = self.seconds[column]
            text = f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.2f} s"
            return text if column == OURS else f"{text} ({value / ours:.2f}x)"

        peaks = "; ".join(f"{name} {value / MIB:.0f} MiB" for name, value in self.peaks.items())
        notes = [*map(str, self.all_goals(rates)), *([f"peak: {peaks}"] if peaks else [])]
        return [
            self.name,
            *map(time, COLUMNS),
            "" if share is None else f"{100 * share:.0f}% of {self.floor}",
            "; ".join([*notes, *([self.remark] if self.remark else [])]),
        ]


def from_figures(row: Mapping[str, Any]) -> Row:
    """A row of `adamw_cpu`, which knows bitsandbytes' and torch's time, and goals against them."""
    columns = {OURS: "fourbit_ms", DENSE: "torch_ms", BNB: "bitsandbytes_ms"}
    faster, at_most = row.get("goal"), row.get("torch_goal")
    return Row(
        name=row["row"],
        seconds={name: row[key] / 1e3 for name, key in columns.items() if row.get(key)},
        amount=row["bytes_per_second"] * row["fourbit_ms"] / 1e3,
        floor="copy",
        faster=[] if faster is None else [(BNB, faster)],
        at_most=[] if at_most is None else [(DENSE, at_most)],
    )


def table(rows: Iterable[Row], rates: Rates) -> str:
    """All rows; in brackets, how many times as long as ours."""
    columns = ["work", *COLUMNS, "share", "goals"]
    return tables.markdown(columns, (row.as_cells(rates) for row in rows))
