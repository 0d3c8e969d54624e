"""The core's AdamW steps by themselves: against ``torch.optim.AdamW``, and what they refuse."""

import pytest
import torch

from fourbit import _core

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1, "threads": 2}


def full_state(param):
    return torch.zeros(param.shape), torch.zeros(param.shape)


def blockwise_state(param):
    blocks = -(-param.numel() // 256)
    codes, scales = torch.zeros(param.shape, dtype=torch.uint8), torch.zeros(blocks)
    return codes, scales, codes.clone(), scales.clone()


def step(bits, params, grads, states, *, steps, **options):
    """`steps` are counted from 1."""
    counts = [torch.tensor(float(number - 1)) for number in steps]
    skipped, counted = counted_step(bits, params, grads, states, counts, **options)
    assert counted == [n - (i in skipped) for i, n in enumerate(steps)]
    return skipped


def counted_step(bits, params, grads, states, counts, **options):
    """The skipped parameters, and how many steps each has taken now."""
    function = {32: _core.adamw32_step, 8: _core.adamw8_step}[bits]
    columns = [list(column) for column in zip(*states, strict=True)]
    skipped = function(params, grads, *columns, **{**OPTIONS, "steps": counts, **options})
    return skipped, [count.item() for count in counts]


@pytest.mark.parametrize("maximize", [False, True])
def test_many_steps_follow_torch(maximize, generator):
    shapes = [(33, 57), (1,), (4096,), (2, 3, 5)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [param.clone().requires_grad_() for param in ours]
    states = [full_state(param) for param in ours]
    oracle = torch.optim.AdamW(
        theirs, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, maximize=maximize
    )
    for count in range(1, 31):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        oracle.step()
        steps = [count] * len(shapes)
        assert step(32, ours, grads, states, steps=steps, maximize=maximize) == []
    for our, their, state in zip(ours, theirs, states, strict=True):
        # The order of operations differs: a few roundings of numbers below 4 in each of 30 steps.
        torch.testing.assert_close(our, their.detach(), rtol=0, atol=30 * 4 * 2**-24)
        moments = oracle.state[their]
        torch.testing.assert_close(state[0], moments["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state[1], moments["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_float_types_step_as_float32_and_round_once(bits, dtype, grad_dtype, generator):
    param = torch.randn(1000, generator=generator).to(dtype)
    grad = torch.randn(1000, generator=generator).to(grad_dtype)
    make = {8: blockwise_state, 32: full_state}[bits]
    wide, state, wide_state = param.float(), make(param), make(param)
    assert step(bits, [param], [grad], [state], steps=[1]) == []
    assert step(bits, [wide], [grad.float()], [wide_state], steps=[1]) == []
    assert torch.equal(param, wide.to(dtype))
    assert all(map(torch.equal, state, wide_state))


@pytest.mark.parametrize("bits", [8, 32])
def test_gradients_that_are_not_finite_are_reported(bits):
    params = [torch.ones(600) for _ in range(3)]
    grads = [torch.full((600,), 0.5) for _ in range(3)]
    grads[1][599] = float("nan")
    make = {8: blockwise_state, 32: full_state}[bits]
    states = [make(param) for param in params]
    assert step(bits, params, grads, states, steps=[1, 1, 1]) == [1]
    assert torch.equal(params[1], torch.ones(600))
    assert not any(tensor.any() for tensor in states[1])
    assert torch.equal(params[0], params[2])
    assert (params[0] < 1).all()


def test_memory_that_stands_twice_is_refused():
    memory = torch.ones(1000)
    before = memory.clone()
    grad = torch.ones(600)
    for params, grads in [
        ([memory[:600], memory[:600]], [grad, grad]),  # one parameter listed twice
        ([memory[:600], memory[400:]], [grad, grad]),  # overlapping in part
        ([memory[:600]], [memory[400:]]),  # a gradient that is overwritten
    ]:
        states = [full_state(param) for param in params]
        with pytest.raises(ValueError, match="same memory stands twice"):
            step(32, params, grads, states, steps=[1] * len(params))
    shared = torch.zeros(600)
    with pytest.raises(ValueError, match="same memory stands twice"):
        step(32, [memory[:600]], [grad], [(shared, shared)], steps=[1])
    assert torch.equal(memory, before)
    # One gradient may serve two parameters, and neighbours may touch.
    params = [memory[:400], memory[400:800]]
    states = [full_state(param) for param in params]
    assert step(32, params, [grad[:400], grad[:400]], states, steps=[1, 1]) == []
    assert torch.equal(memory[:400], memory[400:800])


def test_bad_arguments_are_refused_by_name():
    param, grad = torch.ones(300), torch.ones(300)
    state = full_state(param)
    with pytest.raises(ValueError, match="steps has 2 entries where params has 1"):
        step(32, [param], [grad], [state], steps=[1, 1])
    with pytest.raises(ValueError, match="gradient has 299 elements where the layout needs 300"):
        step(32, [param], [grad[:299]], [state], steps=[1])
    with pytest.raises(ValueError, match="beta2 is 1"):
        step(32, [param], [grad], [state], steps=[1], beta2=1.0)
    for count in (-1.0, 0.5, 2.0**63, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"a step count is .*, not a whole number"):
            counted_step(32, [param], [grad], [state], [torch.tensor(count)])
    with pytest.raises(ValueError, match="a step count has 2 elements where 1 is needed"):
        counted_step(32, [param], [grad], [state], [torch.zeros(2)])
    with pytest.raises(TypeError, match="float64 where float32 is needed"):
        counted_step(32, [param], [grad], [state], [torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(TypeError, match="float64"):
        step(32, [param.double()], [grad], [state], steps=[1])
    with pytest.raises(TypeError, match="bfloat16 where float32 is needed"):
        step(32, [param], [grad], [(state[0].bfloat16(), state[1])], steps=[1])
    with pytest.raises(ValueError, match="not contiguous"):
        step(32, [param[::2]], [grad[:150]], [full_state(param[:150])], steps=[1])
    with pytest.raises(ValueError, match="device"):
        step(32, [param.to("meta")], [grad], [state], steps=[1])
    codes, scales, codes_sq, scales_sq = blockwise_state(param)
    scales[0] = float("inf")
    with pytest.raises(ValueError, match=r"exp_avg_absmax.*element 0 is inf"):
        step(8, [param], [grad], [(codes, scales, codes_sq, scales_sq)], steps=[1])
    assert torch.equal(param, torch.ones(300))
