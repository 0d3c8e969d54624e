"""The pager of managed memory, on the recording card: what it knows of where pages are."""

import itertools

import pytest
import torch

from fake_card import FakeCard
from fourbit.optim.paging import unified
from fourbit.optim.paging.card import Allocations, TorchCard
from fourbit.optim.paging.unified import UnifiedPager
from paging_steps import (
    GRANULE,
    PAGE,
    RESERVE,
    Stepper,
    calm,
    is_known,
    small_pages,
    twenty_pages,
    wanted_of,
)


@pytest.fixture(autouse=True, scope="module")
def _small_pages():
    with small_pages():
        yield


def test_when_all_fits_a_step_is_one_launch_and_asks_the_driver_nothing():
    card, stepper = calm()
    launches = stepper.pager.begin(stepper.moments).visits
    assert len(launches) == 1
    waits = card.waits
    for _ in range(unified.LOOK_EVERY // 2):
        stepper.step()
    assert card.calls == []
    assert card.waits - waits == unified.LOOK_EVERY // 2, "each step waits once"
    assert stepper.pager.counters.bytes_in == 0
    assert stepper.pager.resident_bytes == stepper.pager.nbytes


def test_a_spike_drives_pages_out_and_the_next_step_brings_them_back():
    card, stepper = calm()
    card.allocate_plainly(card.capacity)
    assert card.evictions > 0
    card.free_plainly(card.capacity)
    card.faults = 0
    stepper.step()
    card.finish()
    assert card.faults == 0
    counters = stepper.pager.counters
    assert counters.paged_steps == 1
    assert counters.bytes_in == stepper.pager.nbytes == stepper.pager.resident_bytes
    assert counters.faults_avoided == sum(-(-p.nbytes // GRANULE) for p in stepper.pager._pages.all)
    stepper.step()
    assert counters.paged_steps == 1
    stepper.check()


def test_torch_asking_for_memory_changes_nothing_while_enough_is_free():
    card, stepper = calm()
    card.allocate_plainly(10 * PAGE)
    stepper.step()
    assert stepper.pager.counters.paged_steps == 0
    assert card.calls == ["free_bytes"]


def test_a_spike_is_noticed_though_the_peak_was_set_back():
    card, stepper = calm()
    card.allocate_plainly(card.capacity // 2)
    stepper.step()
    card.free_plainly(card.capacity // 2)
    card.allocate_plainly(card.capacity)
    card.free_plainly(card.capacity)
    card.torch = card.torch._replace(peak=0)
    card.faults = 0
    stepper.step()
    assert card.faults == 0


def test_pages_come_back_that_others_drove_out():
    """Another process took memory: torch knows nothing of it, and pages are looked after anyway."""
    card, stepper = calm()
    card.present.clear()
    for _ in range(unified.LOOK_EVERY):
        stepper.step()
    card.finish()
    card.faults = 0
    stepper.step()
    assert card.faults == 0


def test_paged_out_and_in():
    card, stepper = calm()
    total = stepper.pager.nbytes
    waits = card.waits
    stepper.pager.page_out()
    assert card.waits == waits + 1
    assert not card.present
    assert (stepper.pager.resident_bytes, stepper.pager.counters.bytes_out) == (0, total)
    stepper.check()
    card.allocate_plainly(card.capacity - 3 * PAGE - RESERVE // 2)
    assert card.evictions == 0
    waits, moved = card.waits, card.bytes_moved["in"]
    stepper.pager.page_in()
    assert card.waits == waits
    assert stepper.pager.resident_bytes == 2 * PAGE
    card.finish()
    assert card.evictions == 0
    assert card.free_bytes() + len(card.kept) * GRANULE >= RESERVE
    card.free_plainly(card.torch.reserved)
    stepper.pager.page_in()
    stepper.pager.page_in()
    assert stepper.pager.resident_bytes == total
    # Two were asked for again, since the spike might have driven them out; they were there.
    assert stepper.pager.counters.bytes_in == total + 2 * PAGE
    card.finish()
    room = sum(page.room for page in stepper.pager._pages.all)
    assert card.bytes_moved["in"] - moved == room
    stepper.step()
    assert stepper.pager.counters.paged_steps == 0
    stepper.check()


def test_page_out_does_not_overtake_what_is_still_to_run():
    """A copy of the state, say, that torch has put into its stream."""
    card, stepper = calm()
    card.faults, card.eager = 0, 0
    for pair in stepper.moments.values():
        card.put(card.main, "do", lambda pair=pair: card.touch(pair[0].data_ptr(), 100))
    stepper.pager.page_out()
    card.finish()
    assert card.faults == 0
    assert not card.present


@pytest.mark.parametrize("seed", range(8))
def test_paging_out_is_not_undone_by_pages_that_are_still_coming(seed):
    card, stepper = calm()
    card.random.seed(seed)
    card.eager = 0
    for _ in range(3):
        stepper.pager.page_out()
        stepper.pager.page_in()
    assert stepper.pager.resident_bytes == stepper.pager.nbytes
    stepper.pager.page_out()
    card.finish()
    assert not card.present
    stepper.check()


@pytest.mark.parametrize("seed", range(8))
def test_a_step_waits_for_pages_that_are_paged_in(seed):
    card, stepper = calm()
    card.random.seed(seed)
    for eager in (0, 0.5):
        card.eager = eager
        stepper.pager.page_out()
        stepper.pager.page_in()
        card.faults = 0
        stepper.step()
        card.finish()
        assert card.faults == 0
        assert stepper.pager.counters.paged_steps == 0
        assert is_known(card, stepper.pager)
    stepper.check()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("through", ["page_in", "step"])
def test_pages_that_are_still_leaving_come_back_when_there_is_room(through, seed):
    card = FakeCard(5 * PAGE, seed=seed, eager=0)
    stepper = Stepper(card, UnifiedPager(card), [PAGE // 2] * 12)
    for _ in range(3):
        stepper.step()
    card.capacity = 100 * PAGE
    if through == "page_in":
        stepper.pager.page_in()
    else:
        stepper.step()
    assert stepper.pager.resident_bytes == stepper.pager.nbytes
    card.finish()
    assert is_known(card, stepper.pager)


@pytest.mark.parametrize("seed", range(8))
def test_pages_that_are_still_coming_leave_when_others_need_the_room(seed):
    card = FakeCard(5 * PAGE, seed=seed, eager=0)
    stepper = Stepper(card, UnifiedPager(card), [PAGE // 2] * 8)
    params = list(stepper.moments)
    stepper.step(params[:3])
    stepper.pager.page_out()
    stepper.pager.page_in()
    stepper.step(params[4:])
    card.finish()
    assert is_known(card, stepper.pager)
    stepper.check()


@pytest.mark.parametrize("keeps", [False, True])
def test_pages_do_not_leave_where_torch_asks_for_memory_and_there_is_just_enough(keeps):
    """A card almost full: which pages are there is unknown each time, and all are."""
    card = FakeCard(30 * PAGE, keeps=keeps)
    stepper = Stepper(card, UnifiedPager(card), [PAGE // 2] * 20)
    card.allocate_plainly(10 * PAGE - RESERVE)
    for _ in range(10):
        card.free_plainly(100)
        card.allocate_plainly(100)
        stepper.step()
        card.finish()
    assert card.bytes_moved["out"] == 0
    assert card.evictions == 0
    assert stepper.pager.resident_bytes == stepper.pager.nbytes


@pytest.mark.parametrize("keeps", [False, True])
def test_room_that_others_take_is_not_taken_for_that_of_pages(keeps):
    """While all pages fit; and when it is given back, they have it again."""
    card, stepper = twenty_pages(25, keeps)
    for delta in (-4, 4, -4, 4, 4, -4):
        card.capacity += delta * PAGE
        card.torch = card.torch._replace(calls=card.torch.calls + 1)
        stepper.step()
        assert stepper.pager._room() == card.capacity
    assert card.evictions == 0
    assert card.bytes_moved["out"] == 0


@pytest.mark.parametrize("keeps", [False, True])
def test_with_no_room_for_all_what_others_give_back_is_used(keeps):
    card, stepper = twenty_pages(10, keeps)
    card.capacity += 4 * PAGE
    for _ in range(3):
        stepper.step()
    card.finish()
    # All but what is kept free, which cannot be told from what pages that left have.
    assert 13 <= len(card.present) * GRANULE / PAGE <= 14


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("fits", [4, 10, 15])
def test_a_step_moves_only_what_does_not_fit(fits, keeps):
    """Twenty pages, of which so many fit: the others come, and as many leave, in each step."""
    card, stepper = twenty_pages(fits, keeps)
    for _ in range(3):
        before = card.bytes_moved.copy()
        counted = stepper.pager.counters.bytes_in, stepper.pager.counters.bytes_out
        stepper.step()
        card.finish()
        moved = [card.bytes_moved[way] - before[way] for way in ("in", "out")]
        assert moved == [(20 - fits) * PAGE] * 2
        assert stepper.pager.counters.bytes_in - counted[0] == moved[0]
        assert stepper.pager.counters.bytes_out - counted[1] == moved[1]


def test_on_a_full_card_a_page_comes_while_the_one_before_is_stepped():
    card = FakeCard(10 * PAGE)
    stepper = Stepper(card, UnifiedPager(card), [PAGE // 2] * 8)
    card.allocate_plainly(10 * PAGE)
    stepper.step()
    visits = stepper.pager.begin(stepper.moments)._plan
    for before, visit in itertools.pairwise(visits):
        assert before.page not in visit.leaving


def test_new_pages_may_drive_others_out():
    card = FakeCard(6 * PAGE)
    stepper = Stepper(card, UnifiedPager(card), [PAGE // 2] * 4)
    stepper.step()
    added = wanted_of([PAGE // 2] * 4)
    made = stepper.pager.add(added)
    assert card.evictions > 0
    for one, pair in zip(added, made, strict=True):
        stepper.moments[one.param], stepper.steps[one.param] = pair, 0
    card.faults = 0
    stepper.step()
    assert card.faults == 0
    stepper.check()


def test_new_pages_that_do_not_fit_are_found_out_before_their_first_step():
    card = FakeCard(6 * PAGE, eager=0)
    stepper = Stepper(card, UnifiedPager(card), [PAGE // 2] * 10)
    assert card.evictions > 0, "their zeros are written by now"
    for _ in range(3):
        stepper.step()
        card.finish()
        assert is_known(card, stepper.pager)
        assert stepper.pager.counters.paged_steps > 0
    stepper.check()


def test_a_look_that_finds_the_card_full_is_not_repeated_in_each_step():
    card, stepper = calm(elements=[PAGE // 2] * 2)
    # So little memory is free that the driver may have moved pages out; torch asks for no more.
    card.allocate_plainly(card.free_bytes() - RESERVE // 2)
    card.finish()
    for _ in range(3 * unified.LOOK_EVERY):
        stepper.step()
    assert stepper.pager.counters.paged_steps == 3


def test_a_card_without_room_is_used_where_the_pages_are():
    """The driver refuses to bring pages: nothing is wrong, and the next step asks again."""
    card, stepper = calm()
    stepper.pager.page_out()
    card.refuse_prefetch = True
    stepper.pager.page_in()
    stepper.step()
    assert stepper.pager.resident_bytes == 0
    assert stepper.pager.counters.bytes_in == 0
    card.refuse_prefetch = False
    stepper.step()
    assert stepper.pager.resident_bytes == stepper.pager.nbytes
    stepper.check()


def test_without_torchs_figures_every_step_brings_all_pages():
    card, stepper = calm()
    card.allocations = lambda: None
    stepper.step()
    stepper.step()
    assert stepper.pager.counters.paged_steps == 2
    stepper.check()


def test_allocators_of_torch_that_count_nothing(monkeypatch):
    """What each of them says of a card on which there are parameters."""
    card = TorchCard(torch.device("cuda", 0))

    def statistics(calls):
        return {"reserved_bytes": {"all": {"current": 20, "peak": 30}}, "num_device_alloc": calls}

    def said(answer):
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", answer)
        return card.allocations()

    def refuses(device):
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats.")

    assert said(lambda device: statistics(2)) == Allocations(2, 20, 30)
    assert said(lambda device: statistics(0)) is None, "cudaMallocAsync, or no caching"
    assert said(lambda device: {}) is None
    assert said(refuses) is None
