"""`PagedAdamW`'s step on a card, without one: the same bytes as its step on the CPU."""

import pytest
import torch
from torch import nn

import emulate
import emulated_program
from fourbit import PagedAdamW
from fourbit.optim.cuda_update import DamagedStateError, run_on_card

if emulate.unavailable():
    pytest.skip(emulate.unavailable(), allow_module_level=True)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulated_program.patch(monkeypatch)


def parameters():
    """Small ones, which keep 32-bit state, large ones, tails, an empty one, every dtype."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5,), (64, 65), (0, 3), (4096,), (17, 301), ()]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[index % 3]))
        for index, shape in enumerate(shapes)
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


@torch.no_grad()
def step_on_card(optimizer):
    """As `PagedAdamW.step` steps what is on a card; returns what was skipped."""
    plan = [
        (group, [optimizer._update(param, group) for param in group["params"]])
        for group in optimizer.param_groups
    ]
    return run_on_card(plan, torch.device("cpu"))


def both():
    """The same optimizer twice: two groups of different options and state."""
    made = []
    for params in (parameters(), parameters()):
        groups = [
            {"params": params[:3], "weight_decay": 0.1, "betas": (0.8, 0.95)},
            {"params": params[3:], "state_bits": 32, "lr": 0.02, "maximize": True},
        ]
        made.append((params, PagedAdamW(groups, lr=0.01, state_bits=8)))
    return made


def assert_same(one, other):
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(ours, theirs)
        state, expected = one[1].state[ours], other[1].state[theirs]
        assert state.keys() == expected.keys()
        for field, tensor in expected.items():
            assert torch.equal(state[field], tensor), field


def test_the_same_bytes_as_on_the_cpu():
    cpu, card = both()
    for step in range(4):
        for params, _ in (cpu, card):
            set_gradients(params, step)
        cpu[1].step()
        assert step_on_card(card[1]) == []
        assert_same(card, cpu)


def test_a_gradient_that_is_not_finite_skips_its_parameter_alone():
    cpu, card = both()
    for params, _ in (cpu, card):
        set_gradients(params, 0)
        params[1].grad[3, 4] = float("nan")
        params[4].grad[-1, -1] = float("-inf")
    with pytest.warns(RuntimeWarning, match="skipped the update of parameter 1 and 1 more"):
        cpu[1].step()
    skipped = step_on_card(card[1])
    assert [id(param) for param in skipped] == [id(card[0][1]), id(card[0][4])]
    assert_same(card, cpu)


def test_damaged_scales_are_named_and_nothing_is_stepped():
    _, (params, optimizer) = both()
    set_gradients(params, 0)
    step_on_card(optimizer)
    optimizer.state[params[1]]["exp_avg_sq_absmax"][2] = float("inf")
    before = [param.detach().clone() for param in params]
    with pytest.raises(DamagedStateError, match="exp_avg_sq_absmax holds NaN or infinity") as error:
        step_on_card(optimizer)
    assert error.value.param is params[1]
    assert all(map(torch.equal, before, params))
    assert optimizer.state[params[0]]["step"] == 1


def test_memory_that_is_not_contiguous_and_autograd():
    """The step is written into the parameter's own memory, and autograd is told."""
    plain = nn.Parameter(torch.randn(70, 80, generator=torch.Generator().manual_seed(1)))
    odd = nn.Parameter(torch.empty(80, 70).t())
    odd.data.copy_(plain)
    version = odd._version
    for param in (plain, odd):
        param.grad = torch.ones(70, 80)
        step_on_card(PagedAdamW([param]))
    assert torch.equal(plain, odd)
    assert not odd.is_contiguous()
    assert odd._version > version


def test_nothing_is_launched_for_empty_parameters(monkeypatch):
    empty = nn.Parameter(torch.empty(0, 4))
    empty.grad = torch.empty(0, 4)
    optimizer = PagedAdamW([empty])
    monkeypatch.setattr(emulated_program.EmulatedProgram, "launch", None)
    assert step_on_card(optimizer) == []
    assert optimizer.state[empty]["step"] == 1
