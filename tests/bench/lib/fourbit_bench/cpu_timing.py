"""Calls that are timed side by side on the CPU, and what its memory can do.

A call is given the number of its turn, and takes turns through sets of buffers that are together
several times as large as the last-level cache. Calls of one row take turns in batches; the median
of the batches stands for the call. A batch begins with a call that is not timed: after a pause the
threads of OpenMP are asleep, and to wake them takes as long as some products.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F

Call: TypeAlias = Callable[[int], object]
"""Does the work once, with the set of buffers whose turn it is."""

MIB = 1 << 20
CACHES = 3
"""How many times the last-level cache the buffers of a call are together."""
MOST_BYTES = 1536 * MIB
"""And how large at most, where the cache is that of a whole server."""


@dataclass(frozen=True)
class Clock:
    """How long is measured.

    Attributes:
        repetitions: batches of each call.
        batch_seconds: what a batch takes, or one call where that takes longer.
        settling_seconds: before each batch, so that no other call's threads are still spinning.
    """

    repetitions: int = 9
    batch_seconds: float = 0.1
    settling_seconds: float = 0.05

    def median_seconds(self, calls: Sequence[Call]) -> list[float]:
        """The median time of each call."""
        times: list[list[float]] = [[] for _ in calls]
        sizes = [1 for _ in calls]
        turns = [0 for _ in calls]
        for repetition in range(self.repetitions + 1):
            for which, call in enumerate(calls):
                time.sleep(self.settling_seconds)
                if sizes[which] > 1 or not repetition:  # where waking is a part of what is timed
                    call(turns[which])
                started = time.perf_counter()
                for turn in range(sizes[which]):
                    call(turns[which] + 1 + turn)
                seconds = (time.perf_counter() - started) / sizes[which]
                turns[which] += 1 + sizes[which]
                if repetition:
                    times[which].append(seconds)
                else:
                    sizes[which] = max(1, round(self.batch_seconds / seconds))
        return [statistics.median(taken) for taken in times]


FULL = Clock()
QUICK = Clock(repetitions=1, batch_seconds=0.001, settling_seconds=0)


def cache_bytes() -> int:
    """The last-level cache, as Linux tells it; 64 MiB where it does not."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", file.read_text(encoding="ascii").strip())
        if found:
            largest = max(largest, int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found[2]])
    return largest or 64 * MIB


def sets_for(nbytes: int, *, small: bool) -> int:
    """How many sets of so many bytes a call rotates through."""
    together = min(CACHES * cache_bytes(), MOST_BYTES)
    return 2 if small else max(2, math.ceil(together / max(1, nbytes)))


@dataclass(frozen=True)
class Rates:
    """What the memory did in this run, in bytes a second.

    Attributes:
        copy: read and written by torch's copy.
        read: by the fastest of torch's sum and a dense bf16 product with one row.
    """

    copy: float
    read: float


def measure_rates(clock: Clock, *, small: bool) -> Rates:
    """Take them, over buffers larger than the cache."""
    count = (1 if small else 64) * MIB
    sources = [torch.ones(count) for _ in range(sets_for(4 * count, small=small))]
    target = torch.zeros(count)
    matrices = [source.view(torch.bfloat16).view(-1, 4096) for source in sources]
    row = torch.randn(1, 4096).to(torch.bfloat16)
    with torch.inference_mode():
        copied, summed, multiplied = clock.median_seconds(
            [
                lambda i: target.copy_(sources[i % len(sources)]),
                lambda i: sources[i % len(sources)].sum(),
                lambda i: F.linear(row, matrices[i % len(matrices)]),
            ]
        )
    return Rates(2 * target.nbytes / copied, target.nbytes / min(summed, multiplied))


def processor() -> str:
    """Its name, and how many of it this process may use."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else os.uname().machine}"
