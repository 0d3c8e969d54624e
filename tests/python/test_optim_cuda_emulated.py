"""`PagedAdamW` on a card, without one: with every pager, the same bytes as its step on the CPU."""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import emulate
import emulated_optimizer
from adamw_steps import saved_and_loaded
from emulated_optimizer import PAGE, on_cpu
from fake_card import FakeCard
from fourbit import CudaError, PagedAdamW
from fourbit.optim import cuda_update

if emulate.unavailable():
    pytest.skip(emulate.unavailable(), allow_module_level=True)

PAGERS = ["resident", "unified", "pinned"]
CPU = torch.device("cpu")


@pytest.fixture
def card(monkeypatch):
    """One with room for four pages, fewer than the parameters have."""
    card = FakeCard(4 * PAGE + emulated_optimizer.RESERVE)
    emulated_optimizer.patch(monkeypatch, card)
    yield card
    card.finish()


def parameters(seed=3):
    """Small ones, which keep 32-bit state, large ones, tails, an empty one, every dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5,), (64, 65), (0, 3), (4096,), (17, 301), (), (3, 7, 900)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[index % 3]))
        for index, shape in enumerate(shapes)
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def made(pager="auto", **options):
    """Two groups of different options and state; the parameters and their optimizer."""
    params = parameters()
    groups = [
        {"params": params[:3], "weight_decay": 0.1, "betas": (0.8, 0.95)},
        {"params": params[3:], "state_bits": 32, "lr": 0.02, "maximize": True},
    ]
    return params, PagedAdamW(groups, lr=0.01, state_bits=8, pager=pager, **options)


def oracle():
    params, optimizer = made()
    return params, on_cpu(optimizer)


def train(steps, *trained):
    for step in steps:
        for params, optimizer in trained:
            set_gradients(params, step)
            optimizer.step()


def assert_same(one, other):
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(ours, theirs)
        state, expected = one[1].state[ours], other[1].state[theirs]
        assert state.keys() == expected.keys()
        for field, tensor in expected.items():
            assert torch.equal(state[field], tensor), field


@pytest.mark.parametrize("pager", PAGERS)
def test_the_same_bytes_as_on_the_cpu(card, pager):
    cpu, paged = oracle(), made(pager)
    for step in range(6):
        if step == 3:
            card.allocate_plainly(card.capacity)  # a spike
            card.free_plainly(card.capacity)
        train([step], cpu, paged)
        assert_same(paged, cpu)
    report = paged[1].paging_report()
    assert report.pagers == {"cpu": pager}
    assert (report.pages > 4) == (pager != "resident")
    assert (report.paged_steps > 3) == (pager != "resident")
    assert (report.seconds_waiting > 0) == (pager != "resident")


@pytest.mark.parametrize("pager", PAGERS)
def test_gradients_that_come_late_or_not_at_all(card, pager):
    cpu, paged = oracle(), made(pager)
    for step in range(5):
        for params, optimizer in (cpu, paged):
            set_gradients(params, step)
            for index, param in enumerate(params):
                if (index + step) % 3 == 0:
                    param.grad = None
            optimizer.step()
    assert_same(paged, cpu)


@pytest.mark.parametrize("pager", PAGERS)
def test_a_gradient_that_is_not_finite_skips_its_parameter_alone(card, pager):
    """All of it, though it lies in several pages, and is bad in the last."""
    cpu, paged = oracle(), made(pager)
    train(range(2), cpu, paged)
    for params, optimizer in (cpu, paged):
        set_gradients(params, 2)
        params[1].grad[3, 4] = float("nan")
        params[6].grad[-1, -1, -1] = float("-inf")
        with pytest.warns(RuntimeWarning, match="skipped the update of parameter 1 and 1 more"):
            optimizer.step()
    assert paged[1].skipped_updates == 2
    assert_same(paged, cpu)
    train(range(3, 5), cpu, paged)
    assert_same(paged, cpu)


@pytest.mark.parametrize("pager", PAGERS)
def test_each_part_of_a_large_parameter_has_its_own_scales(card, pager):
    """With 8-bit state, in several pages; the last part is a few elements of a block."""
    trained = []
    for on_card in (False, True):
        param = nn.Parameter(torch.zeros(3 * PAGE + 100))
        optimizer = PagedAdamW([param], lr=0.01, pager=pager if on_card else "auto")
        trained.append(([param], optimizer if on_card else on_cpu(optimizer)))
    for step in range(4):
        for (param,), optimizer in trained:
            # Blocks of sizes far apart: the scale of another would show.
            blocks = torch.arange(param.numel()) // 256
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (blocks % 7 - 3)
            optimizer.step()
    assert_same(trained[1], trained[0])
    assert trained[1][1].paging_report().pages == (0 if pager == "resident" else 7)


@pytest.mark.parametrize("pager", PAGERS)
def test_damaged_scales_are_named_and_nothing_is_stepped(card, pager):
    params, optimizer = made(pager)
    train([0], (params, optimizer))
    optimizer.state[params[1]]["exp_avg_sq_absmax"][2] = float("inf")
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="parameter 1: exp_avg_sq_absmax holds NaN or infinity"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert optimizer.state[params[0]]["step"] == 1


def test_memory_that_is_not_contiguous_and_autograd(card):
    """The step is written into the parameter's own memory, and autograd is told."""
    plain = nn.Parameter(torch.randn(70, 80, generator=torch.Generator().manual_seed(1)))
    odd = nn.Parameter(torch.empty(80, 70).t())
    odd.data.copy_(plain)
    version = odd._version
    for param in (plain, odd):
        param.grad = torch.ones(70, 80)
        PagedAdamW([param]).step()
    assert torch.equal(plain, odd)
    assert not odd.is_contiguous()
    assert odd._version > version


@pytest.mark.parametrize("pager", PAGERS)
def test_nothing_is_launched_for_empty_parameters(card, pager):
    empty = nn.Parameter(torch.empty(0, 4))
    empty.grad = torch.empty(0, 4)
    optimizer = PagedAdamW([empty], pager=pager)
    optimizer.step()
    assert card.calls == []
    assert optimizer.state[empty]["step"] == 1
    optimizer.step()
    assert optimizer.state[empty]["step"] == 2


@pytest.mark.parametrize("before", ["cpu", *PAGERS])
@pytest.mark.parametrize("after", ["cpu", *PAGERS])
def test_resumed_elsewhere_is_paged_there_and_equals_the_uninterrupted(card, before, after):
    def build(where):
        return oracle() if where == "cpu" else made(where)

    whole, first, second = oracle(), build(before), build(after)
    train(range(5), whole, first)
    second[1].load_state_dict(saved_and_loaded(first[1].state_dict()))
    for param, saved in zip(second[0], first[0], strict=True):
        param.data.copy_(saved)
    assert_same(second, whole)
    train(range(5, 10), whole, second)
    assert_same(second, whole)
    report = second[1].paging_report()
    assert report.pagers == {"cpu": "resident" if after == "cpu" else after}
    assert (report.paged_steps == 5) == (after in ("unified", "pinned"))


@pytest.mark.parametrize("pager", PAGERS)
def test_a_state_dict_that_fails_half_way_leaves_all_as_it_was(card, pager):
    """The state, where it is paged, what is allocated and what is counted."""
    cpu, (params, optimizer) = oracle(), made(pager)
    train(range(3), cpu, (params, optimizer))
    damaged = saved_and_loaded(optimizer.state_dict())
    damaged["state"][6]["exp_avg"][-1] = float("nan")
    report, live = optimizer.paging_report(), dict(card.live)
    with pytest.raises(ValueError, match="exp_avg of parameter 6 holds NaN"):
        optimizer.load_state_dict(damaged)
    assert (optimizer.paging_report(), card.live) == (report, live)
    train(range(3, 5), cpu, (params, optimizer))
    assert_same((params, optimizer), cpu)
    assert card.live == live, "no page was made anew"


def test_the_report_counts_on_when_state_is_loaded(card):
    params, optimizer = made("pinned")
    train(range(2), (params, optimizer))
    before = optimizer.paging_report()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.paging_report() == before
    train([2], (params, optimizer))
    assert optimizer.paging_report().paged_steps == 3


def test_auto_looks_at_the_state_that_is_loaded(card):
    """It has 32 bits and is larger than the card, where 8 bits of each would fit."""
    params, optimizer = made("pinned")
    train([0], (params, optimizer))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["state_bits"] = 32
    cpu = oracle()
    for group in cpu[1].param_groups:
        group["state_bits"] = 32
    train([0], cpu)
    saved["state"] = cpu[1].state_dict()["state"]
    card.capacity = 200_000
    params = parameters()
    fresh = PagedAdamW([{"params": params[:3]}, {"params": params[3:]}])
    fresh.load_state_dict(saved)
    assert fresh.paging_report().pagers == {"cpu": "pinned"}


@pytest.mark.parametrize("pager", ["unified", "pinned"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_paged_too_and_go_their_own_way(card, pager, clone):
    expected, (params, optimizer) = oracle(), made(pager)
    train(range(3), expected, (params, optimizer))
    twin = clone(optimizer)
    twin_params = [param for group in twin.param_groups for param in group["params"]]
    pages, live = optimizer.paging_report().pages, len(card.live)
    assert twin.paging_report().pages == 0
    train(range(3, 5), (params, optimizer))
    train(range(3, 6), expected, (twin_params, twin))
    assert_same((twin_params, twin), expected)
    assert twin.paging_report().pages == pages
    assert len(card.live) == 2 * live
    train([5], (params, optimizer))
    assert_same((params, optimizer), expected)


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_state_that_somebody_replaced_is_paged_again(card, pager):
    expected, (params, optimizer) = oracle(), made(pager)
    train(range(2), expected, (params, optimizer))
    for state in optimizer.state.values():
        for field in ("exp_avg", "exp_avg_sq"):
            state[field] = state[field].clone()
    train(range(2, 4), expected, (params, optimizer))
    assert_same((params, optimizer), expected)
    for param, state in optimizer.state.items():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert not param.numel() or card.find(moment.data_ptr()) is not None


@pytest.mark.parametrize("pager", PAGERS)
def test_state_of_another_layout_is_put_right(card, pager):
    """A kernel follows addresses, so none may be of a tensor that is not as it takes it."""
    cpu, paged = oracle(), made(pager)
    train(range(2), cpu, paged)
    for params, optimizer in (cpu, paged):
        narrow, strided = optimizer.state[params[6]], optimizer.state[params[1]]
        narrow["exp_avg"] = narrow["exp_avg"].to(torch.bfloat16)
        strided["exp_avg_sq"] = strided["exp_avg_sq"].t().contiguous().t()
        scales = torch.stack([strided["exp_avg_absmax"]] * 2, dim=1)
        strided["exp_avg_absmax"] = scales[:, 0]
    train(range(2, 4), cpu, paged)
    assert_same(paged, cpu)


@pytest.mark.parametrize("pager", PAGERS)
@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("exp_avg_absmax", torch.Tensor.double, "exp_avg_absmax of parameter 1 is torch.float64"),
        ("exp_avg_absmax", lambda scales: scales[1:], r"exp_avg_absmax of .* has shape \[16\]"),
        ("exp_avg_sq", torch.Tensor.float, "exp_avg_sq of parameter 1 is torch.float32"),
    ],
)
def test_state_that_cannot_be_put_right_is_named(card, pager, field, change, message):
    params, optimizer = made(pager)
    train([0], (params, optimizer))
    state = optimizer.state[params[1]]
    whole, state[field] = state[field], change(state[field])
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    state[field] = whole
    expected = oracle()
    train(range(2), expected)
    train([1], (params, optimizer))
    assert_same((params, optimizer), expected)


def test_two_optimizers_on_a_full_card(card):
    cpu = [oracle(), oracle()]
    paged = [made("unified"), made("pinned")]
    for step in range(4):
        train([step], *cpu, *paged)
    assert_same(paged[0], cpu[0])
    assert_same(paged[1], cpu[1])


def test_added_groups_have_pages_of_their_own(card):
    params = parameters()
    optimizer = PagedAdamW(params[:2], pager="unified")
    set_gradients(params, 0)
    optimizer.step()
    pages = optimizer.paging_report().pages
    optimizer.add_param_group({"params": params[2:]})
    optimizer.step()
    assert optimizer.paging_report().pages > pages
    assert optimizer.state[params[1]]["step"] == 2


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_memory_is_freed_with_the_state_and_with_the_optimizer(card, pager):
    params, optimizer = made(pager)
    train([0], (params, optimizer))
    whole = len(card.live)
    del optimizer.state[params[6]]
    before = optimizer.paging_report().state_bytes
    gc.collect()
    assert len(card.live) < whole
    train([1], (params, optimizer))
    assert optimizer.state[params[6]]["step"] == 1
    assert optimizer.paging_report().state_bytes > before
    moment = optimizer.state[params[1]]["exp_avg"]
    del optimizer
    gc.collect()
    assert len(card.live) == 1, "a tensor that is in use keeps its memory"
    del moment
    gc.collect()
    assert card.live == {}


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_pages_of_state_that_was_taken_away_make_room_for_new_ones(card, pager):
    params, optimizer = made(pager)
    set_gradients(params, 0)
    params[3].grad = None
    optimizer.step()
    address = optimizer.state[params[6]]["exp_avg"].data_ptr()
    assert card.find(address) is not None
    del optimizer.state[params[6]]
    set_gradients(params[:5], 1)
    params[6].grad = None
    optimizer.step()
    assert card.find(address) is None


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_a_thousand_optimizers_leave_nothing_behind(card, pager):
    param = nn.Parameter(torch.zeros(300))
    param.grad = torch.ones_like(param)
    first = PagedAdamW([param], pager=pager, state_bits=32)
    first.step()
    saved = first.state_dict()
    del first
    for count in range(1000):
        optimizer = PagedAdamW([param], pager=pager)
        optimizer.load_state_dict(saved)
        if count % 100 == 0:
            optimizer.step()
        assert optimizer.paging_report().pages == 1
        assert len(card.live) <= 2
        del optimizer
    del saved
    gc.collect()
    assert card.live == {}


def test_paging_out_and_in_and_the_report(card):
    card.capacity = 100 * PAGE
    params, optimizer = made()
    nothing = optimizer.paging_report()
    assert (nothing.pagers, nothing.state_bytes, nothing.pages) == ({}, 0, 0)
    optimizer.page_out()
    optimizer.page_in()
    train(range(2), (params, optimizer))
    report = optimizer.paging_report()
    moments = [state[f] for state in optimizer.state.values() for f in ("exp_avg", "exp_avg_sq")]
    assert report.pagers == {"cpu": "unified"}
    assert report.reasons == {"cpu": "the card and the processor share memory"}
    exact = sum(moment.nbytes for moment in moments)
    assert exact <= report.state_bytes < exact + 512 * len(moments)
    assert report.resident_bytes == report.state_bytes
    assert (report.bytes_in, report.bytes_out, report.paged_steps) == (0, 0, 0)
    optimizer.page_out()
    out = optimizer.paging_report()
    assert (out.resident_bytes, out.bytes_out) == (0, report.state_bytes)
    optimizer.page_in()
    there = optimizer.paging_report()
    assert (there.resident_bytes, there.bytes_in) == (report.state_bytes, report.state_bytes)
    assert there.faults_avoided > 0
    assert optimizer.paging_report() == there


@pytest.mark.parametrize(
    ("failing", "pager", "reason"),
    [
        ({"managed"}, "pinned", "there was no managed memory"),
        ({"managed", "page_locked"}, "resident", "there was no memory for pages"),
    ],
)
def test_auto_takes_what_there_is_memory_for(card, failing, pager, reason):
    card.capacity = 100 * PAGE
    card.fail_allocation = failing
    cpu, paged = oracle(), made()
    train(range(3), cpu, paged)
    assert_same(paged, cpu)
    report = paged[1].paging_report()
    assert report.pagers == {"cpu": pager}
    assert report.reasons == {"cpu": reason}


def test_no_memory_for_the_pager_that_was_asked_for(card):
    """Nothing is stepped, nothing is half made, and it can be tried again."""
    cpu, (params, optimizer) = oracle(), made("unified")
    card.fail_allocation = {"managed"}
    set_gradients(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(CudaError, match="no managed memory"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert not any(optimizer.state.values())
    card.fail_allocation = set()
    train(range(2), cpu, (params, optimizer))
    assert_same((params, optimizer), cpu)
    saved = optimizer.state_dict()
    card.fail_allocation = {"managed"}
    with pytest.raises(CudaError, match="no managed memory"):
        optimizer.load_state_dict(saved)
    assert_same((params, optimizer), cpu)


def test_a_pager_that_the_card_cannot_do_is_refused_at_once(card):
    card.shares = False
    with pytest.raises(ValueError, match=r'pager "unified" needs managed memory.* use "pinned"'):
        made("unified")
    _, optimizer = made()
    assert optimizer.pager == "auto"


@pytest.mark.parametrize("failing", [None, 1])
def test_several_cards_step_at_the_same_time(monkeypatch, failing):
    """All are launched before any is waited for, and waited for though another fails."""
    seen = []

    class Recorded:
        def __init__(self, plan, card, pager):
            self.number = card
            seen.append(f"launch {card}")
            if card == failing:
                raise CudaError("no kernel")

        def finish(self):
            seen.append(f"finish {self.number}")
            return [self.number]

    monkeypatch.setattr(cuda_update, "CardStep", Recorded)
    optimizer = PagedAdamW([nn.Parameter(torch.zeros(1))])
    monkeypatch.setattr(
        optimizer,
        "_placement",
        SimpleNamespace(card=lambda device: device.index, pager=lambda device: None),
    )
    updates = [
        SimpleNamespace(values=SimpleNamespace(device=torch.device("cuda", number)))
        for number in (1, 0, 1)
    ]
    plan = [({}, updates)]
    if failing is None:
        assert sorted(optimizer._step_on_cards(plan)) == [0, 1]
        assert seen[:2] == ["launch 0", "launch 1"]
        assert sorted(seen[2:]) == ["finish 0", "finish 1"]
    else:
        with pytest.raises(CudaError, match="no kernel"):
            optimizer._step_on_cards(plan)
        assert seen == ["launch 0", "launch 1", "finish 0"]
