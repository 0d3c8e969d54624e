"""`PagedAdamW` in torch's place: numbers over 200 steps, schedules, resuming, compiled models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fourbit.optim import PagedAdamW


def relative(found: Tensor, expected: Tensor) -> float:
    """``‖found - expected‖ / ‖expected‖``, in float64; 0 for empty tensors."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm()) if expected.numel() else 0.0


# --- the numbers of torch -------------------------------------------------------------------------

SHAPES = [(70, 90), (33,), (5, 4, 30), (), (129, 65), (0,), (300,)]
DTYPES = [
    *(torch.float32, torch.float32, torch.bfloat16, torch.float32),
    *(torch.float16, torch.float32, torch.float32),
]
PEAKS = [1e-2, 3e-2, 5e-3, 1e-2]


def in_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """No two of the same settings, and one that ascends."""
    return [
        {"params": params[:2], "weight_decay": 0.1},
        {"params": params[2:4], "lr": 3e-2, "betas": (0.8, 0.95), "weight_decay": 0.0},
        {"params": params[4:6], "eps": 1e-6},
        {"params": params[6:], "maximize": True, "weight_decay": 0.3},
    ]


def set_gradients(step: int, *lists: list[nn.Parameter]) -> None:
    """The same everywhere, rounded to the dtype in the first list, over six decades."""
    source = torch.Generator().manual_seed(1000 + step)
    for params in zip(*lists, strict=True):
        scale = 10 ** (-6 * torch.rand(params[0].shape, generator=source))
        grad = torch.randn(params[0].shape, generator=source) * scale
        for param in params:
            param.grad = grad.to(params[0].dtype).to(param.dtype)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    """Moves the first beta too."""
    return lr_scheduler.OneCycleLR(optimizer, max_lr=PEAKS, total_steps=201)


def warm_cosine(optimizer: torch.optim.Optimizer) -> Any:
    return transformers.get_cosine_schedule_with_warmup(optimizer, 20, 200)


@pytest.mark.parametrize("schedule", [one_cycle, warm_cosine])
def test_32_bits_stay_within_a_millionth_of_torch_over_200_steps(
    schedule: Callable[[torch.optim.Optimizer], Any], generator: torch.Generator
) -> None:
    """Ours steps parameters of any dtype in float32 and rounds once; so torch has float32 copies.

    A copy of a half-precision parameter is set to what ours rounded it to before each step: whether
    a number falls on this or that side of a tie depends on its last float32 bit, and parameters
    would part by a whole unit of the narrow dtype there.

    The bound is on the norm of a tensor, since first moments and parameters pass through zero. One
    rounding of float32 is 6e-8, and the two differ in the order of a few operations a step; the
    worst tensor of both schedules was 2.4e-7 away when this was written.
    """
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours = [nn.Parameter(v.to(dtype)) for v, dtype in zip(values, DTYPES, strict=True)]
    theirs = [nn.Parameter(param.detach().float().clone()) for param in ours]
    optimizers = [
        PagedAdamW(in_groups(ours), lr=1e-2, state_bits=32),
        torch.optim.AdamW(in_groups(theirs), lr=1e-2),
    ]
    schedules = [schedule(optimizer) for optimizer in optimizers]
    for step in range(200):
        set_gradients(step, ours, theirs)
        narrow = [pair for pair in zip(ours, theirs, strict=True) if pair[0].dtype != torch.float32]
        for param, copy in narrow:
            copy.data.copy_(param)
        for optimizer in optimizers:
            optimizer.step()
        for each in schedules:
            each.step()
        for param, copy in narrow:
            exact = copy.detach()
            unit = torch.finfo(param.dtype).eps * 2.0 ** (torch.frexp(exact)[1] - 1)
            least = torch.finfo(param.dtype).smallest_normal * torch.finfo(param.dtype).eps
            # One rounding, and the step before it.
            bound = unit.clamp(min=least) / 2 + 1e-6 * exact.abs()
            assert bool(((param.float() - exact).abs() <= bound).all()), f"step {step}"
    for param, twin in zip(ours, theirs, strict=True):
        state, expected = optimizers[0].state[param], optimizers[1].state[twin]
        assert torch.equal(state["step"], expected["step"])
        if param.dtype == torch.float32:
            assert relative(param, twin) <= 1e-6
        for field in ("exp_avg", "exp_avg_sq"):
            assert state[field].dtype == torch.float32
            assert relative(state[field], expected[field]) <= 1e-6, field
        # Sums of squares lose nothing to cancellation: so each number, and not the norm alone.
        torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], rtol=1e-6, atol=0)


# --- schedules ------------------------------------------------------------------------------------


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (t + 1)]),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 2e-2, step_size_up=4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 15)],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_steer_as_they_steer_torch(name: str, generator: torch.Generator) -> None:
    start = [torch.randn(shape, generator=generator) for shape in ((40, 30), (50,))]
    # Losses that stop falling, for the schedule that looks at them.
    losses = [1 / (step + 1) if step < 6 else 0.5 for step in range(20)]
    runs = []
    for make in (PagedAdamW, torch.optim.AdamW):
        params = [nn.Parameter(values.clone()) for values in start]
        options = {"state_bits": 32} if make is PagedAdamW else {}
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 2e-2}]
        optimizer = make(groups, lr=1e-2, **options)
        schedule = SCHEDULES[name](optimizer)
        settings = []
        for step in range(20):
            set_gradients(step, params)
            optimizer.step()
            schedule.step(*losses[step : step + 1] if name == "ReduceLROnPlateau" else ())
            settings.append([(group["lr"], *group["betas"]) for group in optimizer.param_groups])
        runs.append((params, settings))
    (ours, our_settings), (theirs, their_settings) = runs
    assert our_settings == their_settings
    assert our_settings[-1] != our_settings[0]
    for param, twin in zip(ours, theirs, strict=True):
        assert relative(param, twin) <= 1e-6  # as above


# --- saved and resumed ----------------------------------------------------------------------------


class Run:
    """A small regression; one weight has state of the other width."""

    def __init__(self, bits: int) -> None:
        other = {8: 32, 32: 8}[bits]
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(40, 120), nn.Tanh(), nn.Linear(120, 70))
        self.model[2].to(torch.bfloat16)
        first, first_bias, second, second_bias = self.model.parameters()
        groups = [
            {"params": [first], "weight_decay": 0.1},
            {"params": [first_bias, second_bias], "weight_decay": 0.0, "betas": (0.8, 0.95)},
            {"params": [second], "lr": 3e-3, "eps": 1e-6, "state_bits": other},
        ]
        self.optimizer = PagedAdamW(groups, lr=1e-2, state_bits=bits)  # type: ignore[arg-type]
        self.schedule = lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=[1e-2, 1e-2, 3e-3], total_steps=101
        )

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            inputs = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
            hidden = self.model[1](self.model[0](inputs))
            loss = (self.model[2](hidden.bfloat16()).float() - inputs[:, :1]).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses


def by_torch(run: Run, folder: Path) -> dict[str, Any]:
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    state: dict[str, Any] = torch.load(folder / "optimizer.pt", weights_only=True)
    return state


def by_safetensors(run: Run, folder: Path) -> dict[str, Any]:
    """Nothing but tensors in one file and numbers in JSON."""
    saved = run.optimizer.state_dict()
    tensors = {
        f"{index}.{field}": value
        for index, state in saved["state"].items()
        for field, value in state.items()
    }
    safetensors.torch.save_file(tensors, folder / "optimizer.safetensors")
    (folder / "groups.json").write_text(json.dumps(saved["param_groups"]))
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in safetensors.torch.load_file(folder / "optimizer.safetensors").items():
        index, _, field = name.partition(".")
        states.setdefault(int(index), {})[field] = value
    return {"state": states, "param_groups": json.loads((folder / "groups.json").read_text())}


@pytest.mark.parametrize("through", [by_torch, by_safetensors])
@pytest.mark.parametrize("bits", [8, 32])
def test_resumed_at_step_50_it_has_the_same_bits_at_step_100(
    bits: int, through: Callable[[Run, Path], dict[str, Any]], tmp_path: Path
) -> None:
    whole = Run(bits)
    first_losses = whole.train(range(50))
    saved = through(whole, tmp_path)
    weights = {name: value.clone() for name, value in whole.model.state_dict().items()}
    schedule = whole.schedule.state_dict()
    losses = whole.train(range(50, 100))
    assert losses[-1] < 0.5 * first_losses[0], "it learns"

    # Made as the run was, but for options that the state dict decides.
    resumed = Run(bits)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(saved)
    resumed.schedule.load_state_dict(schedule)
    assert resumed.train(range(50, 100)) == losses
    for param, twin in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(param, twin)
        state, expected = resumed.optimizer.state[twin], whole.optimizer.state[param]
        assert state.keys() == expected.keys()
        for field, value in expected.items():
            assert value.dtype == state[field].dtype
            assert torch.equal(value, state[field]), field
    widths = {state["exp_avg"].dtype for state in whole.optimizer.state.values()}
    assert widths == {torch.uint8, torch.float32}


# --- compiled models ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_a_compiled_model_trains_with_the_optimizer_outside(bits: int) -> None:
    """Ahead-of-time graphs of forward and backward, without a code generator behind them."""
    finals = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 64))
        inputs = torch.randn(32, 64)

        def loss_of(x: Tensor, model: nn.Module = model) -> Tensor:
            return (model(x) - x).square().mean()

        call = torch.compile(loss_of, backend="aot_eager", fullgraph=True) if compiled else loss_of
        optimizer = PagedAdamW(model.parameters(), lr=1e-2, state_bits=8 if bits == 8 else 32)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = call(inputs)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]
        finals.append(losses)
    # The graph sees each step's weights: a stale copy would part from the plain run at once. Its
    # sums may run in another order, and 8-bit codes may then fall to the other side of a tie.
    assert finals[1] == pytest.approx(finals[0], rel=1e-4 if bits == 32 else 1e-2)


# --- steps in the middle of backward --------------------------------------------------------------


def test_an_optimizer_for_each_parameter_steps_within_backward(generator: torch.Generator) -> None:
    """So that only one gradient lives at a time; each frees its own."""
    start = [torch.randn(64, 80, generator=generator) for _ in range(3)]
    runs = []
    for within in (True, False):
        params = [nn.Parameter(values.clone()) for values in start]
        optimizers = [PagedAdamW([param], lr=1e-2) for param in params]

        def finish(param: Tensor, optimizers: Any = optimizers, params: Any = params) -> None:
            (index,) = [i for i, other in enumerate(params) if other is param]
            optimizers[index].step()
            optimizers[index].zero_grad()

        if within:
            for param in params:
                param.register_post_accumulate_grad_hook(finish)
        for _ in range(4):
            torch.stack([param.square().mean() for param in params]).sum().backward()
            for param in () if within else params:
                finish(param)
        assert all(param.grad is None for param in params)
        runs.append(params)
    for param, twin, values in zip(*runs, start, strict=True):
        assert torch.equal(param, twin)
        assert not torch.equal(param, values)


def test_gradients_of_another_dtype_than_their_parameter(generator: torch.Generator) -> None:
    """bfloat16 gradients of a float32 parameter are widened, and lose nothing by it."""
    start = torch.randn(64, 80, generator=generator)
    narrow = torch.randn(64, 80, generator=generator).bfloat16()
    stepped = []
    for grad in (narrow, narrow.float()):
        param = nn.Parameter(start.clone())
        if hasattr(param, "grad_dtype"):  # not in every torch
            param.grad_dtype = None
        elif grad.dtype != param.dtype:
            pytest.skip("this torch has no gradients of another dtype")
        param.grad = grad.clone()
        PagedAdamW([param]).step()
        stepped.append(param)
    assert torch.equal(*stepped)
    assert not torch.equal(stepped[0], start)
