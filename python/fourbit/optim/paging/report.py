"""What paging did: counters of one card, and the report of an optimizer."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from operator import add


@dataclass
class Counters:
    """Of one pager, since it was made.

    Attributes:
        bytes_in: bytes of pages that were brought to the card.
        bytes_out: bytes of pages that were given back.
        faults_avoided: pieces of 2 MiB, the most that one page fault of the card brings, that were
            there before the step came to them.
        seconds_waiting: how long the card's launches waited for pages.
        paged_steps: steps in which any page came or left.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    faults_avoided: int = 0
    seconds_waiting: float = 0.0
    paged_steps: int = 0

    def __add__(self, other: Counters) -> Counters:
        """Of both pagers."""
        return Counters(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class PagingReport:
    """Where an optimizer's state is, and what paging did since the optimizer was made.

    With the pager "unified", the driver may have moved pages to the host for want of memory since
    they were brought, and it does not tell; `resident_bytes` is what was there when it was last
    known. If it may have, all pages are brought in the next step, and all are counted, though those
    that never left cost nothing.

    Attributes:
        pagers: the pager of each device: "unified", "pinned" or "resident".
        reasons: why that one, for each device where ``pager="auto"`` chose.
        pages: how many there are.
        state_bytes: bytes of the moments; the rest of the state, which does not move, is an eighth
            of a byte an element or less.
        resident_bytes: those of them that are beside their parameters.
        bytes_in: bytes of pages that were brought to a card.
        bytes_out: bytes of pages that were given back to the host.
        faults_avoided: pieces of 2 MiB, the most that one page fault of a card brings, that were
            there before the step came to them; only "unified" knows faults.
        seconds_waiting: how long launches on a card waited for pages.
        paged_steps: steps in which any page came or left.
    """

    pagers: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    pages: int = 0
    state_bytes: int = 0
    resident_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    faults_avoided: int = 0
    seconds_waiting: float = 0.0
    paged_steps: int = 0
