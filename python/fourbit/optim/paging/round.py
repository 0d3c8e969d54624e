"""One round over the moments: what is launched at once, and the copies around the launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from fourbit.optim.paging.card import Card, Event, Stream
from fourbit.optim.paging.pages import Page, Span
from fourbit.optim.paging.schedule import Visit


class Piece(NamedTuple):
    """Elements of a parameter that are stepped, and where their moments will be by then.

    Attributes:
        param: whose they are.
        start: the first element.
        stop: the one after the last.
        addresses: of the first element's moments.
    """

    param: Tensor
    start: int
    stop: int
    addresses: tuple[int, int]


def pieces_of(spans: Sequence[Span], bases: Sequence[int]) -> list[Piece]:
    """What a page is to step.

    Args:
        spans: what it holds of that.
        bases: where its ranges will be.
    """
    pieces = []
    for span in spans:
        first, second = (bases[place.part] + place.offset for place in span.places)
        pieces.append(Piece(span.param, span.start, span.stop, (first, second)))
    return pieces


class Round:
    """A round in which everything is where it is stepped: one launch and nothing else.

    Attributes:
        visits: what each launch is to step.
    """

    def __init__(self, visits: list[list[Piece]]) -> None:
        self.visits = visits

    def run(self, launch: Callable[[int], None]) -> None:
        """Put the launches, and what must come before and after them, into streams.

        Args:
            launch: puts the launch of that visit into the current stream.
        """
        for index in range(len(self.visits)):
            launch(index)

    def finish(self) -> None:
        """Take stock; the processor has waited for the current stream."""


class Streams(NamedTuple):
    """The two directions of the bus, which go side by side, and beside the launches.

    Attributes:
        inward: to the card.
        outward: away from it.
    """

    inward: Stream
    outward: Stream


Waits = list[tuple[Event, Event]]
"""Before and after each moment at which launches waited for a page, in the current stream."""


def run_visits(
    card: Card,
    streams: Streams,
    visits: Sequence[Visit],
    *,
    all_leave: bool,
    bring: Callable[[int, Stream], object],
    launch: Callable[[int], None],
    give_back: Callable[[int, Stream], object],
) -> Waits:
    """Put a schedule into three streams, so that copies run beside launches in both directions.

    A launch waits for its own page alone, a page for the room of those that leave for it, and a
    page leaves when its launch is over. The processor waits for nothing. If a launch fails, the
    pages that are there leave all the same, where all do: some of them have been stepped.

    Args:
        card: whose streams they are.
        streams: for the copies.
        visits: the schedule.
        all_leave: whether pages that were stepped leave in the end.
        bring: puts the copies that bring a page into a stream.
        launch: puts the launch of the visit of that number into the current stream.
        give_back: puts the copies that give a page back into a stream.
    """
    main = card.current_stream()
    # Pages that are still there, the one that was stepped first in front.
    stepped: dict[int, Event] = {}
    waits: Waits = []

    def leave(page: int) -> None:
        event = stepped.pop(page, None)
        if event is not None:
            card.wait(streams.outward, event)
        give_back(page, streams.outward)

    try:
        for index, visit in enumerate(visits):
            for page in visit.leaving:
                leave(page)
            if visit.comes:
                if visit.leaving:
                    # An event may be waited for only once it is recorded: what leaves goes first.
                    card.wait(streams.inward, card.record(streams.outward))
                bring(visit.page, streams.inward)
                arrival = card.record(streams.inward)
                before = card.record(main)
                card.wait(main, arrival)
                waits.append((before, card.record(main)))
            try:
                launch(index)
            finally:
                stepped[visit.page] = card.record(main)
    finally:
        if all_leave:
            for page in list(stepped):
                leave(page)
    return waits


def seconds(card: Card, waits: Waits) -> float:
    """How long launches waited; all of it is over."""
    return sum(card.seconds(before, after) for before, after in waits)


def chosen(pages: Sequence[Page], params: Iterable[Tensor]) -> tuple[list[int], list[list[Span]]]:
    """The pages that hold anything of some parameters, by number, and what each holds of them."""
    numbers, spans = [], []
    known = {id(param) for param in params}  # whose hash is not computed by Python code
    for number, page in enumerate(pages):
        of_page = [span for span in page.spans if id(span.param) in known]
        if of_page:
            numbers.append(number)
            spans.append(of_page)
    return numbers, spans
