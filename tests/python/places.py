"""Where tests of paging run: on the first GPU, and on the recording card, which every machine has.

A test that takes the fixture ``place`` runs twice: marked ``cuda`` on the card, and on the CPU with
the emulated kernel and pages of 16 KiB. So what the test itself does has been tried before a card
sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emulated_optimizer
from emulated_optimizer import PAGE as EMULATED_PAGE
from fake_card import FakeCard
from fourbit import PagedAdamW, _core
from fourbit.optim.paging import pages, unified
from kernel_calls import same_bytes
from on_card import CARD

PAGERS = ["resident", "unified", "pinned"]
PAGED = PAGERS[1:]

# Small ones, which keep 32-bit state, tails, an empty one; and with pages as `Place.cramp` makes
# them, two that are larger than a page, with state of either width.
SHAPES = {
    "card": [(5,), (64, 65), (0, 3), (4096,), (), (1024, 1025), (3, 700, 1100)],
    "emulated": [(5,), (64, 65), (0, 3), (4096,), (), (17, 301), (3, 7, 900)],
}


class Place:
    """The first GPU, or the recording card.

    Attributes:
        name: "card" or "emulated".
        device: where parameters are; the CPU, if it is the recording card.
        fake: the recording card.
    """

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = name
        self._patch = monkeypatch
        self.fake: FakeCard | None = None
        self.device = CARD
        if name == "card":
            # What earlier tests took tells nothing of this one: pagers look at the peak.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(CARD)
        else:
            self.device = torch.device("cpu")
            self.fake = FakeCard(1000 * EMULATED_PAGE)
            emulated_optimizer.patch(monkeypatch, self.fake)

    def cramp(self) -> None:
        """From now on pages are small, and few of them fit: every step moves some."""
        if self.fake is not None:
            self.fake.capacity = 4 * EMULATED_PAGE + emulated_optimizer.RESERVE
            return
        # The card is not filled: the pager is told that hardly any of it may be used. The driver
        # moves pieces of 64 KiB as well, only slower.
        for module in (pages, unified):
            self._patch.setattr(module, "GRANULE", 64 << 10)
        self._patch.setattr(pages, "PAGE_BYTES", 512 << 10)
        self._patch.setattr(unified, "LEAST_ROOM", 3 * (512 << 10))
        self._patch.setattr(unified, "RESERVE", 1 << 60)

    def shapes(self) -> list[tuple[int, ...]]:
        return SHAPES[self.name]

    def parameters(
        self, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = ()
    ) -> list[nn.Parameter]:
        """The same numbers each time."""
        return [param_to(param, self.device) for param in on_cpu(shapes or self.shapes(), dtype)]

    def unpaged(
        self,
        dtype: torch.dtype = torch.float32,
        shapes: Sequence[tuple[int, ...]] = (),
        **options: Any,
    ) -> PagedAdamW:
        """The oracle: an optimizer of the same parameters, stepped by the Rust core on the CPU."""
        optimizer = PagedAdamW(on_cpu(shapes or self.shapes(), dtype), **options)
        return optimizer if self.fake is None else emulated_optimizer.on_cpu(optimizer)

    def card(self, optimizer: PagedAdamW) -> Any:
        """What the pagers of an optimizer ask."""
        return optimizer._placement.card(self.device)

    def in_use(self) -> tuple[int, int]:
        """Pieces of the driver's memory, and their bytes."""
        if self.fake is None:
            return _core.card_memory_in_use()
        return len(self.fake.live), sum(self.fake.live.values())


def on_cpu(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in shapes]


def param_to(param: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(param.detach().to(device, copy=True))


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_gradients(number: int, *optimizers: torch.optim.Optimizer) -> None:
    """The same gradients everywhere, of magnitudes over six decades."""
    source = torch.Generator().manual_seed(1000 + number)
    for params in zip(*map(params_of, optimizers), strict=True):
        shape = params[0].shape
        scale = 10 ** (-6 * torch.rand(shape, generator=source))
        gradient = torch.randn(shape, generator=source) * scale
        for param in params:
            param.grad = gradient.to(param.device, param.dtype, copy=True)


def train(numbers: Sequence[int], *optimizers: torch.optim.Optimizer) -> None:
    for number in numbers:
        set_gradients(number, *optimizers)
        for optimizer in optimizers:
            optimizer.step()


def assert_same(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Parameters and state, bit for bit, wherever they are."""
    for ours, theirs in zip(params_of(found), params_of(expected), strict=True):
        assert_same_tensors(ours, theirs, "the parameter")
        state, expected_state = found.state[ours], expected.state[theirs]
        assert state.keys() == expected_state.keys()
        for field in state:
            assert_same_tensors(state[field], expected_state[field], field)


def assert_same_tensors(found: Tensor, expected: Tensor, what: str) -> None:
    found, expected = found.detach().cpu(), expected.detach().cpu()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    assert same_bytes(found.reshape(-1), expected.reshape(-1)), what
