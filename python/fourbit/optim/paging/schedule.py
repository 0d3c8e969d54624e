"""In what order pages come to the card, are stepped and leave it: arithmetic alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Visit(NamedTuple):
    """One page's turn.

    Attributes:
        page: its number.
        comes: whether it must be brought first.
        leaving: pages that are given back before that, in this order.
    """

    page: int
    comes: bool
    leaving: tuple[int, ...]


def schedule(
    order: Sequence[int], sizes: Sequence[int], present: Collection[int], room: int
) -> tuple[list[Visit], list[int]]:
    """Visits to pages such that as few bytes as can be are moved.

    Pages that are there are visited first. When one has to come and there is no room, those that
    are not visited at all leave, and then those that were visited longest ago. What is left at the
    end the next round begins with, so that of pages that are all visited in every round only those
    move for which there is no room: fewer cannot. Always in the same order and the least recently
    used out, as a driver does it, every page would move in every round.

    Args:
        order: the pages to visit, each once.
        sizes: bytes of each page.
        present: pages that are there.
        room: bytes that pages may take. A page larger than it still comes, alone.

    Returns:
        The visits, and the pages that are there at the end: those visited longest ago first.
    """
    visited = set(order)
    idle = deque(page for page in sorted(present) if page not in visited)
    done: deque[int] = deque()
    used = sum(sizes[page] for page in present)
    visits = []
    for page in sorted(order, key=lambda page: page not in present):  # keeps the order otherwise
        leaving = []
        if page not in present:
            while used + sizes[page] > room and (idle or done):
                leaving.append((idle or done).popleft())
                used -= sizes[leaving[-1]]
            used += sizes[page]
        visits.append(Visit(page, page not in present, tuple(leaving)))
        done.append(page)
    return visits, [*idle, *done]
