"""What pagers ask of a card, and the card that torch and the driver give.

The pagers know nothing else of CUDA, so that tests put a card in its place which records what is
asked for and plays the streams in any order that they allow.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fourbit import _core

Stream: TypeAlias = Any
"""Work of a card in a fixed order: a handle that only its card understands."""

Event: TypeAlias = Any
"""A moment in a stream: a handle that only its card understands."""


class Memory(Protocol):
    """Memory of the driver's; freed when nothing refers to it or to a part of it any more."""

    @property
    def address(self) -> int:
        """Where it begins, for the card and the processor."""

    def part(self, start: int, size: int) -> Tensor:
        """Some of its bytes: uint8 [size].

        It has a storage of its own, so that whoever saves or copies it takes nothing else along.
        """


class Allocations(NamedTuple):
    """What torch has of the card's memory: if it does not change, torch asked for none.

    Attributes:
        calls: how often torch has asked the driver for memory.
        reserved: bytes that it has, in use or not.
        peak: the most that it ever had.
    """

    calls: int
    reserved: int
    peak: int


class Card(Protocol):
    """One card, as far as pagers need it. Work is put into streams and not waited for."""

    @property
    def device(self) -> torch.device:
        """Where tensors on it are."""

    def shares_memory(self) -> bool:
        """Whether it and the processor may use managed memory at the same time."""

    def total_bytes(self) -> int:
        """Its memory."""

    def free_bytes(self) -> int:
        """Memory that nobody has: neither torch, nor managed memory that is there, nor others."""

    def allocations(self) -> Allocations | None:
        """Torch's own memory; None where torch does not say."""

    def managed(self, size: int) -> Memory:
        """Managed memory, at home on the card, which the driver moves out when it needs room.

        Raises:
            CudaError: if there is none.
        """

    def page_locked(self, size: int) -> Memory:
        """Memory of the host that is never moved, so that the card can copy it by itself.

        Raises:
            CudaError: if there is none.
        """

    def staging(self, size: int) -> Tensor:
        """uint8 [size] on the card, from torch, for work of the current stream."""

    def current_stream(self) -> Stream:
        """Torch's."""

    def side_stream(self) -> Stream:
        """A new one."""

    def record(self, stream: Stream) -> Event:
        """The moment at which all work that is now in the stream is done."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let later work of a stream wait for an event of another; the processor goes on."""

    def synchronize(self, stream: Stream) -> None:
        """Let the processor wait until a stream is empty."""

    def seconds(self, before: Event, after: Event) -> float:
        """The time between two events that are over."""

    def prefetch(self, memory: Memory, start: int, size: int, *, to_card: bool, on: Stream) -> bool:
        """Move bytes of managed memory. False: there is no room, and they stay where they are."""

    def copy(self, target: Tensor, source: Tensor, *, on: Stream) -> None:
        """Copy between the card and page-locked memory."""

    def read(self, numbers: Tensor) -> list[int]:
        """What a tensor holds once the current stream has got there: waits for the card."""


class _Part:
    """Bytes of memory of the driver's for torch or NumPy, which refer to this as their owner."""

    def __init__(self, memory: _core.CardMemory, start: int, size: int) -> None:
        # What is asked for bears the name of the protocol that it is asked by.
        name = "__cuda_array_interface__" if memory.kind == "managed" else "__array_interface__"
        interface = {
            **getattr(memory, name),
            "data": (memory.address + start, False),
            "shape": (size,),
        }
        setattr(self, name, interface)
        self.memory = memory


class _Memory:
    """As `Memory`, over the core's."""

    def __init__(self, core: _core.CardMemory, device: torch.device) -> None:
        self.core = core
        self.address = core.address
        self._device = device

    def part(self, start: int, size: int) -> Tensor:
        """As `Memory`."""
        import numpy as np

        owner = _Part(self.core, start, size)
        if self.core.kind == "managed":
            part = torch.as_tensor(owner, device=self._device)
        else:
            part = torch.from_numpy(np.asarray(owner))
        if part.data_ptr() != self.address + start:
            raise RuntimeError("torch copied memory of the driver instead of sharing it")
        return part


class TorchCard:
    """As `Card`: an NVIDIA GPU that torch sees."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)

    def shares_memory(self) -> bool:
        """As `Card`."""
        return _core.card_can_page(self.device.index)

    def total_bytes(self) -> int:
        """As `Card`."""
        return _core.card_free_memory(self.device.index)[1]

    def free_bytes(self) -> int:
        """As `Card`."""
        return _core.card_free_memory(self.device.index)[0]

    def allocations(self) -> Allocations | None:
        """As `Card`. With cudaMallocAsync, which counts no calls, the bytes alone tell."""
        statistics = torch.cuda.memory_stats_as_nested_dict(self.device)
        try:
            reserved = statistics["reserved_bytes"]["all"]
            calls = statistics["num_device_alloc"]
            return Allocations(int(calls), int(reserved["current"]), int(reserved["peak"]))
        except KeyError:
            return None

    def managed(self, size: int) -> Memory:
        """As `Card`."""
        memory = _core.CardMemory.managed(self.device.index, size)
        return _Memory(memory, self.device)

    def page_locked(self, size: int) -> Memory:
        """As `Card`."""
        memory = _core.CardMemory.page_locked(self.device.index, size)
        return _Memory(memory, self.device)

    def staging(self, size: int) -> Tensor:
        """As `Card`."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def current_stream(self) -> torch.cuda.Stream:
        """As `Card`."""
        return torch.cuda.current_stream(self.device)

    def side_stream(self) -> torch.cuda.Stream:
        """As `Card`."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """As `Card`."""
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """As `Card`."""
        stream.wait_event(event)

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        """As `Card`."""
        stream.synchronize()

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        """As `Card`."""
        milliseconds: float = before.elapsed_time(after)
        return milliseconds / 1000

    def prefetch(
        self, memory: Memory, start: int, size: int, *, to_card: bool, on: torch.cuda.Stream
    ) -> bool:
        """As `Card`."""
        assert isinstance(memory, _Memory)
        return memory.core.prefetch(start, size, to_card=to_card, stream=on.cuda_stream)

    def copy(self, target: Tensor, source: Tensor, *, on: torch.cuda.Stream) -> None:
        """As `Card`."""
        with torch.cuda.stream(on):
            target.copy_(source, non_blocking=True)

    def read(self, numbers: Tensor) -> list[int]:
        """As `Card`."""
        values: list[int] = numbers.tolist()
        return values


def find(device: torch.device) -> Card | None:
    """The card of a device; None where there is none, as on the CPU."""
    return TorchCard(device) if device.type == "cuda" else None
