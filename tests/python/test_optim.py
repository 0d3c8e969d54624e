"""`PagedAdamW`: bit for bit against the plain-torch reference, as an optimizer."""

import copy
import gc
import pickle
import re
import warnings
import weakref

import psutil
import pytest
import torch
from torch import Tensor, nn

from adamw_steps import (
    assert_same_bits,
    assert_same_state,
    parameters,
    saved_and_loaded,
    set_gradients,
    train,
)
from fourbit import reference
from fourbit.optim import PagedAdamW
from fourbit.optim import state as state_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- against torch --------------------------------------------------------------------------------


def test_mixed_dtypes_in_one_group():
    mixed = [*parameters((70, 80)), *parameters((70, 80), dtype=torch.bfloat16)]
    alone = [*parameters((70, 80)), *parameters((70, 80), dtype=torch.bfloat16)]
    for bits in (8, 32):
        together = PagedAdamW(mixed, state_bits=bits)
        apart = [PagedAdamW([param], state_bits=bits) for param in alone]
        for step in range(5):
            for params, optimizers in ((mixed, [together]), (alone, apart)):
                set_gradients(params, step)
                for optimizer in optimizers:
                    optimizer.step()
        assert_same_bits(mixed, alone)


def test_state_dicts_are_exchanged_with_torch():
    ours, theirs = parameters((70, 90), (5,)), parameters((70, 90), (5,))
    optimizer = PagedAdamW(ours, state_bits=32, lr=1e-2)
    oracle = torch.optim.AdamW(theirs, lr=1e-2)
    for lap in range(3):
        train(optimizer, ours, range(10 * lap, 10 * lap + 10))
        train(oracle, theirs, range(10 * lap, 10 * lap + 10))
        one, other = optimizer.state_dict(), saved_and_loaded(oracle.state_dict())
        optimizer.load_state_dict(other)
        oracle.load_state_dict(saved_and_loaded(one))
    for a, b in zip(ours, theirs, strict=True):
        # Roundings of numbers below 4, each by at most 2^-23, in two orders of operation.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert optimizer.state[a]["step"] == 30


def test_bfloat16_state_of_torch_is_widened():
    (param,) = parameters((9, 9), dtype=torch.bfloat16)
    oracle = torch.optim.AdamW([param])
    train(oracle, [param], range(3))
    optimizer = PagedAdamW([param], state_bits=32)
    optimizer.load_state_dict(oracle.state_dict())
    moment = optimizer.state[param]["exp_avg"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, oracle.state[param]["exp_avg"].float())


def test_8_bit_trains_as_well_as_torch():
    """A regression with noise, so that the loss has a floor well above zero."""
    source = torch.Generator().manual_seed(7)
    inputs = torch.randn(512, 64, generator=source)
    truth = 0.3 * torch.randn(64, 64, generator=source)
    targets = inputs @ truth + torch.randn(512, 64, generator=source)
    losses = []
    for make in (
        lambda params: torch.optim.AdamW(params, lr=5e-2),
        lambda params: PagedAdamW(params, lr=5e-2, state_bits=8),
    ):
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = make([weight])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (inputs @ weight - targets).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0] < 1.0


# --- against the reference, bit for bit -----------------------------------------------------------

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.02}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (4099,), (3, 41, 57), (8192,)])
def test_8_bit_equals_the_reference(shape, dtype):
    (param,) = parameters(shape, dtype=dtype)
    optimizer = PagedAdamW([param], state_bits=8, **OPTIONS)
    expected = param.detach().clone()
    zeros = torch.zeros(shape, dtype=torch.uint8)
    state = state_of.new_state(param, 8, (zeros, zeros.clone()))
    moments = [state[f] for f in ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")]
    for step in range(12):
        set_gradients([param], step)
        if step == 3:
            param.grad.zero_()
        if step == 6:
            param.grad.mul_(1e-4)
        if step == 9:
            param.grad.view(-1)[:300] = 0
        grad = param.grad.clone()
        optimizer.step()
        expected, *moments = reference.adamw8(expected, grad, *moments, step=step + 1, **OPTIONS)
        codes, absmax, codes_sq, absmax_sq = moments
        actual = optimizer.state[param]
        assert_same_bits([param], [expected])
        assert_same_bits([actual["exp_avg"], actual["exp_avg_absmax"]], [codes, absmax])
        assert_same_bits([actual["exp_avg_sq"], actual["exp_avg_sq_absmax"]], [codes_sq, absmax_sq])
        assert actual["step"] == step + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_32_bit_equals_the_reference(dtype):
    (param,) = parameters((63, 65), dtype=dtype)
    optimizer = PagedAdamW([param], state_bits=32, **OPTIONS)
    expected, moments = param.detach().clone(), [torch.zeros(63, 65)] * 2
    exact, exact_moments = expected.double(), [torch.zeros(63, 65)] * 2
    for step in range(12):
        set_gradients([param], step)
        grad = param.grad.clone()
        optimizer.step()
        expected, *moments = reference.adamw_float32(
            expected, grad, *moments, step=step + 1, **OPTIONS
        )
        exact, *exact_moments = reference.adamw(
            exact, grad, *exact_moments, step=step + 1, **OPTIONS
        )
        actual = optimizer.state[param]
        assert_same_bits([param], [expected])
        assert_same_bits([actual["exp_avg"], actual["exp_avg_sq"]], moments)
    # 12 roundings to the parameter's dtype, of numbers below 4.
    bound = 12 * 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(param.double(), exact, rtol=0, atol=bound)


def test_thread_count_does_not_matter():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            params = parameters((300, 301), (70, 70), (9,))
            train(PagedAdamW(params), params, range(3))
            results.append(params)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_elements_without_gradient_do_not_run_away():
    """A moment that is tiny beside others of its block must not be divided by one rounded to 0."""
    (param,) = parameters((64, 256))
    param.data.zero_()
    optimizer = PagedAdamW([param], lr=1e-3, weight_decay=0)
    for step in range(30):
        set_gradients([param], step)
        if step:
            param.grad[:, ::2] = 0
        optimizer.step()
    # AdamW moves an element by about lr a step; torch's largest here is 0.0174.
    assert param.abs().max() < 30 * 1e-3 * 2


# --- the shape of the state -----------------------------------------------------------------------


def test_state_is_plain_and_small_tensors_stay_in_float32():
    large, small = parameters((64, 64), (4095,), dtype=torch.bfloat16)
    optimizer = PagedAdamW([large, small])
    train(optimizer, [large, small], range(1))
    state = optimizer.state_dict()["state"]
    shapes = {field: (value.dtype, list(value.shape)) for field, value in state[0].items()}
    assert shapes == {
        "step": (torch.float32, []),
        "exp_avg": (torch.uint8, [64, 64]),
        "exp_avg_absmax": (torch.float32, [16]),
        "exp_avg_sq": (torch.uint8, [64, 64]),
        "exp_avg_sq_absmax": (torch.float32, [16]),
    }
    shapes = {field: (value.dtype, list(value.shape)) for field, value in state[1].items()}
    assert shapes == {
        "step": (torch.float32, []),
        "exp_avg": (torch.float32, [4095]),
        "exp_avg_sq": (torch.float32, [4095]),
    }
    assert all(type(value) is Tensor for entry in state.values() for value in entry.values())


def test_groups_choose_their_state_bits():
    one, other = parameters((64, 64), (64, 64))
    optimizer = PagedAdamW([{"params": [one], "state_bits": 32}, {"params": [other]}])
    train(optimizer, [one, other], range(1))
    assert optimizer.state[one]["exp_avg"].dtype == torch.float32
    assert optimizer.state[other]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 32])
def test_any_memory_layout(bits):
    """Transposed, strided, offset and negative memory: the same as contiguous memory."""
    plain = parameters((70, 80))[0]
    backing = torch.zeros(3, 160, 71)
    odd = nn.Parameter(backing[1].t()[:70, ::2])
    odd.data.copy_(plain)
    assert not odd.is_contiguous()
    optimizers = PagedAdamW([plain], state_bits=bits), PagedAdamW([odd], state_bits=bits)
    for step in range(4):
        set_gradients([plain], step)
        odd.grad = plain.grad.t().contiguous().t()
        if step == 2:
            negative = torch.complex(torch.zeros(70, 80), -plain.grad).conj().imag
            assert negative.is_neg()
            odd.grad = negative
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(odd, plain)
    assert torch.equal(backing[1].t()[:70, ::2], plain)
    assert not backing[0].any()
    assert not backing[2].any()
    assert_same_bits([*optimizers[0].state[plain].values()], [*optimizers[1].state[odd].values()])


def test_parameters_that_are_slices_of_one_buffer():
    backing = torch.randn(2 * 5000)
    sliced = [nn.Parameter(backing[:5000]), nn.Parameter(backing[5000:])]
    plain = [nn.Parameter(part.detach().clone()) for part in sliced]
    for params in (sliced, plain):
        train(PagedAdamW(params), params, range(3))
    assert_same_bits(sliced, plain)


# --- as an optimizer of torch ---------------------------------------------------------------------


def test_missing_gradients_are_skipped():
    one, other = parameters((64, 64), (64, 64))
    before = other.detach().clone()
    optimizer = PagedAdamW([one, other])
    train(optimizer, [one], range(3))
    assert torch.equal(other, before)
    assert list(optimizer.state_dict()["state"]) == [0]
    train(optimizer, [one, other], range(1))
    assert optimizer.state[other]["step"] == 1
    assert optimizer.state[one]["step"] == 4


def test_closure_and_hooks():
    (param,) = parameters((64, 64))
    optimizer = PagedAdamW([param])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad
    assert calls == ["pre", "closure", "post"]
    assert optimizer.step(closure) < first
    assert optimizer.step() is None
    optimizer.zero_grad()
    assert param.grad is None


def test_a_step_is_seen_by_autograd():
    (param,) = parameters((64, 64))
    loss = param.square().sum()
    train(PagedAdamW([param]), [param], range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensor_learning_rate_follows_its_scheduler():
    tensor, number = parameters((64, 64)), parameters((64, 64))
    for params, lr in ((tensor, torch.tensor(0.0625)), (number, 0.0625)):
        optimizer = PagedAdamW(params, lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(optimizer, params, range(4), schedule)
    assert_same_bits(tensor, number)


def test_added_group():
    late, early = parameters((64, 64), (64, 64))
    optimizer = PagedAdamW([early], lr=1e-2)
    train(optimizer, [early], range(2))
    optimizer.add_param_group({"params": late, "lr": 1e-3, "state_bits": 32})
    train(optimizer, [early, late], range(2))
    assert [optimizer.state[param]["step"].item() for param in (early, late)] == [4, 2]
    assert optimizer.state[late]["exp_avg"].dtype == torch.float32
    assert optimizer.param_groups[1]["weight_decay"] == 0.01


def test_a_refused_group_leaves_no_trace():
    early, late = parameters((4, 4), (4, 4))
    optimizer = PagedAdamW([early])
    with pytest.raises(ValueError, match="state_bits is 4"):
        optimizer.add_param_group({"params": [late], "state_bits": 4})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [late]})


def test_the_state_dict_decides_the_state_bits():
    params, others = parameters((64, 64)), parameters((64, 64))
    saved = PagedAdamW(params, state_bits=8)
    train(saved, params, range(2))
    resumed = PagedAdamW(others, state_bits=32)
    resumed.load_state_dict(saved.state_dict())
    assert_same_state(saved, resumed)


def test_loading_copies():
    params, others = parameters((64, 64)), parameters((64, 64))
    one, other = PagedAdamW(params), PagedAdamW(others)
    train(one, params, range(2))
    state_dict = one.state_dict()
    before = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    train(other, others, range(2))
    for field, value in before["state"][0].items():
        assert torch.equal(state_dict["state"][0][field], value)


def test_state_dict_hooks_see_the_whole():
    (param,) = parameters((64, 64))
    optimizer = PagedAdamW([param])
    train(optimizer, [param], range(2))
    state_dict = optimizer.state_dict()
    seen = []

    def before(_, state_dict):
        seen.append(state_dict["state"][0]["step"].item())
        state = {0: {**state_dict["state"][0], "step": torch.tensor(7.0)}}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.append(loaded.state[param]["step"].item())
    )
    optimizer.load_state_dict(state_dict)
    optimizer.load_state_dict(state_dict)
    assert seen == [2, 7, 2, 7]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_their_own_way(clone):
    (param,) = parameters((64, 64))
    param.grad = torch.full_like(param, torch.nan)
    optimizer = PagedAdamW([param])
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        optimizer.step()
    train(optimizer, [param], range(2))
    twin = clone(optimizer)
    assert (twin.pager, twin.skipped_updates) == ("auto", 1)
    (twin_param,) = twin.param_groups[0]["params"]
    assert twin_param.data_ptr() != param.data_ptr()
    train(optimizer, [param], range(2, 4))
    assert twin.state[twin_param]["step"] == 2
    train(twin, [twin_param], range(2, 4))
    assert_same_bits([param], [twin_param])
    assert_same_state(optimizer, twin)


def test_a_thousand_optimizers_leave_nothing_behind():
    (param,) = parameters((128, 128))
    param.grad = torch.ones_like(param)

    def cycle(count):
        for _ in range(count):
            PagedAdamW([param], state_bits=32).step()  # 128 KiB of state
        gc.collect()
        tensors = sum(type(thing) is Tensor for thing in gc.get_objects())
        return psutil.Process().memory_info().rss, tensors

    before = cycle(50)
    optimizer = PagedAdamW([param])
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    after = cycle(1000)
    # What other tests have left may go meanwhile.
    assert after[1] <= before[1]
    # A thousand states are 125 MiB; the allocator may keep a few pages.
    assert after[0] - before[0] < 16 * 2**20


# --- gradients that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**63])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_skips_its_tensor(bits, bad, dtype):
    params, others = (parameters((64, 64), (70, 70), dtype=dtype) for _ in range(2))
    optimizer, oracle = PagedAdamW(params, state_bits=bits), PagedAdamW(others, state_bits=bits)
    for one, two in ((optimizer, params), (oracle, others)):
        train(one, two, range(2))
    set_gradients(params, 2)
    set_gradients(others, 2)
    params[0].grad[63, 63] = bad
    others[0].grad = None
    with pytest.warns(RuntimeWarning, match="skipped the update of parameter 0 for"):
        optimizer.step()
    oracle.step()
    assert_same_bits(params, others)
    assert_same_state(optimizer, oracle)
    assert optimizer.skipped_updates == 1


def test_skipped_updates_are_counted_and_warned_of_now_and_then():
    params = dict(zip(("body.weight", "head.weight"), parameters((4, 4), (4, 4)), strict=True))
    optimizer = PagedAdamW(params.items())
    messages = []
    for _ in range(205):
        for param in params.values():
            param.grad = torch.full_like(param, torch.nan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        messages += [str(warning.message) for warning in caught]
    assert optimizer.skipped_updates == 410
    assert [re.search(r"(\d+) updates so far", m)[1] for m in messages] == ["2", "202", "402"]
    assert "parameter 0 (body.weight) and 1 more" in messages[0]


def test_grad_scaler_leaves_out_the_whole_step():
    params, others = parameters((64, 64), (8,)), parameters((64, 64), (8,))
    optimizer, oracle = PagedAdamW(params), PagedAdamW(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        set_gradients(params, step)
        set_gradients(others, step)
        scaler.scale(torch.zeros(()))
        for param in params:
            param.grad *= scaler.get_scale()
        bad = step in (2, 3)
        if bad:
            params[1].grad[3] = torch.inf
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaler.step(optimizer)
        scaler.update()
        if not bad:
            oracle.step()
    # Scales are powers of two, so that unscaled gradients are exact.
    assert_same_bits(params, others)
    assert_same_state(optimizer, oracle)
    assert scaler.get_scale() == 256
    assert optimizer.skipped_updates == 0


# --- paging, where there is none ---------------------------------------------------------------


@pytest.mark.parametrize("pager", ["auto", "resident"])
def test_pagers_of_the_cpu(pager):
    params = parameters((64, 64))
    train(PagedAdamW(params, pager=pager), params, range(1))


def test_the_report_of_a_cpu():
    params = parameters((64, 64), (3, 4))
    optimizer = PagedAdamW(params)
    train(optimizer, params, range(2))
    optimizer.page_out()
    optimizer.page_in()
    report = optimizer.paging_report()
    assert report.pagers == {"cpu": "resident"}
    assert report.reasons == {"cpu": "the parameters are in the processor's memory"}
    assert report.state_bytes == report.resident_bytes == 2 * 64 * 64 + 2 * 4 * 12
    assert (report.pages, report.bytes_in, report.bytes_out, report.paged_steps) == (0, 0, 0, 0)
