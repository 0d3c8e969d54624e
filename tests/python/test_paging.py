"""The pagers on a recording card: nothing is stepped before it has arrived, nothing is lost.

The launches here add one to every element of both moments, after a look that they hold what they
should; `test_optim_cuda_emulated.py` has the optimizer's own, and
`test_paging_unified.py` what the pager of managed memory knows.
"""

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_card import FakeCard
from fourbit import CudaError
from fourbit.optim.paging.pager import choices
from fourbit.optim.paging.pages import Pages
from fourbit.optim.paging.pinned import BUFFERS, PinnedPager
from fourbit.optim.paging.resident import ResidentPager
from fourbit.optim.paging.schedule import schedule
from fourbit.optim.paging.unified import UnifiedPager
from paging_steps import GRANULE, PAGE, RESERVE, Stepper, calm, small_pages, wanted_of


@pytest.fixture(autouse=True, scope="module")
def _small_pages():
    with small_pages():
        yield


PAGERS = {"unified": UnifiedPager, "pinned": PinnedPager}
sizes = st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=12)


# --- the schedule: arithmetic -----------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_schedule_visits_each_page_once_and_never_exceeds_the_room(data):
    count = data.draw(st.integers(1, 15))
    bytes_of = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    numbers = list(range(count))
    order = data.draw(st.lists(st.sampled_from(numbers), unique=True, min_size=1))
    present = data.draw(st.sets(st.sampled_from(numbers)))
    room = data.draw(st.integers(1, 60))
    visits, last = schedule(order, bytes_of, present, room)
    there, stepped = set(present), []
    for visit in visits:
        for page in visit.leaving:
            assert page in there
            assert page in stepped or page not in order, "it is stepped later in this round"
            there.remove(page)
        if visit.comes:
            assert visit.page not in there
            held = sum(bytes_of[page] for page in there) + bytes_of[visit.page]
            waiting = [page for page in there if page in order and page not in stepped]
            if not waiting:
                assert held <= room or not there
            there.add(visit.page)
        assert visit.page in there
        stepped.append(visit.page)
    assert sorted(stepped) == sorted(order)
    assert set(last) == there
    come = [page for page in stepped if page not in present]
    assert come == [page for page in order if page not in present], "the order is kept"


@pytest.mark.parametrize("room", [3, 5, 9])
def test_rounds_move_what_does_not_fit_alone(room):
    """Ten pages of which `room` fit: every further round brings the other 10 - room."""
    present, came = [], []
    for _ in range(6):
        visits, present = schedule(range(10), [1] * 10, present, room)
        came.append(sum(visit.comes for visit in visits))
    assert came == [10] + 5 * [10 - room]


def test_pages_that_are_not_visited_leave_first():
    visits, last = schedule([0, 1, 2], [1] * 6, present=[0, 4, 5], room=3)
    assert [visit.leaving for visit in visits] == [(), (4,), (5,)]
    assert last == [0, 1, 2]


# --- pages ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=10),
    st.sampled_from([torch.uint8, torch.float32]),
)
def test_pages_hold_every_element_once_apart_and_aligned(elements, dtype):
    card, kept = FakeCard(), Pages()
    wanted = wanted_of(elements, dtype)
    moments, made = kept.add(wanted, card.managed)
    assert made == kept.all
    seen = {one.param: 0 for one in wanted}
    taken = []
    for page in made:
        assert page.nbytes <= PAGE
        for part in page.ranges:
            assert part.start % GRANULE == 0
            taken.append((part.memory.number, part.start, part.start + part.size))
        for span in page.spans:
            assert span.start == seen[span.param]
            assert span.start % 256 == 0
            seen[span.param] = span.stop
            for place in span.places:
                size = (span.stop - span.start) * dtype.itemsize
                assert place.offset % 512 == 0
                assert place.offset + size <= page.ranges[place.part].size
    assert seen == {one.param: one.param.numel() for one in wanted}
    for (number, _, stop), (other, start, _) in itertools.pairwise(sorted(taken)):
        assert number != other or stop <= start
    for one, pair in zip(wanted, moments, strict=True):
        assert kept.holds(one.param, pair)
        for moment in pair:
            assert moment.dtype == dtype
            assert moment.data_ptr() % 16 == 0
            assert not moment.any()
    # Few allocations: a new one only where the next parameter would not fit, or is large.
    assert len(card.live) <= len(made)


def test_small_parameters_share_a_page_and_its_memory_goes_with_the_last():
    card, kept = FakeCard(), Pages()
    wanted = wanted_of([100, 200, 300])
    moments, made = kept.add(wanted, card.managed)
    assert len(made) == len(card.live) == 1
    first, *others = wanted
    del moments, made
    kept.keep({one.param for one in others})
    assert [span.param for page in kept.all for span in page.spans] == [o.param for o in others]
    assert len(card.live) == 1
    kept.keep({first.param})
    gc.collect()
    assert kept.all == []
    assert card.live == {}


def test_moments_made_again_take_the_place_of_the_old():
    card, kept = FakeCard(), Pages()
    wanted = wanted_of([100, 2 * PAGE])
    kept.add(wanted, card.managed)
    moments, made = kept.add(wanted, card.managed)
    assert kept.all == made
    assert kept.holds(wanted[1].param, moments[1])
    gc.collect()
    assert len(card.live) == 2


def test_memory_outlives_its_pages_while_a_tensor_uses_it():
    card, kept = FakeCard(), Pages()
    ((first, second),) = kept.add(wanted_of([100]), card.managed)[0]
    kept.keep(())
    del first
    gc.collect()
    assert len(card.live) == 1
    assert not second.any()
    del second
    gc.collect()
    assert card.live == {}


# --- rounds -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data(), pager=st.sampled_from(sorted(PAGERS)))
def test_nothing_is_stepped_before_it_has_arrived_and_nothing_is_lost(data, pager):
    """Random parameters, steps of some of them, spikes, and orders of the streams."""
    seed, eager = data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([0, 0.3, 0.9]))
    keeps = data.draw(st.booleans())
    card = FakeCard(data.draw(st.integers(6, 40)) * PAGE, seed=seed, eager=eager, keeps=keeps)
    stepper = Stepper(card, PAGERS[pager](card), data.draw(sizes))
    params = list(stepper.moments)
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["spike", "out", "in", "nothing", "nothing"]))
        if action == "spike":
            spike = data.draw(st.integers(1, card.capacity))
            card.allocate_plainly(spike)
            card.free_plainly(spike)
        elif action == "out":
            stepper.pager.page_out()
        elif action == "in":
            stepper.pager.page_in()
        stepper.step(data.draw(st.lists(st.sampled_from(params), unique=True, min_size=1)))
        stepper.check()
    card.finish()
    stepper.check()


@settings(max_examples=60, deadline=None)
@given(
    elements=sizes,
    seed=st.integers(0, 2**32),
    held=st.integers(0, 10 * PAGE),
    keeps=st.booleans(),
)
def test_a_step_finds_its_pages_and_the_driver_evicts_nothing(elements, seed, held, keeps):
    """Once it knows where they are, whatever part of them fits; room is left for the next page."""
    total = sum(2 * -(-count // 512) * 512 + 2 * GRANULE for count in elements)
    capacity = held + 4 * PAGE + RESERVE + GRANULE * len(elements) * 2
    card = FakeCard(capacity, seed=seed, keeps=keeps)
    card.allocate_plainly(held)
    stepper = Stepper(card, UnifiedPager(card), elements)
    stepper.step()
    stepper.step()
    card.finish()
    card.evictions = card.faults = 0
    for _ in range(4):
        moved = card.bytes_moved.copy()
        stepper.step()
        card.finish()
    assert card.faults == 0
    assert card.evictions == 0
    if total + RESERVE <= card.capacity - held:
        assert moved == card.bytes_moved, "all fits, and nothing moves"
    stepper.check()


def test_a_step_waits_for_the_card_once_however_many_pages_move():
    for pager in PAGERS.values():
        card, stepper = calm(pager, capacity=5 * PAGE, elements=[PAGE // 2] * 30)
        before = card.waits
        stepper.step()
        assert card.waits == before + 1
        assert stepper.pager.counters.paged_steps == 3
        assert stepper.pager.counters.seconds_waiting > 0


def test_a_pager_lets_go_of_what_is_not_kept():
    for pager in PAGERS.values():
        card, stepper = calm(pager, elements=(100, 2 * PAGE))
        small, large = stepper.moments
        stepper.pager.keep({small})
        del stepper.moments[large]
        gc.collect()
        assert len(card.live) == 1
        stepper.step()
        stepper.check()
        stepper.pager.keep(())
        stepper.moments.clear()
        gc.collect()
        assert card.live == {}


def test_pinned_pages_use_a_few_buffers_of_the_card_and_only_in_a_step():
    card = FakeCard()
    staged = []
    staging = card.staging
    card.staging = lambda size: staged.append(size) or staging(size)
    stepper = Stepper(card, PinnedPager(card), [PAGE // 2] * 20)
    stepper.step()
    assert staged == [PAGE] * BUFFERS
    assert stepper.pager.resident_bytes == 0
    counters = stepper.pager.counters
    assert counters.bytes_in == counters.bytes_out == stepper.pager.nbytes
    staged.clear()
    stepper.step([next(iter(stepper.moments))])
    assert staged == [PAGE]
    stepper.check()


@settings(max_examples=30, deadline=None)
@given(
    pager=st.sampled_from(sorted(PAGERS)),
    failing=st.integers(0, 11),
    seed=st.integers(0, 2**32),
    late=st.booleans(),
)
def test_a_launch_that_fails_loses_no_step_before_it(pager, failing, seed, late):
    """Nor its own, where it was launched and then something else went wrong, as an interrupt."""
    card = FakeCard(5 * PAGE, seed=seed, eager=0)
    stepper = Stepper(card, PAGERS[pager](card), [PAGE // 2] * 12)
    stepper.step()
    stepped = []

    def launch(launch_in_full, index):
        if index < failing or late:
            launch_in_full(index)
            stepped.extend(param for param, *_ in round_.visits[index])
        if index == failing:
            raise CudaError("a launch failed")

    round_ = stepper.pager.begin(stepper.moments)
    with pytest.raises(CudaError, match="a launch failed"):
        round_.run(lambda index: launch(stepper.launch_of(round_), index))
    assert len(stepped) == failing + late
    for param in stepped:
        stepper.steps[param] += 1
    if pager == "unified":
        card.read(torch.zeros(1))  # whoever reads state on the card does
    stepper.check()
    stepper.step()
    stepper.check()
    card.finish()
    stepper.check()


@pytest.mark.parametrize("failing", range(1, 12))
def test_a_copy_that_fails_leaves_no_other_copy_behind(failing):
    """Buffers are torch's again when the round is over, whatever ended it."""
    card = FakeCard(eager=0)
    stepper = Stepper(card, PinnedPager(card), [2 * PAGE] * 3)  # pages of two stretches
    stepper.step()
    copy, copies = card.copy, itertools.count(1)

    def sometimes(*arguments, **options):
        if next(copies) == failing:
            raise CudaError("a copy failed")
        copy(*arguments, **options)

    card.copy = sometimes
    round_ = stepper.pager.begin(stepper.moments)
    with pytest.raises(CudaError, match="a copy failed"):
        round_.run(stepper.launch_of(round_))
    card.synchronize(card.main)
    assert not any(stream.work for stream in card.streams)


@pytest.mark.parametrize(("pager", "kind"), [("unified", "managed"), ("pinned", "page_locked")])
def test_memory_that_cannot_be_had(pager, kind):
    card = FakeCard()
    stepper = Stepper(card, PAGERS[pager](card), [100, 200])
    stepper.step()
    allocate, left = getattr(card, kind), [2]

    def sometimes(size):
        left[0] -= 1
        if left[0] < 0:
            raise CudaError("no memory")
        return allocate(size)

    setattr(card, kind, sometimes)
    before = dict(card.live)
    with pytest.raises(CudaError, match="no memory"):
        stepper.pager.add(wanted_of([PAGE] * 4))
    gc.collect()
    assert card.live == before, "what was made before is given back"
    stepper.step()
    stepper.check()


@pytest.mark.parametrize("pager", sorted(PAGERS))
def test_a_thousand_pagers_leave_nothing(pager):
    card = FakeCard(10 * PAGE)
    for seed in range(1000):
        stepper = Stepper(card, PAGERS[pager](card), [100 + seed, 2 * PAGE])
        if seed % 100 == 0:
            stepper.step()
        assert len(card.live) == 2
        del stepper
    assert card.live == {}


def test_two_pagers_on_one_card():
    card = FakeCard(8 * PAGE)
    steppers = [Stepper(card, UnifiedPager(card), [PAGE // 2] * 8) for _ in range(2)]
    steppers.append(Stepper(card, PinnedPager(card), [PAGE // 2] * 8))
    for _ in range(5):
        for stepper in steppers:
            stepper.step()
        for stepper in steppers:
            stepper.check()


# --- the choice -------------------------------------------------------------------------------

CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("shares", "nbytes", "sharded", "names"),
    [
        (True, 10, False, ["unified", "pinned", "resident"]),
        (True, 101, False, ["pinned", "unified"]),
        (True, 10, True, ["unified", "resident"]),
        (True, 101, True, ["unified", "resident"]),
        (False, 10, False, ["pinned", "resident"]),
        (False, 10, True, ["resident"]),
    ],
)
def test_automatic_choice(shares, nbytes, sharded, names):
    card = FakeCard(100, shares=shares)
    possible = choices("auto", CARD, card, nbytes, sharded=sharded)
    assert [choice.make().name for choice in possible] == names
    assert all(choice.reason for choice in possible)


@pytest.mark.parametrize(
    ("pager", "card", "sharded", "message"),
    [
        ("unified", None, False, 'pager "unified" needs parameters on a GPU.*use "auto" or'),
        ("pinned", None, False, 'pager "pinned" needs parameters on a GPU.*use "auto" or'),
        ("unified", FakeCard(shares=False), False, 'managed memory that .* cuda:0 .* use "pinned"'),
        ("unified", FakeCard(shares=False), True, 'managed memory that .* use "resident"'),
        ("pinned", FakeCard(), True, 'sharded parameters .* use "unified"'),
        ("pinned", FakeCard(shares=False), True, 'sharded parameters .* use "resident"'),
    ],
)
def test_a_pager_that_the_device_cannot_do(pager, card, sharded, message):
    with pytest.raises(ValueError, match=message):
        choices(pager, CARD, card, 10, sharded=sharded)


def test_the_one_that_was_asked_for_is_tried_alone():
    for name in ("unified", "pinned", "resident"):
        (choice,) = choices(name, CARD, FakeCard(100), 1000, sharded=False)
        assert choice.make().name == name
        assert choice.reason is None
    (choice,) = choices("auto", torch.device("cpu"), None, 10, sharded=False)
    assert isinstance(choice.make(), ResidentPager)
