"""Parameters, gradients and comparisons of the tests of `PagedAdamW` on the CPU."""

import io

import torch
from torch import Tensor, nn

from fourbit.optim import PagedAdamW


def parameters(*shapes, dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in shapes]


def set_gradients(params, step: int) -> None:
    """Gradients that depend on the step alone, with magnitudes over six decades."""
    source = torch.Generator().manual_seed(1000 + step)
    for param in params:
        scale = 10 ** (-6 * torch.rand(param.shape, generator=source))
        param.grad = (torch.randn(param.shape, generator=source) * scale).to(param.dtype)


def train(optimizer, params, steps: range, scheduler=None) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.detach(), b.detach())


def assert_same_state(one: PagedAdamW, other: PagedAdamW) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for field, value in state.items():
            assert value.dtype == b["state"][index][field].dtype
            assert torch.equal(value, b["state"][index][field]), (index, field)
