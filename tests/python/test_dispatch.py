"""A layer's call goes past torch's dispatcher, unless something there has a say."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, profiler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit import Linear4bit, cpu_ops, dispatch, ops, reference


class Seen(TorchDispatchMode):
    """The names of the operators that the dispatcher calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """The same for functions."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A subclass that notes what is called with it."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture(name="layer")
def make_layer():
    torch.manual_seed(0)
    return Linear4bit.from_linear(nn.Linear(128, 48))


@pytest.fixture(name="calls")
def count_calls(monkeypatch):
    """How often the way past the dispatcher is taken."""
    calls = []

    def linear(*arguments):
        calls.append(arguments[0])
        return direct(*arguments)

    direct = cpu_ops.linear
    monkeypatch.setattr(ops.cpu_ops, "linear", linear)
    return calls


def expected(layer, x):
    return reference.linear(x.double(), layer.dequantize().double(), layer.bias.double())


def is_right(layer, x, found):
    return torch.allclose(found.detach().double(), expected(layer, x.detach()), atol=1e-5)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_a_plain_call_goes_past_the_dispatcher(layer, calls, mode):
    x = torch.randn(3, 128)
    with mode():
        for operand in (x, torch.randn(3, 128), nn.Parameter(x)):
            assert is_right(layer, operand, layer(operand))
    assert len(calls) == 3
    layer.bias.requires_grad_(requires_grad=False)
    assert is_right(layer, x, layer(x))
    assert len(calls) == 4


def test_what_looks_on_is_shown_the_operator(layer, calls):
    x = torch.randn(3, 128)
    with torch.no_grad():
        with Seen() as seen:
            layer(x)
        assert "fourbit.linear.default" in seen.names
        with Functions() as functions:
            layer(x)
        assert any("linear" in name for name in functions.names)
        Marked.names.clear()
        layer(x.as_subclass(Marked))
        assert any("linear" in name for name in Marked.names)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            layer(x)
        assert any(event.key == "fourbit::linear" for event in recorded.key_averages())
        with forward_ad.dual_level():
            layer(x)
    assert calls == []


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracers_find_the_operator(layer, calls, pre_dispatch):
    x = torch.randn(3, 128)
    with torch.no_grad():
        graph = make_fx(layer, pre_dispatch=pre_dispatch)(x)
    assert "fourbit.linear" in graph.code
    assert calls == []
    assert is_right(layer, x, graph(x))
    exported = torch.export.export(copy.deepcopy(layer).requires_grad_(requires_grad=False), (x,))
    assert "fourbit.linear" in exported.graph_module.code


def test_views_with_a_sign_are_not_taken_for_what_lies_in_memory(layer, calls):
    x = torch.complex(torch.randn(3, 128), torch.randn(3, 128)).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        assert is_right(layer, x.resolve_neg(), layer(x))
    assert calls == []


def test_tensors_on_other_devices_are_told_by_the_operator(layer):
    with torch.no_grad(), pytest.raises(RuntimeError, match="load the layer's weight"):
        Linear4bit(128, 48, device="meta")(torch.randn(1, 128))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (dispatch, "_keys_of_tensor"),
        (dispatch, "_keys_of_thread"),
        (dispatch, "_has_function_mode"),
        (profiler, "_is_profiler_enabled"),
        (forward_ad, "_current_level"),
    ],
)
def test_a_torch_that_does_not_tell_has_its_way(layer, calls, monkeypatch, where, name):
    with monkeypatch.context() as patch:
        if where is dispatch:
            patch.setattr(dispatch, name, dispatch._missing)
        else:
            patch.delattr(where, name)
        threads, tensors = dispatch._plain_keys()
        assert threads == tensors == frozenset()
        patch.setattr(dispatch, "_plain_threads", threads)
        x = torch.randn(1, 128)
        assert not dispatch.only_cpu(x, layer.weight)
    monkeypatch.setattr(dispatch, "_plain_threads", threads)
    with torch.no_grad():
        assert is_right(layer, x, layer(x))
    assert calls == []
