"""The pager that does not page: moments are plain tensors beside their parameters."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from fourbit.optim.paging.pages import Moments, Wanted
from fourbit.optim.paging.report import Counters
from fourbit.optim.paging.round import Piece, Round


class ResidentPager:
    """As `Pager`, for any device."""

    name = "resident"
    pages = 0
    nbytes = 0
    resident_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.counters = Counters()

    def add(self, wanted: Sequence[Wanted]) -> list[Moments]:
        """As `Pager`."""
        return [(one.zeros(), one.zeros()) for one in wanted]

    def holds(self, param: Tensor, moments: Moments) -> bool:
        """As `Pager`: whether they are on its device."""
        return all(moment.device == self._device for moment in moments)

    def keep(self, params: Container[Tensor]) -> None:
        """As `Pager`."""

    def begin(self, moments: dict[Tensor, Moments]) -> Round:
        """As `Pager`."""
        pieces = [
            Piece(param, 0, first.numel(), (first.data_ptr(), second.data_ptr()))
            for param, (first, second) in moments.items()
        ]
        return Round([pieces])

    def page_out(self) -> None:
        """As `Pager`: nothing moves."""

    def page_in(self) -> None:
        """As `Pager`: nothing moves."""
