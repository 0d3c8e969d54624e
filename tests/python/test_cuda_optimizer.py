"""`PagedAdamW` on a GPU: the bytes of its step on the CPU. How to run: see ``on_card.py``."""

import copy
import io

import pytest
import torch
from torch import nn

from fourbit.optim import PagedAdamW
from on_card import (
    CARD,
    LONG_SLEEP_CYCLES,
    assert_same_bytes,
    numbers,
    watched_synchronisations,
)
from tensors import DTYPES

pytestmark = pytest.mark.cuda

# On both sides of a block of state, of a tile of the kernel, and of the least size of 8-bit state.
SHAPES = [(70, 90), (33,), (5, 4, 3), (), (0,), (1,), (255,), (257,), (4095,), (4096,), (64, 129)]
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.02}


def pair(shapes, dtype=torch.float32):
    """The same parameters on the CPU and on the card."""
    on_cpu = [
        nn.Parameter(numbers(*shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(shapes)
    ]
    on_card = [nn.Parameter(param.detach().to(CARD, copy=True)) for param in on_cpu]
    return on_cpu, on_card


def set_gradients(step, *lists):
    """The same gradients everywhere, of magnitudes over six decades."""
    source = torch.Generator().manual_seed(1000 + step)
    for params in zip(*lists, strict=True):
        shape = params[0].shape
        scale = 10 ** (-6 * torch.rand(shape, generator=source))
        grad = torch.randn(shape, generator=source) * scale
        for param in params:
            param.grad = grad.to(param.device, param.dtype, copy=True)


def assert_same_optimizers(on_card, on_cpu):
    """Parameters and state, bit for bit."""
    for ours, expected in zip(on_card.param_groups, on_cpu.param_groups, strict=True):
        for param, twin in zip(ours["params"], expected["params"], strict=True):
            assert_same_bytes(param, twin)
            state, expected_state = on_card.state[param], on_cpu.state[twin]
            assert state.keys() == expected_state.keys()
            for field in state:
                found = state[field]
                if field == "step":
                    assert found == expected_state[field]
                else:
                    assert_same_bytes(found, expected_state[field])


def steps(optimizers, lists, which):
    for step in which:
        set_gradients(step, *lists)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("maximize", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 32])
def test_the_bytes_of_the_cpu(bits, dtype, maximize):
    lists = pair(SHAPES, dtype)
    optimizers = [
        PagedAdamW(params, state_bits=bits, maximize=maximize, **OPTIONS) for params in lists
    ]
    for step in range(8):
        set_gradients(step, *lists)
        if step == 3:
            for params in lists:
                params[0].grad.zero_()
        if step == 5:
            for params in lists:
                params[0].grad.view(-1)[:300] = 0
                params[1].grad = None
        for optimizer in optimizers:
            optimizer.step()
        assert_same_optimizers(optimizers[1], optimizers[0])


def test_many_tensors_of_several_groups_and_dtypes():
    """Four hundred in one launch, with other options in each group."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 9000, (400,), generator=generator).tolist()
    lists = pair([(size,) for size in sizes])
    for params in lists:
        for index in range(0, 400, 3):
            params[index].data = params[index].data.bfloat16()
        for index in range(1, 400, 3):
            params[index].data = params[index].data.half()
    optimizers = [
        PagedAdamW(
            [
                {"params": params[:150], "weight_decay": 0.1},
                {"params": params[150:250], "lr": 3e-2, "betas": (0.8, 0.95), "state_bits": 32},
                {"params": params[250:], "eps": 1e-6, "maximize": True},
            ]
        )
        for params in lists
    ]
    steps(optimizers, lists, range(3))
    assert_same_optimizers(optimizers[1], optimizers[0])


@pytest.mark.parametrize("bits", [8, 32])
def test_any_memory_layout(bits):
    on_cpu, (plain,) = pair([(70, 80)])
    backing = torch.zeros(3, 160, 71, device=CARD)
    odd = nn.Parameter(backing[1].t()[:70, ::2])
    odd.data.copy_(plain)
    flat = torch.zeros(5601, device=CARD)
    shifted = nn.Parameter(flat[1:].view(70, 80))
    shifted.data.copy_(plain)
    lists = [on_cpu, [plain], [odd], [shifted]]
    optimizers = [PagedAdamW(params, state_bits=bits) for params in lists]
    for step in range(4):
        set_gradients(step, *lists)
        odd.grad = odd.grad.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers[1:]:
        assert_same_optimizers(optimizer, optimizers[0])
    assert not backing[0].any()
    assert not backing[2].any()
    assert flat[0] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**64])
@pytest.mark.parametrize("bits", [8, 32])
def test_gradients_that_are_not_finite_are_skipped_and_counted(bits, bad):
    lists = pair([(70, 90), (33,), (64, 129)])
    optimizers = [PagedAdamW(params, state_bits=bits) for params in lists]
    steps(optimizers, lists, range(2))
    before = lists[1][2].detach().clone()
    set_gradients(2, *lists)
    for params, optimizer in zip(lists, optimizers, strict=True):
        params[2].grad[5, 7] = bad
        with pytest.warns(RuntimeWarning, match="skipped the update of parameter 2"):
            optimizer.step()
        assert optimizer.skipped_updates == 1
    assert torch.equal(lists[1][2], before)
    assert_same_optimizers(optimizers[1], optimizers[0])
    steps(optimizers, lists, range(3, 5))
    assert_same_optimizers(optimizers[1], optimizers[0])


def test_damaged_state_is_named_and_nothing_is_stepped():
    _, params = pair([(70, 90), (64, 129)])
    optimizer = PagedAdamW(params)
    steps([optimizer], [params], range(1))
    before = [param.detach().clone() for param in params]
    optimizer.state[params[1]]["exp_avg_absmax"][3] = float("nan")
    with pytest.raises(ValueError, match="state of parameter 1: exp_avg_absmax holds NaN"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("maximize", [False, True], ids=["down", "up"])
def test_32_bits_follow_torch(maximize):
    _, ours = pair(SHAPES)
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "maximize": maximize}
    optimizers = [
        PagedAdamW(ours, state_bits=32, **settings),
        torch.optim.AdamW(theirs, **settings),
    ]
    steps(optimizers, [ours, theirs], range(100))
    for param, twin in zip(ours, theirs, strict=True):
        # 100 roundings of numbers below 8, each by at most 2^-22, in two orders of operation.
        torch.testing.assert_close(param, twin, rtol=0, atol=2e-6)
        for field in ("exp_avg", "exp_avg_sq"):
            one, other = optimizers[0].state[param][field], optimizers[1].state[twin][field]
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert optimizers[0].state[param]["step"] == optimizers[1].state[twin]["step"]


def test_grad_scaler():
    """A power of two changes no bit of a gradient; a step with an overflow is left out whole."""
    _, scaled = pair([(70, 90), (33,)])
    plain = [nn.Parameter(param.detach().clone()) for param in scaled]
    optimizers = PagedAdamW(scaled), PagedAdamW(plain)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    inputs = [numbers(*param.shape, seed=11).to(CARD) for param in scaled]
    for step in range(4):
        losses = [
            sum((param * x).sum() for param, x in zip(params, inputs, strict=True)) * 0.5
            for params in (scaled, plain)
        ]
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(losses[0]).backward()
        losses[1].backward()
        if step == 2:
            scaled[0].grad[0, 0] = float("inf")
        else:
            optimizers[1].step()
        scaler.step(optimizers[0])
        scaler.update()
        for param, twin in zip(scaled, plain, strict=True):
            assert torch.equal(param, twin), f"step {step}"
    assert scaler.get_scale() == 2.0**9
    assert optimizers[0].skipped_updates == 0


@pytest.mark.parametrize("bits", [8, 32])
def test_state_goes_to_the_card_and_back(bits):
    lists = pair(SHAPES, torch.bfloat16)
    moving, staying = pair(SHAPES, torch.bfloat16)[0], lists[0]
    on_cpu, on_card = PagedAdamW(moving, state_bits=bits), PagedAdamW(lists[1], state_bits=bits)
    stayed = PagedAdamW(staying, state_bits=bits)
    steps([on_cpu, stayed], [moving, staying], range(3))

    def hand_over(one, params, other, other_params):
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        for param, twin in zip(params, other_params, strict=True):
            twin.data.copy_(param.data)

    hand_over(on_cpu, moving, on_card, lists[1])
    for state in on_card.state.values():
        assert all(part.device.type == CARD.type for name, part in state.items() if name != "step")
    steps([on_card, stayed], [lists[1], staying], range(3, 6))
    hand_over(on_card, lists[1], on_cpu, moving)
    steps([on_cpu, stayed], [moving, staying], range(6, 9))
    for param, twin in zip(moving, staying, strict=True):
        assert torch.equal(param, twin)
    one, other = on_cpu.state_dict()["state"], stayed.state_dict()["state"]
    for index, state in one.items():
        for field, value in state.items():
            assert value.device.type == "cpu"
            assert torch.equal(value, other[index][field]), (index, field)


def test_parameters_on_the_cpu_and_on_the_card_in_one_optimizer():
    on_cpu, on_card = pair([(70, 90), (33,)])
    alone = copy.deepcopy(on_cpu)
    mixed = PagedAdamW([*on_cpu, *on_card])
    expected = PagedAdamW(alone)
    for step in range(3):
        set_gradients(step, on_cpu, on_card, alone)
        mixed.step()
        expected.step()
    for param, twin, right in zip(on_cpu, on_card, alone, strict=True):
        assert torch.equal(param, right)
        assert_same_bytes(twin, right)


def test_a_step_waits_for_the_card_once():
    _, params = pair([(70, 90), (33,), (64, 129)])
    optimizer = PagedAdamW(params)
    steps([optimizer], [params], range(2))
    set_gradients(2, params)
    with watched_synchronisations() as found:
        optimizer.step()
    assert len(found) == 1, "that is where torch reads which parameters were skipped"


def test_a_step_runs_on_the_current_stream():
    lists = pair([(70, 90), (4096,)])
    optimizers = [PagedAdamW(params) for params in lists]
    steps(optimizers, lists, range(1))
    set_gradients(1, *lists)
    gradients = [param.grad.clone() for param in lists[1]]
    for param in lists[1]:
        param.grad.zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_SLEEP_CYCLES)
        for param, gradient in zip(lists[1], gradients, strict=True):
            param.grad.copy_(gradient)  # what would be read too early on any other stream
        optimizers[1].step()
    side.synchronize()
    optimizers[0].step()
    assert_same_optimizers(optimizers[1], optimizers[0])
