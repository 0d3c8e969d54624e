"""Where all state of an optimizer lives: a pager for each device that has parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence

import torch
from torch import Tensor

from fourbit._core import CudaError
from fourbit.distributed import is_distributed, local
from fourbit.optim.paging import card as cards
from fourbit.optim.paging.card import Card
from fourbit.optim.paging.pager import Pager, PagerName, choices
from fourbit.optim.paging.pages import Moments, Wanted
from fourbit.optim.paging.report import Counters, PagingReport


class Placement:
    """The pagers of an optimizer.

    Args:
        pager: what the user asked for.
    """

    def __init__(self, pager: PagerName) -> None:
        self._pager = pager
        self._cards: dict[torch.device, Card | None] = {}
        self._pagers: dict[torch.device, Pager] = {}
        self._reasons: dict[str, str] = {}
        # What the pagers did of which this one took the place.
        self._before = Counters()

    def renewed(self) -> Placement:
        """Another one, of new pagers, which holds nothing yet but counts on.

        State that is loaded goes there, so that nothing has happened to what there is if it fails.
        """
        new = Placement(self._pager)
        new._cards, new._before = self._cards, self._totals()
        return new

    def _totals(self) -> Counters:
        return sum((pager.counters for pager in self._pagers.values()), self._before)

    def card(self, device: torch.device) -> Card | None:
        """The card of a device; None for the CPU."""
        if device not in self._cards:
            self._cards[device] = cards.find(device)
        return self._cards[device]

    def check(self, param: Tensor) -> None:
        """Check that the pager which the user asked for can be had for a parameter.

        Raises:
            ValueError: naming one that can.
        """
        if self._pager not in ("auto", "resident"):
            device = local(param).device
            choices(self._pager, device, self.card(device), 0, sharded=is_distributed(param))

    def add(self, wanted: Sequence[Wanted], everyone: Sequence[Wanted]) -> list[Moments]:
        """Make moments, zeros: all of them, or none.

        Args:
            wanted: what is to be made.
            everyone: what all parameters of the optimizer will have in the end, which decides
                between pagers.

        Raises:
            ValueError: if a device cannot do what the user asked for.
            CudaError: if there is no memory.
        """
        moments: dict[Tensor, Moments] = {}
        for device in {one.device for one in wanted}:
            # What is empty needs no page.
            filled = [one for one in wanted if one.device == device and one.nbytes]
            made = self._add(device, filled, [one for one in everyone if one.device == device])
            moments.update(zip([one.param for one in filled], made, strict=True))
        return [moments[one.param] if one.nbytes else (one.zeros(), one.zeros()) for one in wanted]

    def _add(
        self, device: torch.device, wanted: Sequence[Wanted], everyone: Sequence[Wanted]
    ) -> list[Moments]:
        if device in self._pagers:
            self._check_sharded(device, wanted)
            return self._pagers[device].add(wanted)
        nbytes = sum(2 * one.nbytes for one in everyone)
        sharded = any(is_distributed(one.param) for one in everyone)
        possible = choices(self._pager, device, self.card(device), nbytes, sharded=sharded)
        for choice in possible:
            pager = choice.make()
            try:
                moments = pager.add(wanted)
            except CudaError:
                if choice is possible[-1]:
                    raise
                continue
            self._pagers[device] = pager
            if choice.reason is not None:
                self._reasons[str(device)] = choice.reason
            return moments
        raise AssertionError("there is a pager for every device")

    def _check_sharded(self, device: torch.device, wanted: Sequence[Wanted]) -> None:
        """What "auto" chose for plain parameters may not do for sharded ones that come later."""
        name = self._pagers[device].name
        if name == "pinned" and any(is_distributed(one.param) for one in wanted):
            choices("pinned", device, self.card(device), 0, sharded=True)

    def holds(self, param: Tensor, moments: Moments) -> bool:
        """Whether these moments of a parameter are ones that its device's pager can step."""
        device = local(param).device
        if device not in self._pagers:
            return False
        empty = not moments[0].numel()
        return moments[0].device == device if empty else self._pagers[device].holds(param, moments)

    def pager(self, device: torch.device) -> Pager:
        """The pager of a device for which moments were made."""
        return self._pagers[device]

    def keep(self, params: Container[Tensor]) -> None:
        """Let go of the moments of all other parameters."""
        for pager in self._pagers.values():
            pager.keep(params)

    def page_out(self) -> None:
        """As `Pager`, on all devices."""
        for pager in self._pagers.values():
            pager.page_out()

    def page_in(self) -> None:
        """As `Pager`, on all devices."""
        for pager in self._pagers.values():
            pager.page_in()

    def report(self, moments: Sequence[tuple[Tensor, Moments]]) -> PagingReport:
        """What the pagers did.

        Args:
            moments: those of all parameters that have any.
        """
        pagers = self._pagers.values()
        paged = {device for device, pager in self._pagers.items() if pager.name != "resident"}
        unpaged = sum(
            first.nbytes + second.nbytes
            for param, (first, second) in moments
            if local(param).device not in paged
        )
        return PagingReport(
            pagers={str(device): pager.name for device, pager in self._pagers.items()},
            reasons=dict(self._reasons),
            pages=sum(pager.pages for pager in pagers),
            state_bytes=unpaged + sum(pager.nbytes for pager in pagers),
            resident_bytes=unpaged + sum(pager.resident_bytes for pager in pagers),
            **dataclasses.asdict(self._totals()),
        )
