"""One layer with an adapter, against float64 and against PEFT's layer."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fourbit import Linear4bit, reference
from fourbit.lora import LoraLinear, merged_weight
from lora_models import relative

# Both sides compute in float32 and add in another order.
FLOAT32 = 2e-6


def base_layer(
    kind: str, in_features: int = 48, out_features: int = 40, *, bias: bool = True, **options: Any
) -> nn.Linear:
    torch.manual_seed(0)
    dense = nn.Linear(in_features, out_features, bias=bias, **options)
    return dense if kind == "dense" else Linear4bit.from_linear(dense)


def weight_of(base: nn.Linear) -> Tensor:
    return base.dequantize() if isinstance(base, Linear4bit) else base.weight.detach()


def layer(base: nn.Linear, **options: Any) -> LoraLinear:
    """With an adapter that changes the output."""
    options = {"r": 4, "init_lora_weights": False, **options}
    built = LoraLinear(base, generator=torch.Generator().manual_seed(1), **options)
    if built.lora_magnitude_vector is not None:
        with torch.no_grad():
            built.lora_magnitude_vector.mul_(torch.linspace(0.5, 1.5, base.out_features))
    return built


def expected(built: LoraLinear, x: Tensor) -> Tensor:
    weight = weight_of(built.base_layer)
    a, b, m = built.lora_A.weight, built.lora_B.weight, built.lora_magnitude_vector
    if m is None:
        out = reference.lora(x, weight, a, b, built.scaling)
    else:
        out = x.double() @ reference.dora_weight(weight, a, b, built.scaling, m).T
    return out if built.bias is None else out + built.bias.double()


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_output_is_that_of_the_formula(kind: str, use_dora: bool, bias: bool) -> None:
    built = layer(base_layer(kind, bias=bias), use_dora=use_dora)
    x = torch.randn(3, 5, 48)
    assert relative(built(x), expected(built, x)) < FLOAT32
    assert built(x).shape == (3, 5, 40)


@settings(max_examples=40, deadline=None)
@given(
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    r=st.integers(1, 9),
    lead=st.lists(st.integers(0, 3), max_size=3),
    kind=st.sampled_from(["dense", "4bit"]),
    use_dora=st.booleans(),
)
def test_every_shape(
    in_features: int, out_features: int, r: int, lead: list[int], kind: str, use_dora: bool
) -> None:
    built = layer(base_layer(kind, in_features, out_features), r=r, use_dora=use_dora)
    x = torch.randn(*lead, in_features)
    result = built(x)
    assert result.shape == (*lead, out_features)
    if x.numel():
        # Rows that cancel make the relative error of a single product larger.
        assert relative(result, expected(built, x)) < 1e-5


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    base = base_layer("dense")
    assert LoraLinear(base, r=16, lora_alpha=8).scaling == 0.5
    assert LoraLinear(base, r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


@pytest.mark.parametrize("init", ["default", True, "gaussian"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_starts_without_effect(init: Any, use_dora: bool) -> None:
    base = base_layer("4bit")
    built = LoraLinear(base, r=8, init_lora_weights=init, use_dora=use_dora)
    x = torch.randn(7, 48)
    assert torch.equal(built(x), base(x))
    bound, deviation = 1 / 48**0.5, built.lora_A.weight.std().item()
    # A uniform number has a deviation of 1 / sqrt(3) of its bound; 384 draws: within a fifth.
    wanted = 1 / 8 if init == "gaussian" else bound / 3**0.5
    assert deviation == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_sixteen_bit_base_rounds_the_sum_once(dtype: torch.dtype, use_dora: bool) -> None:
    built = layer(base_layer("dense", dtype=dtype), use_dora=use_dora)
    x = torch.randn(6, 48).to(dtype)
    result = built(x)
    assert result.dtype == dtype
    assert built.lora_A.weight.dtype == torch.float32
    # The base's output and the sum are rounded to dtype: two roundings of half a unit each.
    assert relative(result, expected(built, x)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradients_are_those_of_peft(
    dtype: torch.dtype, use_dora: bool, use_rslora: bool, autocast: bool
) -> None:
    built = layer(base_layer("dense", dtype=dtype), use_dora=use_dora, use_rslora=use_rslora)
    theirs = nn.Sequential(copy.deepcopy(built.base_layer))
    model = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4, lora_alpha=16, use_dora=use_dora, use_rslora=use_rslora, target_modules=["0"]
        ),
    )
    other = model.base_model.model[0]
    parts = [(built.lora_A.weight, other.lora_A.default.weight)]
    parts.append((built.lora_B.weight, other.lora_B.default.weight))
    if built.lora_magnitude_vector is not None:
        parts.append((built.lora_magnitude_vector, other.lora_magnitude_vector.default.weight))
    with torch.no_grad():
        for own, their in parts:
            their.copy_(own)
    x = torch.randn(6, 48).to(dtype)
    results = []
    for module in (built, model):
        operand = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = module(operand)
        result.float().square().sum().backward()
        results.append((result, operand.grad))
    # Under autocast PEFT rounds the norm's B A to bfloat16; we compute norms in float32.
    low = autocast or dtype is torch.bfloat16
    tolerance = 2 * torch.finfo(torch.bfloat16).eps if low else FLOAT32
    (ours, our_grad), (peft_result, peft_grad) = results
    assert ours.dtype == peft_result.dtype
    assert relative(ours, peft_result) < tolerance
    assert relative(our_grad, peft_grad) < tolerance
    for own, their in parts:
        assert relative(own.grad, their.grad) < tolerance


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_acts_on_the_adapter_in_training_only(kind: str, use_dora: bool) -> None:
    built = layer(base_layer(kind), use_dora=use_dora, lora_dropout=0.5).eval()
    x = torch.randn(9, 48)
    assert relative(built(x), expected(built, x)) < FLOAT32
    built.train()
    torch.manual_seed(3)
    result = built(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5).double()
    weight = weight_of(built.base_layer)
    a, b, m = (
        None if p is None else p.detach().double()
        for p in (built.lora_A.weight, built.lora_B.weight, built.lora_magnitude_vector)
    )
    assert a is not None
    assert b is not None
    side = built.scaling * dropped @ a.T @ b.T
    wanted = reference.linear(x, weight, built.bias)
    if m is None:
        wanted = wanted + side
    else:
        norm = (weight.double() + built.scaling * b @ a).norm(dim=1)
        wanted = wanted + (m / norm - 1) * (dropped @ weight.double().T) + m / norm * side
    assert relative(result, wanted) < FLOAT32


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_are_those_of_float64(use_dora: bool) -> None:
    built = layer(base_layer("4bit"), use_dora=use_dora)
    weight = weight_of(built.base_layer).double()
    named = {n: p for n, p in built.named_parameters() if not n.startswith("base_layer")}
    a, b = (named[f"lora_{n}.weight"].detach().double().requires_grad_() for n in "AB")
    x = torch.randn(6, 48)
    x64 = x.double().requires_grad_()
    bias = built.bias
    assert bias is not None
    out = x64 @ weight.T + built.scaling * x64 @ a.T @ b.T
    wanted = {"lora_A.weight": a, "lora_B.weight": b}
    if use_dora:
        m = named["lora_magnitude_vector"].detach().double().requires_grad_()
        wanted["lora_magnitude_vector"] = m
        norm = (weight + built.scaling * b @ a).norm(dim=1).detach()
        out = m / norm * out
    (out + bias.double()).sin().sum().backward()
    x.requires_grad_()
    built(x).sin().sum().backward()
    assert x.grad is not None
    assert relative(x.grad, x64.grad) < 1e-5
    assert set(named) == set(wanted)
    for name, parameter in named.items():
        assert relative(parameter.grad, wanted[name].grad) < 1e-5
    assert built.base_layer.weight.grad is None


def test_state_dict_keys_are_plain() -> None:
    built = LoraLinear(base_layer("4bit"), r=4, use_dora=True, lora_dropout=0.1)
    assert set(built.state_dict()) == {
        "base_layer.weight",
        "base_layer.weight_absmax",
        "base_layer.weight_nested_absmax",
        "base_layer.weight_nested_offset",
        "base_layer.bias",
        "lora_A.weight",
        "lora_B.weight",
        "lora_magnitude_vector",
    }


@pytest.mark.parametrize("use_dora", [False, True])
def test_deepcopy_is_independent(use_dora: bool) -> None:
    built = layer(base_layer("4bit"), use_dora=use_dora)
    twin = copy.deepcopy(built)
    x = torch.randn(2, 48)
    before = built(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.lora_B.weight.zero_()
    assert torch.equal(built(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(use_dora: bool, training: bool) -> None:
    torch._dynamo.reset()
    built = layer(base_layer("4bit"), use_dora=use_dora).train(training)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 48, requires_grad=True)
    result = compiled(x)
    assert relative(result, built(x)) < FLOAT32
    result.sum().backward()
    assert built.lora_A.weight.grad is not None


def test_norms_are_kept_only_while_they_hold() -> None:
    built = layer(base_layer("4bit"), use_dora=True).eval()
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert built.weight_norm() is built.weight_norm()
        built(x)
        built.lora_B.weight.mul_(3)
        assert relative(built(x), expected(built, x)) < FLOAT32
        built.lora_A.weight.data = built.lora_A.weight.data * 2
        assert relative(built(x), expected(built, x)) < FLOAT32
        other = Linear4bit.from_linear(nn.Linear(48, 40))
        built.base_layer.load_state_dict(other.state_dict())
        assert relative(built(x), expected(built, x)) < FLOAT32
        built.lora_B.weight.data.mul_(2)
        built.eval()
        assert relative(built(x), expected(built, x)) < FLOAT32
    assert built.weight_norm() is not built.weight_norm()
    with torch.inference_mode():
        built(x)
    built(x).sum().backward()
    assert built.lora_magnitude_vector is not None
    assert built.lora_magnitude_vector.grad is not None


def test_a_row_of_zeros_stays_one() -> None:
    base = nn.Linear(8, 3)
    with torch.no_grad():
        base.weight[1] = 0
    built = LoraLinear(base, r=2, use_dora=True)
    x = torch.randn(5, 8)
    assert torch.equal(built(x), base(x))
    assert merged_weight(built)[1].eq(0).all()


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weight_is_that_of_the_formula(kind: str, use_dora: bool) -> None:
    built = layer(base_layer(kind), use_dora=use_dora, use_rslora=True)
    weight, a, b = weight_of(built.base_layer), built.lora_A.weight, built.lora_B.weight
    m = built.lora_magnitude_vector
    wanted = weight.double() + built.scaling * b.double() @ a.double()
    if m is not None:
        wanted = reference.dora_weight(weight, a, b, built.scaling, m)
    found = merged_weight(built)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert relative(found, wanted) < FLOAT32
    assert torch.equal(weight_of(built.base_layer), weight)


def test_meta_device() -> None:
    with torch.device("meta"):
        base = Linear4bit(48, 40)
    built = LoraLinear(base, r=4, use_dora=True)
    assert all(part.is_meta for part in built.parameters())
    assert built(torch.empty(2, 48, device="meta")).shape == (2, 40)


def test_bad_options() -> None:
    base = base_layer("dense")
    with pytest.raises(ValueError, match="r is 0"):
        LoraLinear(base, r=0)
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'"):
        LoraLinear(base, r=1, init_lora_weights="pissa")  # type: ignore[arg-type]


def test_a_foreign_format_is_refused() -> None:
    base = nn.Linear(8, 8)
    base.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="uint8"):
        merged_weight(LoraLinear(base, r=2))
