"""Paged optimizers on a GPU: the bytes of the step on the CPU, wherever their pages are.

How to run: see ``on_card.py``. The same tests run on the recording card, too: see ``places.py``.
What only a card can show, its memory and its streams, is in ``test_cuda_paging_memory.py`` and
``test_cuda_paging_spike.py``.
"""

import copy
import gc
import pickle

import pytest
import torch

from adamw_steps import saved_and_loaded
from fourbit import PagedAdamW
from places import (
    PAGED,
    PAGERS,
    assert_same,
    assert_same_tensors,
    params_of,
    set_gradients,
    train,
)
from tensors import DTYPES

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.02}


def made(place, pager, **options):
    return PagedAdamW(place.parameters(options.pop("dtype", torch.float32)), pager=pager, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pager", PAGERS)
def test_the_bytes_of_the_cpu_while_pages_move(place, pager, bits, dtype):
    place.cramp()
    options = {"state_bits": bits, **OPTIONS}
    expected = place.unpaged(dtype, **options)
    paged = made(place, pager, dtype=dtype, **options)
    for step in range(7):
        if step in (3, 5):
            paged.page_out()
        if step in (4, 5):
            paged.page_in()
        train([step], expected, paged)
        assert_same(paged, expected)
    report = paged.paging_report()
    assert report.pagers == {str(place.device): pager}
    if pager == "resident":
        assert (report.pages, report.paged_steps) == (0, 0)
    else:
        assert report.pages > 4
        assert report.paged_steps >= 5
        assert report.bytes_in > report.state_bytes
        assert report.bytes_out > report.state_bytes


@pytest.mark.parametrize("pager", PAGED)
def test_parameters_that_have_no_gradient_in_some_steps(place, pager):
    place.cramp()
    expected, paged = place.unpaged(), made(place, pager)
    for step in range(6):
        set_gradients(step, expected, paged)
        for optimizer in (expected, paged):
            for index, param in enumerate(params_of(optimizer)):
                if step and (index + step) % 3 == 0:
                    param.grad = None
            optimizer.step()
    assert_same(paged, expected)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pager", PAGED)
def test_pages_of_their_real_size(place, pager, bits):
    """Where all fit: a parameter of three pages, one of a part, and steps that move nothing."""
    elements = {"card": {8: 20_000_000, 32: 5_000_000}, "emulated": {8: 20_000, 32: 5000}}
    shapes = [(elements[place.name][bits],), (40, 3), (7,)]
    expected = place.unpaged(shapes=shapes, state_bits=bits)
    paged = PagedAdamW(place.parameters(shapes=shapes), pager=pager, state_bits=bits)
    train(range(4), expected, paged)
    assert_same(paged, expected)
    report = paged.paging_report()
    assert report.pages == 4
    assert report.paged_steps == (0 if pager == "unified" else 4)


@pytest.mark.parametrize("pager", PAGED)
def test_a_gradient_that_is_not_finite_skips_all_of_its_parameter(place, pager):
    place.cramp()
    expected, paged = place.unpaged(), made(place, pager)
    train(range(2), expected, paged)
    set_gradients(2, expected, paged)
    for optimizer in (expected, paged):
        params_of(optimizer)[-1].grad[-1, -1, -1] = float("-inf")
        with pytest.warns(RuntimeWarning, match="skipped the update of parameter 6"):
            optimizer.step()
    assert_same(paged, expected)
    train([3], expected, paged)
    assert_same(paged, expected)


@pytest.mark.parametrize("pager", PAGED)
def test_state_is_right_as_soon_as_a_step_returns(place, pager):
    """For whoever reads it: a copy to the CPU, a file, a sum on the card."""
    place.cramp()
    expected, paged = place.unpaged(), made(place, pager)
    for step in range(3):
        train([step], expected)
        set_gradients(step, paged)
        paged.step()
        states = [paged.state_dict(), saved_and_loaded(paged.state_dict())]
        twin = expected.state_dict()["state"]
        for found in states:
            for index, fields in twin.items():
                for field, value in fields.items():
                    assert_same_tensors(found["state"][index][field], value, field)
        # No rounding: codes, in integers.
        codes = paged.state[params_of(paged)[-1]]["exp_avg"]
        assert codes.dtype == torch.uint8
        assert int(codes.sum(dtype=torch.int64)) == int(twin[6]["exp_avg"].sum(dtype=torch.int64))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("pager", PAGED)
def test_copies_are_paged_again_and_go_their_own_way(place, pager, clone):
    place.cramp()
    expected, paged = place.unpaged(), made(place, pager)
    train(range(3), expected, paged)
    pieces, size = place.in_use()
    twin = clone(paged)
    assert twin.paging_report().pages == 0
    train(range(3, 5), paged)
    train(range(3, 5), expected, twin)
    assert_same(twin, expected)
    assert_same(paged, expected)
    assert twin.paging_report().pages == paged.paging_report().pages
    assert place.in_use() == (2 * pieces, 2 * size)


@pytest.mark.parametrize("before", ["cpu", *PAGERS])
@pytest.mark.parametrize("after", ["cpu", *PAGERS])
def test_resumed_elsewhere_in_the_same_bits(place, before, after):
    place.cramp()

    def build(where):
        return place.unpaged() if where == "cpu" else made(place, where)

    whole, first, second = place.unpaged(), build(before), build(after)
    train(range(3), whole, first)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for param, saved in zip(params_of(second), params_of(first), strict=True):
        param.data.copy_(saved)
    assert_same(second, whole)
    train(range(3, 6), whole, second)
    assert_same(second, whole)
    report = second.paging_report()
    device = "cpu" if after == "cpu" else str(place.device)
    assert report.pagers == {device: "resident" if after == "cpu" else after}
    assert (report.paged_steps > 0) == (after in PAGED)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pager", PAGED)
def test_saved_at_step_50_and_resumed_it_equals_the_uninterrupted_at_100(place, pager, bits):
    half, rows = (50, 700) if place.name == "card" else (5, 30)
    place.cramp()
    whole, first, second = (
        PagedAdamW(
            place.parameters(shapes=[(64, 65), (rows, 900), (300,)]), pager=pager, state_bits=bits
        )
        for _ in range(3)
    )
    train(range(half), whole, first)
    saved = saved_and_loaded(first.state_dict())
    for param, twin in zip(params_of(second), params_of(first), strict=True):
        param.data.copy_(twin)
    del first
    second.load_state_dict(saved)
    train(range(half, 2 * half), whole, second)
    assert_same(second, whole)
    assert second.paging_report().paged_steps >= half


def counted(card, monkeypatch):
    """What is asked of a card from now on; not what it asks of itself."""
    asked, depth = [], [0]

    def recorded(name, method):
        def call(*arguments, **options):
            if not depth[0]:
                asked.append(name)
            depth[0] += 1
            try:
                return method(*arguments, **options)
            finally:
                depth[0] -= 1

        return call

    for name in ("prefetch", "free_bytes", "managed", "copy", "synchronize", "staging", "read"):
        monkeypatch.setattr(card, name, recorded(name, getattr(card, name)))
    return asked


@pytest.mark.parametrize("pager", ["unified", "resident"])
def test_a_calm_step_asks_the_driver_nothing(place, pager, monkeypatch):
    paged = made(place, pager)
    train(range(3), paged)
    card = place.card(paged)
    if card.allocations() is None:
        pytest.skip("torch counts no memory here, so every step has to look after its pages")
    for _ in range(2):
        paged.step()
    asked, before = counted(card, monkeypatch), card.allocations()
    for _ in range(10):
        paged.step()
    assert card.allocations() == before, "torch has the memory that a step takes"
    assert asked == ["read"] * 10, "once a step, for the flags"
    assert paged.paging_report().paged_steps == 0


@pytest.mark.parametrize("pager", PAGED)
def test_in_a_step_that_moves_pages_nothing_is_allocated_and_nothing_waited_for(
    place, pager, monkeypatch
):
    place.cramp()
    paged = made(place, pager)
    train(range(3), paged)
    asked = counted(place.card(paged), monkeypatch)
    train([3], paged)
    assert not {"managed", "synchronize"} & set(asked)
    assert asked.count("read") == 1
    assert asked.count("staging") <= 3
    assert ("prefetch" if pager == "unified" else "copy") in asked


@pytest.mark.parametrize("pager", PAGED)
def test_a_thousand_optimizers_leave_nothing(place, pager):
    param = place.parameters(shapes=[(5000,)])[0]
    param.grad = torch.ones_like(param)
    first = PagedAdamW([param], pager=pager, state_bits=32)
    first.step()
    saved = saved_and_loaded(first.state_dict())
    del first
    gc.collect()
    before = place.in_use()
    for count in range(1000):
        optimizer = PagedAdamW([param], pager=pager)
        optimizer.load_state_dict(saved)
        if count % 50 == 0:
            optimizer.step()
        assert optimizer.paging_report().pages >= 1
        del optimizer
    gc.collect()
    assert place.in_use() == before
