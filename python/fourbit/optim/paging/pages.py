"""Pages: moments of many small parameters, or of a part of a large one, that move as one.

Small parameters lie in a page one after the other, both moments of each together. A parameter whose
moments are larger than a page has memory of its own, first all of one moment and then all of the
other, since each is a tensor that people may use; it is cut into pages of one stretch of each.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fourbit.distributed import local
from fourbit.optim.paging.card import Memory

PAGE_BYTES = 16 * 2**20
"""A page's size, or a little less. Copies of so much run at the full speed of a bus of any kind
today, of which they take 0.3 to 1.3 ms; three such pages are little beside what a card has."""

GRANULE = 2 * 2**20
"""The driver moves managed memory in pieces of this size or less, which pages do not share."""

_ALIGNMENT = 512
"""Bytes; torch's own allocator gives tensors the same."""

Moments = tuple[Tensor, Tensor]
"""The first and the second moment of a parameter, as far as this process has them."""


class Wanted(NamedTuple):
    """Moments that are to be made.

    Attributes:
        param: whose they are.
        dtype: theirs: uint8 codes or float32.
    """

    param: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Theirs, on this process."""
        return local(self.param).shape

    @property
    def device(self) -> torch.device:
        """Where the parameter is."""
        return local(self.param).device

    @property
    def nbytes(self) -> int:
        """Bytes of one of them."""
        return self.shape.numel() * self.dtype.itemsize

    def zeros(self) -> Tensor:
        """One of them, as a tensor beside the parameter."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Place(NamedTuple):
    """Where something lies in a page: in which of its ranges, and at which byte of that."""

    part: int
    offset: int


class Span(NamedTuple):
    """Elements of a parameter whose moments a page holds.

    Attributes:
        param: whose they are.
        start: the first element, a multiple of the state's block.
        stop: the one after the last.
        places: where the moments of the first element lie.
    """

    param: Tensor
    start: int
    stop: int
    places: tuple[Place, Place]


class Range(NamedTuple):
    """A stretch of memory.

    Attributes:
        memory: of which it is a part.
        start: its first byte.
        size: its bytes.
    """

    memory: Memory
    start: int
    size: int

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.memory.address + self.start

    def flat(self) -> Tensor:
        """uint8 [size]."""
        return self.memory.part(self.start, self.size)


@dataclass(eq=False)
class Page:
    """What comes and goes as one.

    Attributes:
        ranges: where its bytes are.
        spans: what it holds; fewer when parameters are forgotten.
    """

    ranges: tuple[Range, ...]
    spans: list[Span]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return sum(part.size for part in self.ranges)

    @property
    def room(self) -> int:
        """What it takes on a card, where managed memory comes in granules."""
        return sum(_rounded(part.size, GRANULE) for part in self.ranges)


class Pages:
    """All pages of an optimizer on one card, and which parameters' moments are in them."""

    def __init__(self) -> None:
        self.all: list[Page] = []
        self._addresses: dict[Tensor, tuple[int, int]] = {}

    def add(
        self, wanted: Sequence[Wanted], allocate: Callable[[int], Memory]
    ) -> tuple[list[Moments], list[Page]]:
        """Make moments, zeros, in new pages: all of them, or none if memory cannot be had.

        Args:
            wanted: what is to be made; none is empty. A parameter that has moments loses them.
            allocate: gives memory of a size.

        Returns:
            The moments, and the new pages.
        """
        moments: dict[Tensor, Moments] = {}
        pages: list[Page] = []
        together: list[Wanted] = []
        size = 0
        for one in wanted:
            own_size = 2 * _aligned(one.nbytes)
            if own_size > PAGE_BYTES:
                pages += _large(one, allocate, moments)
                continue
            if size + own_size > PAGE_BYTES:
                pages.append(_small(together, allocate, moments))
                together, size = [], 0
            together.append(one)
            size += own_size
        if together:
            pages.append(_small(together, allocate, moments))
        self._drop({one.param for one in wanted})
        self.all += pages
        for param, (first, second) in moments.items():
            self._addresses[param] = first.data_ptr(), second.data_ptr()
        return [moments[one.param] for one in wanted], pages

    def holds(self, param: Tensor, moments: Moments) -> bool:
        """Whether these are the parameter's moments that `add` made."""
        first, second = moments
        return self._addresses.get(param) == (first.data_ptr(), second.data_ptr())

    def keep(self, params: Container[Tensor]) -> None:
        """Drop the moments of all other parameters, and pages that hold nothing else.

        Their memory goes when nobody uses the tensors any more.
        """
        self._drop({param for param in self._addresses if param not in params})

    def _drop(self, params: set[Tensor]) -> None:
        gone = {param for param in params if self._addresses.pop(param, None) is not None}
        if not gone:
            return
        for page in self.all:
            page.spans = [span for span in page.spans if span.param not in gone]
        self.all = [page for page in self.all if page.spans]

    @property
    def nbytes(self) -> int:
        """Of all pages."""
        return sum(page.nbytes for page in self.all)


def _small(
    together: Sequence[Wanted], allocate: Callable[[int], Memory], moments: dict[Tensor, Moments]
) -> Page:
    size = sum(2 * _aligned(one.nbytes) for one in together)
    memory = allocate(_rounded(size, GRANULE))
    memory.part(0, size).zero_()
    spans, offset = [], 0
    for one in together:
        second = offset + _aligned(one.nbytes)
        moments[one.param] = _moment(memory, offset, one), _moment(memory, second, one)
        places = Place(0, offset), Place(0, second)
        spans.append(Span(one.param, 0, one.shape.numel(), places))
        offset = second + _aligned(one.nbytes)
    return Page((Range(memory, 0, size),), spans)


def _large(
    one: Wanted, allocate: Callable[[int], Memory], moments: dict[Tensor, Moments]
) -> list[Page]:
    second = _rounded(one.nbytes, GRANULE)
    memory = allocate(2 * second)
    memory.part(0, 2 * second).zero_()
    moments[one.param] = _moment(memory, 0, one), _moment(memory, second, one)
    pages = []
    for start in range(0, one.nbytes, PAGE_BYTES // 2):
        size = min(PAGE_BYTES // 2, one.nbytes - start)
        first, stop = start // one.dtype.itemsize, (start + size) // one.dtype.itemsize
        ranges = Range(memory, start, size), Range(memory, second + start, size)
        pages.append(Page(ranges, [Span(one.param, first, stop, (Place(0, 0), Place(1, 0)))]))
    return pages


def _moment(memory: Memory, start: int, one: Wanted) -> Tensor:
    return memory.part(start, one.nbytes).view(one.dtype).view(one.shape)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _aligned(size: int) -> int:
    return _rounded(size, _ALIGNMENT)
