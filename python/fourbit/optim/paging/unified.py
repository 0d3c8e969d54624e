"""The pager of managed memory, which the driver moves out when it needs room on the card.

In a step, pages that are not on the card are prefetched on a side stream while others are stepped,
and where there is no room for them, those that were stepped are given back on another stream. So
copies go in both directions at once and beside the launches; left to itself the driver would move
one piece a fault, and make room only when it is wanted.

Nothing is ever wrong where this is late or mistaken: the card may read managed memory wherever it
is, only slower. What is to be known for it to be fast is which pages are on the card. The driver
moves pages out when somebody asks for memory and there is none, and it tells nobody. But it has not
done so

- if torch has asked for no memory since the last step, or
- if even at torch's greatest use, all else as now, memory was left.

Then a step in which all pages are there is one launch, as without paging. Otherwise no page is
taken to be there, and all are prefetched; for those that are, that is a short call.

How much room pages have is not what the driver calls free, either. The room of a page that is given
back stays its own until somebody needs it, so it is not free, and yet no page has to leave for the
next that comes. What pages have is found by difference: before the first there was so much free,
and since then torch has taken so much.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from torch import Tensor

from fourbit.optim.paging.card import Allocations, Card, Event, Stream
from fourbit.optim.paging.paged import PagedMoments
from fourbit.optim.paging.pages import GRANULE, PAGE_BYTES, Moments, Page, Wanted
from fourbit.optim.paging.round import (
    Piece,
    Round,
    Waits,
    chosen,
    pieces_of,
    run_visits,
    seconds,
)
from fourbit.optim.paging.schedule import Visit, schedule

RESERVE = 64 * 2**20
"""Bytes of the card that are left alone: below so much the driver may be moving pages out."""

LEAST_ROOM = 3 * PAGE_BYTES
"""Room that pages take in any case: one is stepped while one comes and one leaves."""

LOOK_EVERY = 64
"""Steps after which pages are prefetched though they should be there: others use memory too."""


class UnifiedPager(PagedMoments):
    """As `Pager`."""

    name = "unified"

    def __init__(self, card: Card) -> None:
        super().__init__(card)
        # Pages that are on the card, as far as is known.
        self._present: set[Page] = set()
        # What torch and pages have of the card, and what is free: together.
        self._shared: int | None = None
        # When the pages have come that were brought between steps.
        self._arrival: Event | None = None
        self._seen: Allocations | None = None
        self._steps_since_look = 0

    @property
    def resident_bytes(self) -> int:
        """As `Pager`."""
        return sum(page.nbytes for page in self._pages.all if page in self._present)

    def add(self, wanted: Sequence[Wanted]) -> list[Moments]:
        """As `Pager`."""
        if not wanted:
            return []
        self._look()
        self._room()  # while it is known what older pages have
        moments, pages = self._pages.add(wanted, self._card.managed)
        # The card writes their zeros. If it has no room, the look before the next step finds out,
        # which takes that they are written.
        self._card.synchronize(self._card.current_stream())
        self._present.update(pages)
        self._seen = None
        return moments

    def keep(self, params: Container[Tensor]) -> None:
        """As `Pager`."""
        super().keep(params)
        self._present.intersection_update(self._pages.all)

    def begin(self, moments: dict[Tensor, Moments]) -> Round:
        """As `Pager`."""
        self._look()
        round_ = self._round(moments)
        if self._arrival is not None:
            self._card.wait(self._card.current_stream(), self._arrival)
            self._arrival = None
        return round_

    def _round(self, moments: dict[Tensor, Moments]) -> Round:
        pages = self._pages.all
        numbers, spans = chosen(pages, moments)
        pieces = {
            number: pieces_of(of_page, [part.address for part in pages[number].ranges])
            for number, of_page in zip(numbers, spans, strict=True)
        }
        if all(pages[number] in self._present for number in numbers):
            return Round([[piece for of_page in pieces.values() for piece in of_page]])
        present = [number for number, page in enumerate(pages) if page in self._present]
        room = max(self._room() - RESERVE, LEAST_ROOM)
        plan, _ = schedule(numbers, [page.room for page in pages], present, room)
        return _UnifiedRound(self, plan, [pieces[visit.page] for visit in plan])

    def page_out(self) -> None:
        """As `Pager`. The processor waits until it is done."""
        inward, outward = self._side_streams()
        for before in (self._card.current_stream(), inward):
            self._card.wait(outward, self._card.record(before))
        self._arrival = None
        for page in self._pages.all:
            self._give_back(page, outward)
        self._card.synchronize(outward)

    def page_in(self) -> None:
        """As `Pager`. The processor does not wait."""
        self._look()
        inward, outward = self._side_streams()
        self._card.wait(inward, self._card.record(outward))
        room = self._room() - RESERVE - sum(page.room for page in self._present)
        for page in self._pages.all:
            if page in self._present:
                continue
            room -= page.room
            if room < 0 or not self._bring(page, inward):
                break
        self._arrival = self._card.record(inward)

    def _look(self) -> None:
        """Find out whether the driver may have moved pages out since they were brought."""
        now, before = self._card.allocations(), self._seen
        self._steps_since_look += 1
        if now is not None and now == before and self._steps_since_look < LOOK_EVERY:
            return
        self._seen = now
        if (
            now is None
            or (before is not None and now.peak < before.peak)  # somebody set it back
            or self._card.free_bytes() - (now.peak - now.reserved) < RESERVE
        ):
            # The step will prefetch all of them.
            self._present.clear()
            self._steps_since_look = 0
        elif self._steps_since_look >= LOOK_EVERY:
            # What others did to the card's memory shows in nothing; where they did nothing, this
            # is a few short calls.
            inward = self._side_streams().inward
            for page in self._present:
                self._prefetch(page, inward, to_card=True)
            self._arrival = self._card.record(inward)
            self._steps_since_look = 0

    def _room(self) -> int:
        """Bytes of the card that are free or that pages have, be they there or given back."""
        free, torchs = self._card.free_bytes(), self._card.allocations()
        if torchs is None:
            return free + sum(page.room for page in self._present)
        if self._shared is None:
            self._shared = free + torchs.reserved
        # What others took or gave back since is mistaken for that of pages, but where that would be
        # more than all can have, or less than those have that are there. (Those that are coming may
        # still be shown as free.)
        least = 0 if self._arrival is not None else sum(page.room for page in self._present)
        most = sum(page.room for page in self._pages.all)
        have = min(max(self._shared - torchs.reserved - free, least), most)
        self._shared = free + torchs.reserved + have
        return free + have

    def _bring(self, page: Page, stream: Stream) -> bool:
        if not self._prefetch(page, stream, to_card=True):
            return False
        self._present.add(page)
        self.counters.bytes_in += page.nbytes
        self.counters.faults_avoided += -(-page.nbytes // GRANULE)
        return True

    def _give_back(self, page: Page, stream: Stream) -> None:
        self._prefetch(page, stream, to_card=False)
        if page in self._present:
            self._present.remove(page)
            self.counters.bytes_out += page.nbytes

    def _prefetch(self, page: Page, stream: Stream, *, to_card: bool) -> bool:
        moved = [
            self._card.prefetch(part.memory, part.start, part.size, to_card=to_card, on=stream)
            for part in page.ranges
        ]
        return all(moved)


class _UnifiedRound(Round):
    def __init__(
        self,
        pager: UnifiedPager,
        plan: list[Visit],
        visits: list[list[Piece]],
    ) -> None:
        super().__init__(visits)
        self._pager, self._plan = pager, plan
        self._waits: Waits = []

    def run(self, launch: Callable[[int], None]) -> None:
        pager = self._pager
        pages, card, streams = pager._pages.all, pager._card, pager._side_streams()
        # What is still under way, either way, comes before what is asked for now.
        came, left = card.record(streams.inward), card.record(streams.outward)
        card.wait(streams.inward, left)
        card.wait(streams.outward, came)
        self._waits = run_visits(
            card,
            streams,
            self._plan,
            all_leave=False,
            bring=lambda number, stream: pager._bring(pages[number], stream),
            launch=launch,
            give_back=lambda number, stream: pager._give_back(pages[number], stream),
        )
        pager.counters.paged_steps += 1

    def finish(self) -> None:
        self._pager.counters.seconds_waiting += seconds(self._pager._card, self._waits)
