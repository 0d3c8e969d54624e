"""What paging costs: where all state fits, where half of it is out, after a spike, and by the call.

Where memory is to be short, plain allocations take the rest of the card; they are given back before
the next row. Managed memory is that of one optimizer's state, and never more than `MOST_OF_CARD`.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fourbit
from fourbit.optim.paging import unified
from fourbit.optim.paging.card import find
from fourbit.optim.paging.pages import PAGE_BYTES
from fourbit_bench.optimizers import BYTES, LR
from fourbit_bench.report import BNB, OURS, Goal, Row, at_most
from fourbit_bench.timing import DEVICE, Call, Timing, Timings, compare, why
from fourbit_bench.weights import bitsandbytes

# LoRA matrices: 16.8 and 167.8 million parameters.
SHAPE, SMALL_SHAPE = (64, 4096), (64, 64)
TENSORS = (64, 640)
RESIDENT, PINNED, FUSED = "resident", "pinned", "torch fused"
BOTH_WAYS = "copies both ways"
OVERHEAD, OF_COPIES = 1.01, 0.8
# Of the card's memory that managed memory may take.
MOST_OF_CARD = 0.5
# Beside what is to fit: lots in which the driver takes memory, and what a step takes.
MARGIN = 192 << 20
COPY_BYTES, HOST_BYTES = 64 << 20, 512 << 20
REPETITIONS = 7


def rows(*, small: bool) -> Iterator[Row]:
    """Every part; one that fails does not lose the others' figures."""
    shape = SMALL_SHAPE if small else SHAPE
    parts: list[Iterator[Row]] = []
    for tensors in TENSORS:
        tensors = tensors // 16 if small else tensors
        parts += [_fits(shape, tensors, bits) for bits in (8, 32)]
    tensors = TENSORS[-1] // (16 if small else 1)
    parts += [_half_out(shape, tensors, pager, small=small) for pager in ("unified", "pinned")]
    parts += [_spike(shape, tensors), _out_and_in(shape, tensors), _calls(shape, tensors)]
    for part in parts:
        try:
            yield from part
        except Exception as error:
            yield Row(f"paging: {part.__name__.lstrip('_')}", {OURS: why(error)})
        tidy()


def tidy() -> None:
    """Let go of what nobody uses. Pagers look at torch's greatest use: from now on."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)


def free_bytes() -> int:
    """Of the card's memory."""
    return torch.cuda.mem_get_info(DEVICE)[0]


def take(size: int) -> object:
    """Plain memory, until nothing refers to it."""
    return torch.zeros(size, dtype=torch.uint8, device=DEVICE)


@contextlib.contextmanager
def only(room: int) -> Iterator[None]:
    """So many bytes of the card are free, for now."""
    tidy()
    held, left = [], free_bytes() - room
    try:
        while left > 0:
            held.append(take(min(left, 1 << 30)))
            left -= 1 << 30
        yield
    finally:
        held.clear()
        tidy()


def _parameters(shape: tuple[int, int], tensors: int) -> list[nn.Parameter]:
    """With gradients that stay. In bf16, so that more of the memory is state."""
    parameters = []
    for _ in range(tensors):
        parameter = nn.Parameter(torch.randn(shape, device=DEVICE).to(torch.bfloat16))
        parameter.grad = (1e-3 * torch.randn(shape, device=DEVICE)).to(torch.bfloat16)
        parameters.append(parameter)
    return parameters


def _ours(parameters: list[nn.Parameter], bits: int, pager: str) -> fourbit.PagedAdamW:
    _check_size(sum(parameter.numel() for parameter in parameters) * bits // 4)
    return fourbit.PagedAdamW(parameters, lr=LR, state_bits=bits, pager=pager)  # type: ignore[arg-type]


def _check_size(state_bytes: int) -> None:
    _, total = torch.cuda.mem_get_info(DEVICE)
    if state_bytes > MOST_OF_CARD * total:
        raise RuntimeError(f"{state_bytes >> 20} MiB of managed memory is much for this card")


def _theirs(parameters: list[nn.Parameter], bits: int) -> torch.optim.Optimizer:
    library = bitsandbytes()
    if isinstance(library, str):
        raise ImportError(library)
    _check_size(sum(parameter.numel() for parameter in parameters) * bits // 4)
    made = library.optim.PagedAdamW8bit if bits == 8 else library.optim.PagedAdamW32bit
    optimizer: torch.optim.Optimizer = made(parameters, lr=LR)
    return optimizer


def _named(shape: tuple[int, int], tensors: int) -> str:
    return f"{tensors * shape[0] * shape[1] / 1e6:.1f} M parameters in {tensors} tensors"


# --- all fits -------------------------------------------------------------------------------------


def _fits(shape: tuple[int, int], tensors: int, bits: int) -> Iterator[Row]:
    tidy()
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        OURS: lambda parameters: _ours(parameters, bits, "unified"),
        RESIDENT: lambda parameters: _ours(parameters, bits, "resident"),
        PINNED: lambda parameters: _ours(parameters, bits, "pinned"),
        f"{BNB} paged": lambda parameters: _theirs(parameters, bits),
        FUSED: lambda parameters: torch.optim.AdamW(parameters, lr=LR, fused=True),
    }
    calls: dict[str, Call | str] = {}
    ours: list[Any] = []
    for name, make in makers.items():
        try:
            optimizer = make(_parameters(shape, tensors))
        except Exception as error:
            calls[name] = why(error)
            continue
        ours += [optimizer] if name == OURS else []
        calls[name] = _stepper(optimizer)
    timings = compare(calls, 1, eager=set(calls))
    moved = ours[0].paging_report().paged_steps if ours else 0
    yield Row(
        f"AdamW {bits}-bit, unified, all fits, {_named(shape, tensors)}",
        timings,
        "copy",
        # Of BYTES, 12 are those of a float32 parameter and gradient: half of it in bf16.
        (BYTES[bits] - 6) * tensors * shape[0] * shape[1],
        [at_most(OVERHEAD, RESIDENT)],
        figures=[("steps that moved pages", moved, "")],
    )


def _stepper(optimizer: torch.optim.Optimizer) -> Call:
    return lambda _: optimizer.step()


# --- half is out ----------------------------------------------------------------------------------


def _half_out(shape: tuple[int, int], tensors: int, pager: str, *, small: bool) -> Iterator[Row]:
    tidy()
    parameters = _parameters(shape, tensors)
    copies = _Copies(small=small)
    state = 8 * tensors * shape[0] * shape[1]
    with only(state // 2 + unified.RESERVE + MARGIN):
        optimizer = _ours(parameters, 32, pager)
        before = optimizer.paging_report()
        for _ in range(6):
            before = optimizer.paging_report()
            optimizer.step()
        after = optimizer.paging_report()
        moved = after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out
        if not any(moved):
            raise RuntimeError("no page moves: the card has room for all")
        calls: dict[str, Call | str] = {
            OURS: _stepper(optimizer),
            BOTH_WAYS: copies.call(*moved),
            "in alone": copies.call(moved[0], 0),
            "out alone": copies.call(0, moved[1]),
        }
        timings = compare(calls, 1, eager=set(calls))
    figures = [("of the state moves", 100 * moved[0] / after.state_bytes, "%")]
    for name, size in (
        (OURS, moved[0]),
        (BOTH_WAYS, moved[0]),
        ("in alone", moved[0]),
        ("out alone", moved[1]),
    ):
        figures += _rate(f"{name}, each way" if name in (OURS, BOTH_WAYS) else name, size, timings)
    goal = f">= {100 * OF_COPIES:g}% of {BOTH_WAYS}"
    yield Row(
        f"AdamW 32-bit, {pager}, half the state fits, {_named(shape, tensors)}",
        timings,
        goals=[Goal(BOTH_WAYS, OF_COPIES, goal)],
        figures=figures,
    )


def _rate(label: str, size: int, timings: Timings) -> list[tuple[str, float, str]]:
    timing = timings.get(label.removesuffix(", each way"))
    if not isinstance(timing, Timing):
        return []
    return [(label, size / timing.milliseconds / 1e6, " GB/s")]


class _Copies:
    """Copies between page-locked memory of torch's and the card, in pieces of a page."""

    def __init__(self, *, small: bool) -> None:
        host, card = (1 << 16, 1 << 13) if small else (HOST_BYTES, COPY_BYTES)
        self._piece = min(PAGE_BYTES, card)
        self._host = [torch.zeros(host, dtype=torch.uint8).pin_memory() for _ in range(2)]
        self._card = [torch.zeros(card, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        self._streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]

    def call(self, inward: int, outward: int) -> Call:
        """Copies so many bytes to the card, and so many from it, side by side."""

        def pieces(size: int, host: torch.Tensor, card: torch.Tensor) -> Iterator[Any]:
            for start in range(0, size, self._piece):
                count = min(self._piece, size - start)
                here, there = start % host.numel(), start % card.numel()
                yield host[here : here + count], card[there : there + count]

        def call(_: int) -> None:
            main = torch.cuda.current_stream(DEVICE)
            for stream in self._streams:
                stream.wait_stream(main)
            into = pieces(inward, self._host[0], self._card[0])
            out_of = pieces(outward, self._host[1], self._card[1])
            with torch.cuda.stream(self._streams[0]):
                for host, card in into:
                    card.copy_(host, non_blocking=True)
            with torch.cuda.stream(self._streams[1]):
                for host, card in out_of:
                    host.copy_(card, non_blocking=True)
            for stream in self._streams:
                main.wait_stream(stream)

        return call


# --- spikes, and leaving before them --------------------------------------------------------------


def _timed(work: Callable[[], object]) -> float:
    """Milliseconds of work, with the card idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _timing(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, (high - low) / median, in_graph=False)


def _spike(shape: tuple[int, int], tensors: int) -> Iterator[Row]:
    """Steps after plain memory was asked for that only half of the state left for."""
    tidy()
    state = 8 * tensors * shape[0] * shape[1]
    optimizer = _ours(_parameters(shape, tensors), 32, "unified")
    samples: dict[str, list[float]] = {name: [] for name in ("calm", "spike", "first", "second")}
    came = []
    with only(state + unified.RESERVE + 2 * MARGIN):
        for _ in range(3):
            optimizer.step()
        for _ in range(REPETITIONS):
            samples["calm"].append(_timed(optimizer.step))
            size = free_bytes() + state // 2
            held: list[object] = []
            samples["spike"].append(_timed(lambda size=size, held=held: held.append(take(size))))
            held.clear()
            torch.cuda.empty_cache()
            before = optimizer.paging_report().bytes_in
            samples["first"].append(_timed(optimizer.step))
            came.append(optimizer.paging_report().bytes_in - before)
            samples["second"].append(_timed(optimizer.step))
            # What comes late shows in neither.
            for _ in range(3):
                optimizer.step()
    timings: Timings = {
        OURS: _timing(samples["first"]),
        "the step after it": _timing(samples["second"]),
        "a step before": _timing(samples["calm"]),
        "the spike's own allocation": _timing(samples["spike"]),
    }
    yield Row(
        f"the step after a spike, {_named(shape, tensors)}",
        timings,
        figures=[("brought", statistics.median(came) / 1e6, " MB")],
    )


def _out_and_in(shape: tuple[int, int], tensors: int) -> Iterator[Row]:
    tidy()
    optimizer = _ours(_parameters(shape, tensors), 32, "unified")
    for _ in range(3):
        optimizer.step()
    state = optimizer.paging_report().state_bytes
    copies = _Copies(small=shape == SMALL_SHAPE)
    out, into, first = [], [], []
    copied: dict[str, list[float]] = {"out": [], "in": []}
    freed = []
    for _ in range(REPETITIONS):
        torch.cuda.synchronize()
        before = free_bytes()
        out.append(_timed(optimizer.page_out))
        freed.append(free_bytes() - before)
        into.append(_timed(optimizer.page_in))
        first.append(_timed(optimizer.step))
        copied["out"].append(_timed(lambda: copies.call(0, state)(0)))
        copied["in"].append(_timed(lambda: copies.call(state, 0)(0)))
    for way, samples in (("out", out), ("in", into)):
        timings: Timings = {
            OURS: _timing(samples),
            "pinned copy": _timing(copied[way]),
            "the step after page_in": _timing(first),
        }
        rates = _rate(OURS, state, timings) + _rate("pinned copy", state, timings)
        shown = ("shown as free then", 100 * statistics.median(freed) / state, "% of the state")
        figures = [*rates, shown] if way == "out" else rates
        yield Row(f"page_{way}, {_named(shape, tensors)}", timings, figures=figures)


# --- calls ----------------------------------------------------------------------------------------


def _calls(shape: tuple[int, int], tensors: int) -> Iterator[Row]:
    """What questions and prefetches of what is there take of the processor: a call."""
    tidy()
    optimizer = _ours(_parameters(shape, tensors), 32, "unified")
    for _ in range(3):
        optimizer.step()
    card = find(DEVICE) if DEVICE.type == "cuda" else optimizer._placement.card(DEVICE)
    pager: Any = optimizer._placement.pager(DEVICE)
    assert card is not None
    stream = card.side_stream()
    pages = pager._pages.all
    ranges = [part for page in pages for part in page.ranges]

    def prefetch() -> None:
        for part in ranges:
            card.prefetch(part.memory, part.start, part.size, to_card=True, on=stream)

    prefetch()
    torch.cuda.synchronize()
    for name, work, calls in (
        ("cuMemPrefetchAsync of a page that is there", prefetch, len(ranges)),
        ("card_free_memory", lambda: [card.free_bytes() for _ in range(50)], 50),
        ("torch's memory_stats", lambda: [card.allocations() for _ in range(50)], 50),
        ("paging_report", lambda: [optimizer.paging_report() for _ in range(5)], 5),
    ):
        samples, until_done = [], []
        for _ in range(REPETITIONS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            samples.append(1e3 * (time.perf_counter() - start) / calls)
            torch.cuda.synchronize()
            until_done.append(1e3 * (time.perf_counter() - start) / calls)
        timings: Timings = {OURS: _timing(samples)}
        if work is prefetch:
            timings["until the card is done"] = _timing(until_done)
        yield Row(f"{name}, a call", timings, figures=[("calls in a row", calls, "")])
