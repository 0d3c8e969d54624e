"""The driver's memory on a GPU, and the streams of a paged step. How to run: see ``on_card.py``."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fourbit import PagedAdamW, _core
from fourbit.optim.paging import unified
from fourbit.optim.paging.card import TorchCard
from on_card import CARD, LONG_SLEEP_CYCLES, need_memory, watched_synchronisations
from places import PAGERS, Place, assert_same, params_of, set_gradients, train

pytestmark = pytest.mark.cuda

MIB = 1 << 20

# The driver takes memory for managed pages from the card in lots of up to 128 MiB, and returns what
# is over when somebody needs it; others may do something meanwhile.
SLACK = 256 * MIB

# Of managed memory in these tests: far below any card's size.
STATE_BYTES = 512 * MIB


@pytest.fixture(autouse=True)
def _shares_memory():
    if not _core.card_can_page(CARD.index):
        pytest.skip("the card and the processor share no memory")


@pytest.fixture
def cramped(monkeypatch):
    """Few pages fit, as `Place.cramp` has it."""
    place = Place("card", monkeypatch)
    place.cramp()
    return place


def free_bytes():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(CARD)[0]


# --- memory ---------------------------------------------------------------------------------------


def test_torch_and_the_host_share_managed_memory_and_it_lives_as_long_as_a_tensor():
    before = _core.card_memory_in_use()
    memory = TorchCard(CARD).managed(4 * MIB)
    assert _core.card_memory_in_use() == (before[0] + 1, before[1] + 4 * MIB)
    part = memory.part(MIB, 4096)
    assert part.data_ptr() == memory.address + MIB
    assert (part.device, part.dtype, part.shape) == (CARD, torch.uint8, (4096,))
    assert part.untyped_storage().nbytes() == 4096
    part.fill_(7)
    torch.cuda.synchronize()
    held = (ctypes.c_uint8 * 4096).from_address(memory.address + MIB)
    assert bytes(held) == b"\x07" * 4096
    held[5] = 9
    assert part[5].item() == 9
    numbers = part.view(torch.int32)
    del memory, part
    assert _core.card_memory_in_use() == (before[0] + 1, before[1] + 4 * MIB)
    assert numbers[0].item() == 0x07070707
    del numbers
    assert _core.card_memory_in_use() == before


def test_torch_shares_page_locked_memory():
    before = _core.card_memory_in_use()
    memory = TorchCard(CARD).page_locked(4 * MIB)
    part = memory.part(MIB, 4096)
    assert part.data_ptr() == memory.address + MIB
    assert part.device.type == "cpu"
    assert part.is_pinned()
    part.copy_(torch.full((4096,), 7, dtype=torch.uint8, device=CARD))
    assert int(part.sum()) == 7 * 4096
    del memory
    assert _core.card_memory_in_use() == (before[0] + 1, before[1] + 4 * MIB)
    del part
    assert _core.card_memory_in_use() == before


@pytest.mark.parametrize("kind", ["managed", "page_locked"])
def test_a_thousand_pieces_leave_nothing(kind, record_property):
    make = getattr(TorchCard(CARD), kind)
    make(MIB).part(0, MIB).fill_(1)
    before, free = _core.card_memory_in_use(), free_bytes()
    for count in range(1000):
        size = (1 + count % 4) * MIB
        make(size).part(0, size).fill_(count % 256)
    assert _core.card_memory_in_use() == before
    lost = free - free_bytes()
    record_property("bytes_lost", lost)
    assert lost <= SLACK


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_optimizers_leave_nothing(pager, record_property):
    """Fifty, of 64 MiB each: what one left would show."""
    params = [nn.Parameter(torch.zeros(2048, 4096, device=CARD)) for _ in range(1)]
    params[0].grad = torch.ones_like(params[0])

    def once():
        optimizer = PagedAdamW(params, pager=pager, state_bits=32)
        optimizer.step()
        optimizer.page_out()
        optimizer.step()
        assert optimizer.paging_report().state_bytes == 64 * MIB

    once()
    before, free = _core.card_memory_in_use(), free_bytes()
    for _ in range(50):
        once()
    assert _core.card_memory_in_use() == before
    lost = free - free_bytes()
    record_property("bytes_lost", lost)
    assert lost <= SLACK


def test_free_memory_is_what_torch_says():
    torch.cuda.synchronize()
    free, total = _core.card_free_memory(CARD.index)
    expected_free, expected_total = torch.cuda.mem_get_info(CARD)
    assert total == expected_total
    # The same question a moment later; another process may have been at work.
    assert abs(free - expected_free) <= 64 * MIB


def test_torchs_own_figures_are_understood():
    card = TorchCard(CARD)
    held = torch.empty(64 * MIB, dtype=torch.uint8, device=CARD)
    before = card.allocations()
    if before is None:
        pytest.skip("torch counts no memory here")
    assert before.peak >= before.reserved >= held.nbytes
    more = torch.empty(1024 * MIB, dtype=torch.uint8, device=CARD)
    after = card.allocations()
    assert after.peak >= after.reserved >= held.nbytes + more.nbytes
    assert after != before or before.reserved >= held.nbytes + more.nbytes


def test_prefetching_moves_nothing_but_memory(record_property):
    card = TorchCard(CARD)
    stream, size = card.side_stream(), 32 * MIB
    memory = card.managed(size)
    record_property("address_modulo_2_mib", memory.address % (2 * MIB))
    numbers = memory.part(0, size).view(torch.int32)
    numbers.copy_(torch.arange(size // 4, dtype=torch.int32, device=CARD))
    expected = torch.arange(size // 4, dtype=torch.int32)
    card.wait(stream, card.record(card.current_stream()))
    for to_card in (False, True, True, False, False, True):
        assert card.prefetch(memory, 0, size, to_card=to_card, on=stream) is True
        assert card.prefetch(memory, 2 * MIB, 6 * MIB, to_card=not to_card, on=stream) is True
        assert torch.equal(numbers.cpu(), expected), "read while it moves"
        card.synchronize(stream)
        assert int(numbers.sum(dtype=torch.int64)) == int(expected.sum(dtype=torch.int64))


def test_paging_out_and_in_on_the_card(record_property):
    """What the driver shows as free is only recorded: it may keep room that it would give anybody.

    That others can have the room is shown in ``test_cuda_paging_spike.py``.
    """
    need_memory(8 * STATE_BYTES)
    torch.cuda.reset_peak_memory_stats(CARD)  # of earlier tests, which pagers would mind
    param = nn.Parameter(torch.zeros(STATE_BYTES // 8, dtype=torch.bfloat16, device=CARD))
    param.grad = torch.ones_like(param)
    # Whatever one step loads and allocates besides is there before it is looked.
    small = nn.Parameter(torch.zeros(8, device=CARD))
    small.grad = torch.ones_like(small)
    PagedAdamW([small], pager="unified").step()
    free = [free_bytes()]
    optimizer = PagedAdamW([param], pager="unified", state_bits=32)
    optimizer.step()
    free.append(free_bytes())
    report = optimizer.paging_report()
    assert report.state_bytes == report.resident_bytes == STATE_BYTES
    optimizer.page_out()
    free.append(free_bytes())
    assert optimizer.paging_report().resident_bytes == 0
    optimizer.page_in()
    free.append(free_bytes())
    record_property("free_before_in_out_in", free)
    assert optimizer.paging_report().resident_bytes == STATE_BYTES
    assert free[0] - free[1] >= STATE_BYTES - SLACK, "what is on the card counts"
    assert free[0] - free[3] >= STATE_BYTES - SLACK
    assert free[2] >= free[1] - SLACK, "to page out takes no memory"
    before = optimizer.paging_report()
    optimizer.step()
    assert optimizer.paging_report() == before, "all pages are there"


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("few_fit", [False, True], ids=["all fit", "few fit"])
@pytest.mark.parametrize("pager", PAGERS)
def test_a_step_waits_for_the_card_once(pager, few_fit, monkeypatch):
    place = Place("card", monkeypatch)
    if few_fit:
        place.cramp()
    optimizer = PagedAdamW(place.parameters(), pager=pager)
    train(range(2), optimizer)
    set_gradients(2, optimizer)
    moved = optimizer.paging_report().bytes_in
    with watched_synchronisations() as found:
        optimizer.step()
    assert len(found) == 1, "that is where torch reads which parameters were skipped"
    moves = pager == "pinned" or (pager == "unified" and few_fit)
    assert (optimizer.paging_report().bytes_in > moved) == moves


@pytest.mark.parametrize("pager", PAGERS)
def test_a_step_runs_on_the_current_stream(pager, cramped):
    expected = cramped.unpaged()
    optimizer = PagedAdamW(cramped.parameters(), pager=pager)
    train(range(2), expected, optimizer)
    set_gradients(2, expected, optimizer)
    gradients = [param.grad.clone() for param in params_of(optimizer)]
    for param in params_of(optimizer):
        param.grad.zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_SLEEP_CYCLES)
        for param, gradient in zip(params_of(optimizer), gradients, strict=True):
            param.grad.copy_(gradient)  # what would be read too early on any other stream
        optimizer.step()
    side.synchronize()
    expected.step()
    assert_same(optimizer, expected)


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_the_card_is_busy_while_pages_move(pager, cramped):
    """Work of other streams neither overtakes a step nor is overtaken where it must not be."""
    expected = cramped.unpaged()
    optimizer = PagedAdamW(cramped.parameters(), pager=pager)
    noise = torch.empty(64 * MIB, device=CARD)
    side = torch.cuda.Stream()
    for step in range(5):
        with torch.cuda.stream(side):
            for _ in range(20):
                noise.add_(1)
        # In the memory of the last step's staging buffers, while the next ones are taken.
        torch.full((4 * MIB,), 0xA5, dtype=torch.uint8, device=CARD)
        optimizer.page_in()
        if step % 2:
            optimizer.page_out()
        train([step], expected, optimizer)
        torch.full((4 * MIB,), 0xA5, dtype=torch.uint8, device=CARD)
    assert_same(optimizer, expected)
    torch.cuda.synchronize()


@pytest.mark.parametrize("pager", PAGERS)
def test_two_threads_with_an_optimizer_each(pager, cramped):
    expected = cramped.unpaged()
    train(range(6), expected)

    def work(_):
        side = torch.cuda.Stream(CARD)
        with torch.cuda.stream(side):
            optimizer = PagedAdamW(cramped.parameters(), pager=pager)
            train(range(6), optimizer)
        side.synchronize()
        return optimizer

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    for optimizer in found:
        assert_same(optimizer, expected)
        assert optimizer.paging_report().pagers == {str(CARD): pager}


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_pages_are_looked_after_now_and_then(pager, monkeypatch):
    """More steps than `LOOK_EVERY`, with every look at the driver that there is."""
    monkeypatch.setattr(unified, "LOOK_EVERY", 4)
    place = Place("card", monkeypatch)
    shapes = [(64, 65), (300,)]
    expected, optimizer = (
        place.unpaged(shapes=shapes),
        PagedAdamW(place.parameters(shapes=shapes), pager=pager),
    )
    train(range(20), expected, optimizer)
    assert_same(optimizer, expected)
