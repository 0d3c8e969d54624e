"""`PagedAdamW` and what it refuses: options, parameters, state dicts."""

import copy
import warnings

import pytest
import torch
from torch import nn

from adamw_steps import (
    assert_same_state,
    parameters,
    set_gradients,
    train,
)
from fourbit.optim import PagedAdamW


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.nan}, "lr is nan"),
        ({"lr": "1e-3"}, "lr is '1e-3'; it must be a number"),
        ({"lr": torch.ones(2)}, "lr is a tensor of 2 elements"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": -0.1}, "weight_decay is"),
        ({"betas": (1.0, 0.9)}, "betas are"),
        ({"betas": (0.9, -0.1)}, "betas are"),
        ({"betas": (0.9,)}, "betas are"),
        ({"state_bits": 16}, "state_bits is 16"),
        ({"pager": "disk"}, "unknown pager 'disk'"),
        ({"pager": "unified"}, 'on a GPU, and these are on cpu; use "auto" or "resident"'),
        ({"pager": "pinned"}, 'on a GPU, and these are on cpu; use "auto" or "resident"'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(parameters((4, 4)), **options)
    if "pager" not in options:
        with pytest.raises(ValueError, match=message):
            PagedAdamW([{"params": parameters((4, 4)), **options}])


def test_bad_parameters():
    (param,) = parameters((4, 4))
    with pytest.raises(TypeError, match=r"parameter 0 is torch\.float64"):
        PagedAdamW([param.double().detach()])
    with pytest.raises(ValueError, match="empty parameter list"):
        PagedAdamW([])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the same
        with pytest.raises(ValueError, match="stands twice"):
            PagedAdamW([param, param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        PagedAdamW([{"params": [param]}, {"params": [param]}])


def test_a_width_that_changes_after_the_first_step():
    params = parameters((64, 64), (3,))
    optimizer = PagedAdamW(params, state_bits=8)
    train(optimizer, params, range(1))
    optimizer.param_groups[0]["state_bits"] = 32
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="parameter 0 has 8-bit state and its group"):
        optimizer.step()
    assert torch.equal(params[0], before)
    optimizer.param_groups[0]["state_bits"] = 8
    optimizer.step()


def test_parameters_that_share_memory():
    backing = torch.zeros(10)
    params = [nn.Parameter(backing[:6]), nn.Parameter(backing[5:])]
    optimizer = PagedAdamW(params)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="parameter 1 shares memory"):
        optimizer.step()
    param = nn.Parameter(backing[:6])
    param.grad = param.detach()
    with pytest.raises(ValueError, match="parameter 0 shares memory"):
        PagedAdamW([param]).step()
    # Of other groups, and of other widths of state: nothing is stepped before it is found.
    backing = torch.zeros(9000)
    first, second, third = nn.Parameter(backing[:10]), nn.Parameter(backing[9:5000]), backing[4999:]
    for groups in ([first, second], [{"params": [second]}, {"params": [nn.Parameter(third)]}]):
        optimizer = PagedAdamW(groups)
        set_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
        with pytest.raises(ValueError, match=r"parameter 1 shares memory"):
            optimizer.step()
    assert not backing.any()
    one, other = parameters((3,), (3,))
    one.grad = other.grad = torch.ones(3)
    PagedAdamW([one, other]).step()


def test_parameters_on_another_device():
    (param,) = parameters((4, 4))
    optimizer = PagedAdamW([param.detach().to("meta")])
    (meta,) = optimizer.param_groups[0]["params"]
    meta.grad = torch.ones_like(meta)
    with pytest.raises(ValueError, match=r"parameter 0 is on meta.*torch\.optim\.AdamW"):
        optimizer.step()


def test_sparse_gradients_are_refused_before_anything_is_written():
    dense = parameters((64, 64))[0]
    embedding = nn.Embedding(5, 4, sparse=True)
    optimizer = PagedAdamW([dense, *embedding.parameters()])
    set_gradients([dense], 0)
    before = dense.detach().clone()
    embedding(torch.tensor([1, 1])).sum().backward()
    with pytest.raises(RuntimeError, match="parameter 1 has a sparse gradient"):
        optimizer.step()
    assert torch.equal(dense, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda param: param.data.bfloat16(),
        lambda param: param.data[:32],
    ],
)
def test_parameters_that_change_after_the_first_step(change):
    (param,) = parameters((64, 64))
    optimizer = PagedAdamW([param])
    train(optimizer, [param], range(1))
    param.grad = None
    param.data = change(param)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"parameter 0 was torch\.float32 \[64, 64\]"):
        optimizer.step()


def _elsewhere(state, field):
    state[field].data = state[field].clone()


def _other_strides(state, field):
    state[field].data = state[field].clone().repeat_interleave(2, -1)[..., ::2]


def _replaced(state, field):
    state[field] = state[field].clone()


@pytest.mark.parametrize("change", [_elsewhere, _other_strides, _replaced])
@pytest.mark.parametrize(
    ("state_bits", "field"),
    [(8, "exp_avg"), (8, "exp_avg_absmax"), (8, "exp_avg_sq_absmax"), (32, "exp_avg_sq")],
)
def test_state_that_was_put_elsewhere_between_steps(state_bits, field, change):
    ours, theirs = parameters((64, 64)), parameters((64, 64))
    one, other = (PagedAdamW(params, state_bits=state_bits) for params in (ours, theirs))
    for number in range(6):
        train(one, ours, range(number, number + 1))
        train(other, theirs, range(number, number + 1))
        # A step that has been seen, and one that has not.
        if number in (2, 3):
            change(one.state[ours[0]], field)
    assert torch.equal(ours[0], theirs[0])
    assert_same_state(one, other)


def test_a_step_count_of_another_type():
    (param,) = parameters((64, 64))
    optimizer = PagedAdamW([param])
    train(optimizer, [param], range(3))
    optimizer.state[param]["step"] = torch.tensor(3)
    train(optimizer, [param], range(1))
    step = optimizer.state[param]["step"]
    assert step.dtype == torch.float32
    assert step == 4


def test_parameters_that_moved_after_the_first_step():
    """That the first step was elsewhere is made up: there is no other device here."""
    (param,) = parameters((64, 64))
    optimizer = PagedAdamW([param])
    train(optimizer, [param], range(1))
    optimizer._homes[param] = (param.dtype, torch.device("cuda", 0))
    optimizer._seen.clear()
    before = param.detach().clone()
    with pytest.raises(ValueError, match="parameter 0 was on cuda:0 at its first step and is on"):
        optimizer.step()
    assert torch.equal(param, before)
    # What the message says to do.
    resumed = PagedAdamW([param])
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()
    assert resumed.state[param]["step"] == 2
    # It may also be given to this one, which then takes the state to be where the parameter is.
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


def test_a_parameter_whose_state_was_taken_away_begins_anew():
    (param,) = parameters((64, 64))
    optimizer = PagedAdamW([param])
    train(optimizer, [param], range(2))
    optimizer.state.clear()
    param.grad = None
    param.data = param.data.bfloat16()
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["step"] == 2
    param.grad = None
    param.data = param.data.float()
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"parameter 0 was torch\.bfloat16"):
        optimizer.step()
    optimizer.state.clear()
    param.grad = None
    param.data = param.data.double()
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=r"parameter 0 is torch\.float64"):
        optimizer.step()


def damaged(change):
    """A change to the 8-bit state of parameter 0, as a function of the state dict."""

    def apply(state_dict):
        change(state_dict["state"][0])

    return apply


def assign(field, value):
    return damaged(lambda state: state.update({field: value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged(lambda s: s.pop("exp_avg_sq")), "parameter 0 lacks exp_avg_sq"),
        (damaged(lambda s: s.pop("step")), "parameter 0 lacks step"),
        (damaged(lambda s: s.pop("exp_avg_absmax")), "parameter 0 lacks exp_avg_absmax"),
        (assign("max_exp_avg_sq", torch.zeros(1)), "unknown field 'max_exp_avg_sq'"),
        (assign("exp_avg", None), "exp_avg of parameter 0 is a NoneType"),
        (assign("exp_avg", torch.zeros(64, 63, dtype=torch.uint8)), r"shape \[64, 63\]"),
        (assign("exp_avg", torch.zeros(64, 64)), "exp_avg of parameter 0 is torch.float32"),
        (assign("exp_avg_absmax", torch.zeros(17)), r"exp_avg_absmax of parameter 0 has shape"),
        (assign("exp_avg_absmax", torch.zeros(16).half()), "exp_avg_absmax of parameter 0 is"),
        (assign("exp_avg_absmax", torch.full((16,), torch.nan)), "holds NaN or infinity"),
        (assign("exp_avg_sq_absmax", torch.full((16,), -1.0)), "is negative"),
        (assign("step", torch.tensor(1.5)), "step of parameter 0 is 1.5"),
        (assign("step", torch.tensor(1e20)), "step of parameter 0 is 1.*, not a count"),
        (assign("step", torch.tensor(-1.0)), "step of parameter 0 is negative"),
        (assign("step", torch.zeros(2)), "step of parameter 0 has shape"),
        (lambda d: d["state"].update({0: [1, 2]}), "state of parameter 0 is a list"),
        (lambda d: d["state"].update({5: {}}), "state of parameter 5, which"),
        (lambda d: d["param_groups"][0].update(state_bits=32), "parameter 0 is 8-bit where 32"),
        (lambda d: d["param_groups"][0].update(betas=(2, 0)), "betas are"),
        (lambda d: d["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda d: d["param_groups"][0].update(decoupled_weight_decay=False), "decay is Adam's"),
        (lambda d: d["param_groups"][0]["params"].pop(), "other parameter groups"),
        (lambda d: d["param_groups"][0].update(param_names=["a"]), "name each parameter once"),
        (lambda d: d["param_groups"][0].update(param_names=None), "name each parameter once"),
        (lambda d: d["param_groups"].pop(), "other parameter groups"),
        (lambda d: d["param_groups"][0].update(params=[0, 0]), "names a parameter twice"),
        (lambda d: d["param_groups"][0].pop("params"), "a parameter group without params"),
        (lambda d: d.pop("state"), "lacks state or param_groups"),
        (lambda d: d.pop("param_groups"), "lacks state or param_groups"),
    ],
)
def test_damaged_state_dicts(damage, message):
    params = parameters((64, 64), (9,))
    optimizer = PagedAdamW(params)
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    state_dict = copy.deepcopy(before)
    damage(state_dict)
    twin = PagedAdamW(params)
    twin.load_state_dict(before)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same_state(optimizer, twin)


def test_a_state_dict_of_other_shapes():
    params, others = parameters((64, 64), (9,)), parameters((64, 64), (10,))
    one, other = PagedAdamW(params), PagedAdamW(others)
    train(one, params, range(1))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 has shape \[9\] where \[10\]"):
        other.load_state_dict(one.state_dict())
