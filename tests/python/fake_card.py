"""A card for pagers, without one: it records what it is asked for, and does it late.

Work in a stream is kept until something waits for it, and then done in an order that is drawn at
random among those that streams and events allow. So what a pager forgets to wait for is, in some
order, not there yet: staging memory holds garbage until a copy has arrived and again after it has
left, and of managed memory the card knows which pieces are on it.

The driver's part of managed memory is modelled: a capacity, shared with torch's own memory; a
piece that is wanted on the card drives out the one that was wanted longest ago. The room of a piece
that was sent home stays its own, and is not free, until somebody needs it: so does NVIDIA's driver
(``uvm_pmm_gpu.h`` of its open kernel modules, "unused" root chunks), unless a test wants another.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fourbit import CudaError
from fourbit.optim.paging import pages
from fourbit.optim.paging.card import Allocations

GARBAGE = 0xA5


@dataclass(eq=False)
class FakeEvent:
    """A moment in a stream."""

    over_at: int | None = None


@dataclass(eq=False)
class FakeStream:
    """Work that is not done yet: events to wait for and to set, and what is to be called."""

    name: str
    work: deque[tuple[str, FakeEvent | Callable[[], None]]] = field(default_factory=deque)


class FakeMemory:
    """Memory of the driver's; counted until nothing refers to it."""

    def __init__(self, card: FakeCard, kind: str, size: int) -> None:
        memory = np.full(size, GARBAGE, dtype=np.uint8)
        self._memory = memory
        self.size = size
        self.address = memory.ctypes.data
        self.number = card.next_number()
        self.kind = kind
        card.live[self.number] = size
        card.memories[self.number] = weakref.ref(self)
        weakref.finalize(memory, card.freed, self.number)

    def part(self, start: int, size: int) -> Tensor:
        assert 0 <= start < start + size <= self.size
        return torch.from_numpy(self._memory[start : start + size])


class FakeCard:
    """As ``fourbit.optim.paging.card.Card``, over memory of the host.

    Args:
        capacity: bytes of memory.
        shares: whether it can do managed memory.
        keeps: whether pieces that were sent home keep their room while nobody needs it.
        seed: of the order in which work is done.
        eager: how much work is done as soon as it may be: 0 none, 1 all.
    """

    def __init__(
        self,
        capacity: int = 2**40,
        *,
        shares: bool = True,
        keeps: bool = True,
        seed: int = 0,
        eager: float = 0.3,
        device: str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.capacity = capacity
        self.shares = shares
        self.keeps = keeps
        self.eager = eager
        self.random = random.Random(seed)
        self.main = FakeStream("main")
        self.streams = [self.main]
        self.time = 0
        self.waits = 0
        self.numbers = 0
        # What is allocated, by number, and which pieces of managed memory are on the card, the one
        # that was wanted longest ago first.
        self.live: dict[int, int] = {}
        self.memories: dict[int, weakref.ref[FakeMemory]] = {}
        self.present: dict[tuple[int, int], None] = {}
        # Those that are at home and have room on the card all the same.
        self.kept: dict[tuple[int, int], None] = {}
        self.torch = Allocations(1, 0, 0)
        # Of the driver's own doing: pieces that it drove out, and that a launch found missing.
        self.evictions = 0
        self.faults = 0
        self.bytes_moved = {"in": 0, "out": 0}
        self.fail_allocation: set[str] = set()
        self.refuse_prefetch = False
        self.calls: list[str] = []

    # --- memory -----------------------------------------------------------------------------------

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def freed(self, number: int) -> None:
        del self.live[number], self.memories[number]
        self.present = {piece: None for piece in self.present if piece[0] != number}
        self.kept = {piece: None for piece in self.kept if piece[0] != number}

    def find(self, address: int) -> FakeMemory | None:
        """The driver's memory that an address lies in."""
        for reference in list(self.memories.values()):
            memory = reference()
            if memory is None:
                continue
            if memory.address <= address < memory.address + memory.size:
                return memory
        return None

    def shares_memory(self) -> bool:
        return self.shares

    def total_bytes(self) -> int:
        return self.capacity

    def free_bytes(self) -> int:
        self.calls.append("free_bytes")
        pieces = len(self.present) + len(self.kept)
        return self.capacity - self.torch.reserved - pieces * pages.GRANULE

    def allocations(self) -> Allocations | None:
        return self.torch

    def allocate_plainly(self, size: int) -> None:
        """As torch does: the driver makes room for it."""
        reserved = self.torch.reserved + size
        self.torch = Allocations(self.torch.calls + 1, reserved, max(self.torch.peak, reserved))
        self._make_room()
        if self.torch.reserved > self.capacity:
            raise torch.OutOfMemoryError("the card is full")

    def free_plainly(self, size: int) -> None:
        self.torch = self.torch._replace(reserved=self.torch.reserved - size)

    def _make_room(self) -> None:
        room = max(0, self.capacity - self.torch.reserved)
        while (len(self.present) + len(self.kept)) * pages.GRANULE > room:
            if self.kept:
                del self.kept[next(iter(self.kept))]
                continue
            del self.present[next(iter(self.present))]
            self.evictions += 1

    def managed(self, size: int) -> FakeMemory:
        self._check_allocation("managed", size)
        memory = FakeMemory(self, "managed", size)
        reference = weakref.ref(memory)

        def written() -> None:
            if (found := reference()) is not None:
                self._want(found, 0, size)

        # It is nowhere until it is written, which a kernel does next.
        self.put(self.main, "do", written)
        return memory

    def page_locked(self, size: int) -> FakeMemory:
        self._check_allocation("page_locked", size)
        return FakeMemory(self, "page-locked", size)

    def _check_allocation(self, kind: str, size: int) -> None:
        self.calls.append(kind)
        if kind in self.fail_allocation:
            raise CudaError(f"no {kind} memory of {size} bytes")

    def staging(self, size: int) -> Tensor:
        memory = torch.full((size,), GARBAGE, dtype=torch.uint8)
        # It was somebody's whose work, in the same stream, is not done yet.
        self.put(self.main, "do", lambda: memory.fill_(GARBAGE))
        return memory

    # --- streams ----------------------------------------------------------------------------------

    def current_stream(self) -> FakeStream:
        return self.main

    def side_stream(self) -> FakeStream:
        self.streams.append(FakeStream(f"side {len(self.streams)}"))
        return self.streams[-1]

    def put(self, stream: FakeStream, what: str, work: FakeEvent | Callable[[], None]) -> None:
        """Put work into a stream; some work, of any stream, is done."""
        stream.work.append((what, work))
        while self.random.random() < self.eager and self._advance():
            pass

    def _advance(self) -> bool:
        """Do one piece of work that may be done; False if there is none."""

        def may(stream: FakeStream) -> bool:
            if not stream.work:
                return False
            what, work = stream.work[0]
            return what != "wait" or work.over_at is not None

        possible = [stream for stream in self.streams if may(stream)]
        if not possible:
            return False
        what, work = self.random.choice(possible).work.popleft()
        self.time += 1
        if what == "record":
            work.over_at = self.time
        elif what == "do":
            work()
        return True

    def synchronize(self, stream: FakeStream) -> None:
        self.waits += 1
        while stream.work:
            assert self._advance(), "streams wait for each other"

    def finish(self) -> None:
        """Do all work."""
        while self._advance():
            pass
        assert not any(stream.work for stream in self.streams), "streams wait for each other"

    def record(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent()
        self.put(stream, "record", event)
        return event

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        self.put(stream, "wait", event)

    def seconds(self, before: FakeEvent, after: FakeEvent) -> float:
        assert before.over_at is not None
        assert after.over_at is not None
        return float(after.over_at - before.over_at)

    def read(self, numbers: Tensor) -> list[int]:
        self.synchronize(self.main)
        return numbers.tolist()

    # --- moving -----------------------------------------------------------------------------------

    def copy(self, target: Tensor, source: Tensor, *, on: FakeStream) -> None:
        self.calls.append("copy")

        def do() -> None:
            target.copy_(source)
            if self.find(target.data_ptr()) is not None:
                # A page went home; what it leaves behind is nobody's.
                source.fill_(GARBAGE)

        self.put(on, "do", do)

    def prefetch(
        self, memory: FakeMemory, start: int, size: int, *, to_card: bool, on: FakeStream
    ) -> bool:
        self.calls.append("prefetch")
        assert memory.kind == "managed"
        assert 0 <= start < start + size <= memory.size
        assert start % pages.GRANULE == 0, "another page's piece would move too"
        if to_card and self.refuse_prefetch:
            return False
        move = self._want if to_card else self._send_home
        self.put(on, "do", lambda: move(memory, start, size))
        return True

    @staticmethod
    def _pieces(memory: FakeMemory, start: int, size: int) -> list[tuple[int, int]]:
        first, last = start // pages.GRANULE, (start + size - 1) // pages.GRANULE
        return [(memory.number, piece) for piece in range(first, last + 1)]

    def _want(self, memory: FakeMemory, start: int, size: int) -> None:
        for piece in self._pieces(memory, start, size):
            if piece not in self.present:
                self.bytes_moved["in"] += pages.GRANULE
            self.present.pop(piece, None)
            self.kept.pop(piece, None)
            self.present[piece] = None
            self._make_room()

    def _send_home(self, memory: FakeMemory, start: int, size: int) -> None:
        for piece in self._pieces(memory, start, size):
            if piece in self.present:
                del self.present[piece]
                self.bytes_moved["out"] += pages.GRANULE
                if self.keeps:
                    self.kept[piece] = None

    def touch(self, address: int, size: int) -> None:
        """A launch uses memory; it counts pieces of managed memory that are not there."""
        memory = self.find(address)
        if memory is None:
            return  # torch's own, such as staging
        assert memory.kind == "managed", "a launch uses memory of the host"
        for piece in self._pieces(memory, address - memory.address, size):
            if piece in self.present:
                self.present.pop(piece)
                self.present[piece] = None
            else:
                self.faults += 1
