"""What the pagers that move pages have in common."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from fourbit.optim.paging.card import Card
from fourbit.optim.paging.pages import Moments, Pages
from fourbit.optim.paging.report import Counters
from fourbit.optim.paging.round import Streams


class PagedMoments:
    """The part of a `Pager` that does not depend on where its pages live."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._pages = Pages()
        self._streams: Streams | None = None
        self.counters = Counters()

    @property
    def pages(self) -> int:
        """As `Pager`."""
        return len(self._pages.all)

    @property
    def nbytes(self) -> int:
        """As `Pager`."""
        return self._pages.nbytes

    def holds(self, param: Tensor, moments: Moments) -> bool:
        """As `Pager`."""
        return self._pages.holds(param, moments)

    def keep(self, params: Container[Tensor]) -> None:
        """As `Pager`."""
        self._pages.keep(params)

    def _side_streams(self) -> Streams:
        """Made when they are first needed."""
        if self._streams is None:
            self._streams = Streams(self._card.side_stream(), self._card.side_stream())
        return self._streams
