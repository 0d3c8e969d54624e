"""What a pager on the recording card serves in tests: moments of which every step adds one."""

import contextlib
import ctypes

import numpy as np
import pytest
import torch

from fake_card import FakeCard
from fourbit.optim.paging import pages, unified
from fourbit.optim.paging.pages import Wanted
from fourbit.optim.paging.unified import UnifiedPager

PAGE, GRANULE = 8192, 1024
RESERVE = 2 * GRANULE


@contextlib.contextmanager
def small_pages():
    """Pages of 8 KiB, so that few bytes are many pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "PAGE_BYTES", PAGE)
        patch.setattr(pages, "GRANULE", GRANULE)
        patch.setattr(unified, "GRANULE", GRANULE)
        patch.setattr(unified, "RESERVE", RESERVE)
        patch.setattr(unified, "LEAST_ROOM", 3 * PAGE)
        yield


def wanted_of(elements, dtype=torch.uint8):
    return [Wanted(torch.empty(count), dtype) for count in elements]


def held_by(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=np.uint8)


class Stepper:
    """What a pager serves: moments of uint8, each step of which adds one."""

    def __init__(self, card, pager, elements):
        self.card, self.pager = card, pager
        self.wanted = wanted_of(elements)
        made = pager.add(self.wanted)
        self.moments = {one.param: pair for one, pair in zip(self.wanted, made, strict=True)}
        self.steps = {one.param: 0 for one in self.wanted}

    def launch_of(self, round_):
        """What puts the launch of one visit into the current stream."""
        expected = {param: count % 256 for param, count in self.steps.items()}

        def run(index):
            for param, start, stop, addresses in round_.visits[index]:
                for address in addresses:
                    assert address % 16 == 0, "kernels read so many bytes at once"
                    self.card.touch(address, stop - start)
                    memory = held_by(address, stop - start)
                    assert (memory == expected[param]).all(), "not arrived, or lost"
                    memory += np.uint8(1)

        return lambda index: self.card.put(self.card.main, "do", lambda: run(index))

    def step(self, params=None):
        params = list(self.moments) if params is None else params
        round_ = self.pager.begin({param: self.moments[param] for param in params})
        elements = dict.fromkeys(params, 0)
        launched = []
        launch_in_full = self.launch_of(round_)

        def launch(index):
            launched.append(index)
            for param, start, stop, _ in round_.visits[index]:
                elements[param] += stop - start
            launch_in_full(index)

        round_.run(launch)
        self.card.read(torch.zeros(1))
        round_.finish()
        assert launched == list(range(len(round_.visits)))
        assert elements == {param: param.numel() for param in params}
        for param in params:
            self.steps[param] += 1

    def check(self):
        """What people see between steps, whatever is still under way."""
        for param, pair in self.moments.items():
            for moment in pair:
                assert moment.shape == param.shape
                assert (moment == self.steps[param] % 256).all()


def calm(pager=UnifiedPager, capacity=100 * PAGE, elements=(PAGE, 3 * PAGE, 100)):
    """After two steps: everything is where it is stepped."""
    card = FakeCard(capacity)
    stepper = Stepper(card, pager(card), elements)
    stepper.step()
    stepper.step()
    card.finish()
    card.calls.clear()
    return card, stepper


def is_known(card, pager):
    """Whether the pages that the pager takes to be on the card are those that are."""
    known = {
        piece
        for page in pager._present
        for part in page.ranges
        for piece in card._pieces(part.memory, part.start, part.size)
    }
    return known == set(card.present)


def twenty_pages(fits, keeps):
    """Of which so many fit, after three steps."""
    card = FakeCard(fits * PAGE + RESERVE, keeps=keeps)
    stepper = Stepper(card, UnifiedPager(card), [PAGE // 2] * 20)
    for _ in range(3):
        stepper.step()
    card.finish()
    return card, stepper
