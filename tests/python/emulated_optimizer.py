"""`PagedAdamW` on a card that is not there: the emulated kernel, over a recording card.

Parameters are on the CPU and taken to be on the card. Launches are work of the card's current
stream, which the card does late.
"""

import ctypes
import struct

import pytest
import torch

import emulated_program
from emulated_program import EmulatedProgram
from fake_card import FakeCard
from fourbit import _core, cuda_ops
from fourbit.optim.paging import card as cards
from fourbit.optim.paging import pages, unified

PAGE = 16 * 1024
GRANULE = 2048
RESERVE = 2 * GRANULE


def patch(monkeypatch: pytest.MonkeyPatch, card: FakeCard) -> None:
    """Put a card, and pages of 16 KiB, in place."""
    emulated_program.patch(monkeypatch)
    monkeypatch.setattr(pages, "PAGE_BYTES", PAGE)
    monkeypatch.setattr(pages, "GRANULE", GRANULE)
    monkeypatch.setattr(unified, "GRANULE", GRANULE)
    monkeypatch.setattr(unified, "RESERVE", RESERVE)
    monkeypatch.setattr(unified, "LEAST_ROOM", 3 * PAGE)
    monkeypatch.setattr(cards, "find", lambda device: card)

    class Program(EmulatedProgram):
        """Launches are put into the current stream."""

        def launch(self, kernel, stream, arguments):
            def work():
                if kernel == "fourbit_adamw":
                    for address, size in _moments(arguments):
                        card.touch(address, size)
                EmulatedProgram.launch(self, kernel, stream, arguments)

            card.put(card.main, "do", work)

    monkeypatch.setattr(cuda_ops, "_program", Program)


def on_cpu(optimizer):
    """The same optimizer as one whose parameters are where they seem to be: the oracle."""
    optimizer._placement._cards[torch.device("cpu")] = None
    return optimizer


def _moments(arguments):
    """Where the moments of a launch lie: addresses and bytes."""
    table, count = arguments[:2]
    size = _core.ADAMW_SEGMENT_BYTES
    memory = (ctypes.c_uint8 * (size * count)).from_address(table)
    for index in range(count):
        segment = bytes(memory[index * size : (index + 1) * size])
        _, _, first, second, _, _, elements = struct.unpack_from("<7Q", segment)
        state_bits = segment[106]
        yield first, elements * state_bits // 8
        yield second, elements * state_bits // 8
