"""The pager of cards that cannot share memory with the processor: Windows, WSL, some others.

Pages live in page-locked memory of the host. In a step each is copied to a staging buffer on the
card, stepped there, and copied back. There are three buffers: while one is stepped, the next page
arrives in the second and the page before leaves the third, both directions of the bus at once.

A step so takes as long as copying all pages takes in one direction, at the speed of the bus. The
buffers are torch's memory, taken for the step and given back to torch's cache after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fourbit.optim.paging.card import Card, Stream
from fourbit.optim.paging.paged import PagedMoments
from fourbit.optim.paging.pages import Moments, Page, Span, Wanted
from fourbit.optim.paging.report import Counters
from fourbit.optim.paging.round import (
    Round,
    Streams,
    Waits,
    chosen,
    pieces_of,
    run_visits,
    seconds,
)
from fourbit.optim.paging.schedule import schedule

BUFFERS = 3


class PinnedPager(PagedMoments):
    """As `Pager`."""

    name = "pinned"
    resident_bytes = 0

    def add(self, wanted: Sequence[Wanted]) -> list[Moments]:
        """As `Pager`."""
        return self._pages.add(wanted, self._card.page_locked)[0]

    def begin(self, moments: dict[Tensor, Moments]) -> Round:
        """As `Pager`."""
        numbers, spans = chosen(self._pages.all, moments)
        pages = [self._pages.all[number] for number in numbers]
        return _PinnedRound(self._card, self._side_streams(), pages, spans, self.counters)

    def page_out(self) -> None:
        """As `Pager`: between steps nothing is on the card."""

    def page_in(self) -> None:
        """As `Pager`: pages come when they are stepped."""


class _PinnedRound(Round):
    def __init__(
        self,
        card: Card,
        streams: Streams,
        pages: list[Page],
        spans: list[list[Span]],
        counters: Counters,
    ) -> None:
        self._card, self._streams, self._pages, self._counters = card, streams, pages, counters
        self._waits: Waits = []
        # Taken while the current stream is torch's: what it had there before is over by then.
        size = max(map(_staged_bytes, pages), default=0)
        count = min(BUFFERS, len(pages))
        self._buffers = [card.staging(size) for _ in range(count)]
        visits = [
            pieces_of(of_page, [buffer.data_ptr() for buffer in self._parts(number)])
            for number, of_page in enumerate(spans)
        ]
        super().__init__(visits)

    def _parts(self, number: int) -> list[Tensor]:
        """Where the ranges of a page are while it is on the card."""
        # The schedule gives a page the buffer of the one that left for it, in turns.
        buffer, parts, start = self._buffers[number % BUFFERS], [], 0
        for part in self._pages[number].ranges:
            parts.append(buffer[start : start + part.size])
            start += _staged(part.size)
        return parts

    def _bring(self, number: int, stream: Stream) -> None:
        for target, source in zip(self._parts(number), self._pages[number].ranges, strict=True):
            self._card.copy(target, source.flat(), on=stream)
        self._counters.bytes_in += self._pages[number].nbytes

    def _give_back(self, number: int, stream: Stream) -> None:
        for source, target in zip(self._parts(number), self._pages[number].ranges, strict=True):
            self._card.copy(target.flat(), source, on=stream)
        self._counters.bytes_out += self._pages[number].nbytes

    def run(self, launch: Callable[[int], None]) -> None:
        if not self.visits:
            return
        main = self._card.current_stream()
        inward, outward = self._streams
        # The buffers may still be in use by what the current stream did before.
        self._card.wait(inward, self._card.record(main))
        order = range(len(self.visits))
        visits, _ = schedule(order, [1] * len(order), (), BUFFERS)
        try:
            self._waits = run_visits(
                self._card,
                self._streams,
                visits,
                all_leave=True,
                bring=self._bring,
                launch=launch,
                give_back=self._give_back,
            )
        except BaseException:
            # Nobody will read the flags, which is when the state is the processor's again.
            self._card.synchronize(outward)
            raise
        finally:
            # The state is the processor's again, and the buffers torch's, when this is over.
            self._card.wait(main, self._card.record(inward))
            self._card.wait(main, self._card.record(outward))
        self._counters.paged_steps += 1

    def finish(self) -> None:
        self._counters.seconds_waiting += seconds(self._card, self._waits)
        self._buffers, self._waits = [], []


def _staged(size: int) -> int:
    """Bytes after which the next range may begin, aligned for the kernels' widest accesses."""
    return -(-size // 512) * 512


def _staged_bytes(page: Page) -> int:
    return sum(_staged(part.size) for part in page.ranges)
