"""What a pager does, and which one a card gets."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fourbit.optim.paging.card import Card
from fourbit.optim.paging.pages import Moments, Wanted
from fourbit.optim.paging.pinned import PinnedPager
from fourbit.optim.paging.report import Counters
from fourbit.optim.paging.resident import ResidentPager
from fourbit.optim.paging.round import Round
from fourbit.optim.paging.unified import UnifiedPager

PagerName: TypeAlias = Literal["auto", "unified", "pinned", "resident"]


class Pager(Protocol):
    """Where the moments of parameters on one device live, and how they come to a step."""

    name: str
    counters: Counters

    @property
    def pages(self) -> int:
        """How many pages there are."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""

    @property
    def resident_bytes(self) -> int:
        """Those of them that are on the card, as far as is known."""

    def add(self, wanted: Sequence[Wanted]) -> list[Moments]:
        """Make moments, zeros: all of them, or none.

        Args:
            wanted: what is to be made; none is empty. A parameter that has moments loses them.

        Raises:
            CudaError: if there is no memory for them.
        """

    def holds(self, param: Tensor, moments: Moments) -> bool:
        """Whether these moments of a parameter are ones it can step."""

    def keep(self, params: Container[Tensor]) -> None:
        """Let go of the moments of all other parameters."""

    def begin(self, moments: dict[Tensor, Moments]) -> Round:
        """What a step of parameters, whose moments it holds, consists of; none is empty."""

    def page_out(self) -> None:
        """Give the card's memory back before somebody else needs it."""

    def page_in(self) -> None:
        """Begin to bring to the card what there is room for."""


class Choice(NamedTuple):
    """A pager that may be made, and why that one.

    Attributes:
        make: makes it.
        reason: a sentence; None if the user named it.
    """

    make: Callable[[], Pager]
    reason: str | None = None


def choices(
    pager: PagerName, device: torch.device, card: Card | None, nbytes: int, *, sharded: bool
) -> list[Choice]:
    """The pagers that a device may have, the best first.

    Args:
        pager: what the user asked for.
        device: where the parameters are.
        card: the card there; None for the CPU.
        nbytes: bytes of all moments that will be there.
        sharded: whether some parameters are distributed.

    Returns:
        One, or with "auto" also those to be tried if there is no memory for it.

    Raises:
        ValueError: if the device cannot do what was asked for; it names a pager that it can.
    """
    resident = Choice(lambda: ResidentPager(device))
    if pager == "resident":
        return [resident]
    if card is None:
        if pager != "auto":
            raise ValueError(
                f'pager "{pager}" needs parameters on a GPU, and these are on {device}; use "auto" '
                'or "resident"'
            )
        return [resident._replace(reason="the parameters are in the processor's memory")]
    unified, pinned = Choice(lambda: UnifiedPager(card)), Choice(lambda: PinnedPager(card))
    shares = card.shares_memory()
    if pager == "unified":
        if not shares:
            other = "resident" if sharded else "pinned"
            raise ValueError(
                f'pager "unified" needs managed memory that the processor and {device} can use at '
                f"the same time, which this system does not have (as with Windows and WSL); use "
                f'"{other}"'
            )
        return [unified]
    if pager == "pinned":
        if sharded:
            other = "unified" if shares else "resident"
            raise ValueError(
                'pager "pinned" keeps state on the host, and the state of sharded parameters must '
                f'be where they are; use "{other}"'
            )
        return [pinned]
    return _automatic(card, nbytes, unified, pinned, resident, shares=shares, sharded=sharded)


def _automatic(
    card: Card,
    nbytes: int,
    unified: Choice,
    pinned: Choice,
    resident: Choice,
    *,
    shares: bool,
    sharded: bool,
) -> list[Choice]:
    last = resident._replace(reason="there was no memory for pages")
    if sharded:
        if shares:
            return [unified._replace(reason="the card and the processor share memory"), last]
        return [
            resident._replace(
                reason="the card and the processor share no memory, and sharded state cannot be "
                "on the host"
            )
        ]
    if not shares:
        reason = "the card and the processor share no memory"
        return [pinned._replace(reason=reason), last]
    total = card.total_bytes()
    if nbytes > total:
        reason = f"the state, {nbytes >> 20} MiB, is larger than the card, {total >> 20} MiB"
        return [pinned._replace(reason=reason), unified._replace(reason=last.reason)]
    return [
        unified._replace(reason="the card and the processor share memory"),
        pinned._replace(reason="there was no managed memory"),
        last,
    ]
