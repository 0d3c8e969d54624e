"""Calls that are timed side by side on the GPU.

A call is given the number of a set of buffers, and sets rotate: together they are at least twice as
large as the L2 cache, so that what a call reads is not there from its last turn. Where it can be,
turns through all sets are captured in a CUDA graph, and replays of it are timed: so the kernels are
measured and not Python, ours and others' alike, and outputs are written to the same memory in every
replay. What waits for the card cannot be captured and is timed as it is called.

Times are those of CUDA events around batches of some milliseconds. Batches of all calls take
turns, and the median of the batches stands for the call. The first turn, in which kernels are
compiled and loaded, is not timed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

DEVICE = torch.device("cuda", 0)
REPETITIONS = 15
BATCH_MILLISECONDS = 3.0
# A graph shorter than this would show what starting it takes.
GRAPH_MILLISECONDS = 0.5
MOST_SETS = 64

Call: TypeAlias = Callable[[int], object]
"""Does the work once, with the set of buffers of that number, and returns its outputs."""


@dataclass(frozen=True)
class Timing:
    """What one call takes.

    Attributes:
        milliseconds: the median over batches.
        spread: the distance of the quartiles, as a share of the median.
        in_graph: whether replays of a CUDA graph were timed, and not calls.
    """

    milliseconds: float
    spread: float
    in_graph: bool


Timings: TypeAlias = dict[str, "Timing | str"]
"""By name of the call; in place of the timing of one that failed, why."""


def sets_for(nbytes: int) -> int:
    """How many sets of buffers are twice as large as the L2 cache, if one has so many bytes."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(MOST_SETS, max(3, math.ceil(2 * cache / max(1, nbytes))))


def why(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"


class _Run:
    """A call, ready to be timed in batches."""

    def __init__(self, call: Call, sets: int, *, as_graph: bool) -> None:
        self.call, self.sets = call, sets
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: list[object] = []
        # Turns through the sets in a graph, and graphs, or turns without one, in a batch.
        self.turns, self.repeats = 1, 1
        self.samples: list[float] = []
        self._warm_up()
        if as_graph:
            self._capture()
        batch = self._batch()
        if self.graph is not None and batch < GRAPH_MILLISECONDS:
            self.turns = math.ceil(GRAPH_MILLISECONDS / max(1e-3, batch))
            self._capture()
            batch = self._batch()
        self.repeats = max(1, math.ceil(BATCH_MILLISECONDS / max(1e-3, batch)))

    def _warm_up(self) -> None:
        """On a stream of its own, as torch asks for before a capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._turn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        # Memory that was freed on that stream is of no use to another.
        torch.cuda.empty_cache()

    def _turn(self) -> None:
        # Kept for a turn, or every call would write into the memory of the last, in the cache.
        self.outputs = [self.call(index) for index in range(self.sets)]

    def _capture(self) -> None:
        self.graph, self.outputs = None, []
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(self.turns):
                    self._turn()
        except RuntimeError:
            # It does what a capture forbids; then it is timed as it is called.
            self.outputs, self.turns = [], 1
            torch.cuda.synchronize()
            return
        self.graph = graph

    def _batch(self) -> float:
        """Milliseconds of a graph, or of a turn without one; the mean of as many as a batch has."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        work = self._turn if self.graph is None else self.graph.replay
        start.record()
        for _ in range(self.repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.repeats

    def sample(self) -> str | None:
        """Time a batch; says why that failed, if it did."""
        try:
            self.samples.append(self._batch() / (self.sets * self.turns))
        except Exception as error:
            return why(error)
        return None

    def timing(self) -> Timing:
        low, median, high = statistics.quantiles(self.samples, n=4)
        return Timing(median, (high - low) / median, self.graph is not None)


def compare(calls: Mapping[str, Call | str], sets: int, *, eager: Collection[str] = ()) -> Timings:
    """Time calls side by side; one that fails does not hold up the others.

    Args:
        calls: by name; a text in a call's place says why there is none.
        sets: of buffers, through which every call rotates.
        eager: names of calls to be timed as they are called, and not in a graph.
    """
    results: Timings = {}
    runs: dict[str, _Run] = {}
    for name, call in calls.items():
        if isinstance(call, str):
            results[name] = call
            continue
        try:
            runs[name] = _Run(call, sets, as_graph=name not in eager)
        except Exception as error:
            results[name] = why(error)
    for _ in range(REPETITIONS):
        for name in list(runs):
            failed = runs[name].sample()
            if failed is not None:
                del runs[name]
                results[name] = failed
    for name, run in runs.items():
        results[name] = run.timing()
    return {name: results[name] for name in calls}
