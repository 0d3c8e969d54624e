"""The card, rows of measurements, goals, and the table of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

import fourbit
from fourbit import _core, nvrtc
from fourbit_bench import tables
from fourbit_bench.timing import DEVICE, Timing, Timings, compare

OURS = "fourbit"
TORCH = "torch"
BNB = "bitsandbytes"

Floor: TypeAlias = Literal["copy", "read", "GEMM"]
"""What of the card bounds a row: bytes read and written, bytes read, or bf16 operations."""


@dataclass(frozen=True)
class Card:
    """The GPU, and its own rates in this run.

    Attributes:
        facts: for the JSON.
        rates: bytes or operations a second.
    """

    facts: dict[str, object]
    rates: dict[Floor, float]

    def __str__(self) -> str:
        """One line above the table."""
        facts, rates = self.facts, self.rates
        return (
            f"{facts['card']}, driver {facts['driver']}, CUDA {facts['cuda']}, torch "
            f"{facts['torch']}, bitsandbytes {facts['bitsandbytes']}, fourbit {facts['fourbit']}, "
            f"{facts['date']}; copy {rates['copy'] / 1e9:.0f} GB/s (read + written), read "
            f"{rates['read'] / 1e9:.0f} GB/s, bf16 GEMM {rates['GEMM'] / 1e12:.0f} TFLOP/s"
        )


def measure_card(*, small: bool) -> Card:
    """Look at the card and take its rates.

    Bandwidth: torch's copy of 1 GiB, and the fastest of its reductions of 1 GiB. Operations: a
    bf16 product of torch's own, of normal numbers.
    """
    count, side = (1 << 20, 512) if small else (1 << 28, 8192)
    source = torch.randn(count, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (
        torch.randn(side, side, device=DEVICE, dtype=torch.float32).to(torch.bfloat16)
        for _ in range(2)
    )
    output = torch.empty_like(a)
    timings = compare(
        {
            "copy": lambda _: target.copy_(source),
            "sum": lambda _: source.sum(),
            "largest": lambda _: source.amax(),
            "GEMM": lambda _: torch.mm(a, b, out=output),
            # A product with one row reads a matrix once, too.
            "vector": lambda _: F.linear(source[:4096].view(1, -1), source.view(-1, 4096)),
        },
        sets=1,
    )
    seconds = {
        name: timing.milliseconds / 1e3
        for name, timing in timings.items()
        if isinstance(timing, Timing)
    }
    fastest = min(seconds[name] for name in ("sum", "largest", "vector") if name in seconds)
    rates: dict[Floor, float] = {
        "copy": 2 * source.nbytes / seconds["copy"],
        "read": source.nbytes / fastest,
        "GEMM": 2 * side**3 / seconds["GEMM"],
    }
    return Card(_facts(rates), rates)


def _facts(rates: Mapping[Floor, float]) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(DEVICE)
    _, compiler = nvrtc.load()
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "driver_cuda": ".".join(map(str, _core.cuda_driver_version())),
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(map(str, compiler)),
        "torch": torch.__version__,
        "bitsandbytes": _version(),
        "fourbit": fourbit.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rates_per_second": dict(rates),
    }


def _driver() -> str:
    """NVIDIA's number of the driver, which torch does not know."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "of unknown version"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "of unknown version"


def _version() -> str:
    try:
        import bitsandbytes
    except Exception as error:  # it may fail in many ways where its CUDA library does not fit
        return f"missing ({type(error).__name__})"
    return str(bitsandbytes.__version__)


# --- goals ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What a row shall reach.

    Attributes:
        of: the name of another call, or "floor" for the share of the floor.
        limit: of that share; of that call's time over ours; or, with `most`, of ours over its.
        text: how the table says it.
        most: whether the limit must not be passed, and not be reached.
    """

    of: str
    limit: float
    text: str
    most: bool = False


def share(least: float, floor: Floor) -> Goal:
    """At least so much of the card's own rate."""
    return Goal("floor", least, f">= {100 * least:.0f}% of {floor}")


def faster(than: str, least: float) -> Goal:
    """At least so many times as fast as another call."""
    return Goal(than, least, f">= {least:g}x {than}")


def at_most(times: float, of: str) -> Goal:
    """At most so many times the time of another call."""
    return Goal(of, times, f"<= {times:g}x the time of {of}", most=True)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the work.
        timings: by name of the call; the first is ours.
        floor: which rate of the card bounds it.
        amount: bytes moved, or operations.
        goals: what it shall reach.
        remarks: further ratios: name, value, and what it may be at most, or None.
        figures: what else was found, without a goal: name, value, and unit.
    """

    name: str
    timings: Timings
    floor: Floor | None = None
    amount: float | None = None
    goals: Sequence[Goal] = ()
    remarks: Sequence[tuple[str, float, float | None]] = field(default=())
    figures: Sequence[tuple[str, float, str]] = field(default=())

    @property
    def ours(self) -> Timing | str:
        """Our own timing, or why there is none."""
        return next(iter(self.timings.values()))

    def ratio(self, name: str) -> float | None:
        """How many times as long another call takes as ours."""
        ours, other = self.ours, self.timings.get(name)
        if isinstance(ours, Timing) and isinstance(other, Timing):
            return other.milliseconds / ours.milliseconds
        return None

    def share(self, card: Card) -> float | None:
        """Of the card's own rate."""
        if isinstance(self.ours, str) or self.floor is None or self.amount is None:
            return None
        return self.amount / (self.ours.milliseconds / 1e3) / card.rates[self.floor]

    def checked(self, card: Card) -> list[dict[str, Any]]:
        """Goals with what was reached; None for what could not be measured."""
        results: list[dict[str, Any]] = []
        for goal in self.goals:
            value = self.share(card) if goal.of == "floor" else self.ratio(goal.of)
            met = None
            if value is not None:
                value = 1 / value if goal.most else value
                met = value <= goal.limit if goal.most else value >= goal.limit
            results.append({"goal": goal.text, "value": value, "met": met})
        for name, value, most in self.remarks:
            met = None if most is None else value <= most
            text = name if most is None else f"{name} <= {100 * most:g}%"
            results.append({"goal": text, "value": value, "met": met})
        return results

    def as_json(self, card: Card) -> dict[str, Any]:
        """Everything that is known of it."""
        return {
            "row": self.name,
            **_figures(self.ours),
            "floor": self.floor,
            "bytes" if self.floor != "GEMM" else "operations": self.amount,
            "share_of_floor": self.share(card),
            "others": {
                name: {**_figures(timing), "ratio": self.ratio(name)}
                for name, timing in list(self.timings.items())[1:]
            },
            "goals": self.checked(card),
            "figures": {f"{name} [{unit.strip()}]": value for name, value, unit in self.figures},
        }

    def as_cells(self, card: Card) -> list[str]:
        """Its line of the table."""
        reached = self.share(card)
        others = list(self.timings)[1:]
        return [
            self.name,
            _cell(self.ours),
            "" if reached is None else f"{100 * reached:.0f}% of {self.floor}",
            "; ".join(f"{name} {_cell(self.timings[name], self.ratio(name))}" for name in others),
            "; ".join([*map(_verdict, self.checked(card)), *map(_figure, self.figures)]),
        ]


def _figures(timing: Timing | str) -> dict[str, Any]:
    if isinstance(timing, str):
        return {"failed": timing}
    return {
        "median_ms": timing.milliseconds,
        "spread": timing.spread,
        "in_graph": timing.in_graph,
    }


def _cell(timing: Timing | str, ratio: float | None = None) -> str:
    if isinstance(timing, str):
        return f"failed ({timing})"
    time = timing.milliseconds
    text = f"{time:.2f} ms" if time >= 1 else f"{1e3 * time:.1f} us"
    spread = f" ±{50 * timing.spread:.0f}%" if ratio is None else f" ({ratio:.2f}x)"
    return text + spread + ("" if timing.in_graph else ", eager")


def _verdict(goal: Mapping[str, Any]) -> str:
    if goal["value"] is None:
        return f"{goal['goal']}: not measured"
    word = {True: "met", False: "MISSED", None: "no goal"}[goal["met"]]
    value = goal["value"]
    shown = f"{100 * value:.1f}%" if "%" in goal["goal"] else f"{value:.2f}x"
    return f"{goal['goal']}: {shown}, {word}"


def _figure(figure: tuple[str, float, str]) -> str:
    name, value, unit = figure
    return f"{name}: {value:.4g}{unit}"


def table(card: Card, rows: Iterable[Row], *, ours: str = OURS) -> str:
    """All rows; `ours` names the first call of each."""
    columns = ["work", ours, "share", "others (their time over ours)", "goals and figures"]
    return tables.markdown(columns, (row.as_cells(card) for row in rows))
