"""Adapters on 3-D weights of experts, against float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fourbit
from fourbit.experts import (
    experts_forward,
    experts_layouts,
    experts_weight,
    quantize_experts,
)
from fourbit.lora import (
    LoraExperts,
    adapter_size,
    add_lora,
    lora_modules,
    merged_experts,
    remove_lora,
)
from lora_models import relative
from moe_experts import BOTH, WEIGHTS, experts_of, quantized_and_dense, shake
from moe_models import logits, moe, tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the formula ----------------------------------------------------------------------------------


def one_module(family: str, *, quantized: bool, names: tuple[str, ...] = WEIGHTS) -> Any:
    """A module of experts with random adapters on some of its weights."""
    model = quantized_and_dense(family)[0 if quantized else 1]
    add_lora(
        model,
        r=3,
        lora_alpha=5,
        lora_dropout=0.0,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in names],
    )
    shake(model, size=0.3)
    return next(iter(lora_modules(model).values()))


def routed(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Seven tokens for a module of four experts, of which one is never chosen."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(7)])
    weights = torch.softmax(random(7, 2, seed=seed), dim=-1)
    return random(7, 64, seed=seed + 1), index, weights


@pytest.mark.parametrize("names", [WEIGHTS, ("down_proj",), ("gate_up_proj",)])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_output_and_gradients_in_float64(family, quantized, names):
    layer = one_module(family, quantized=quantized, names=names)
    base = layer.base_layer
    x, index, weights = routed()
    # transformers' own eager forward, with weights that hold the adapters, in float64.
    truth = moe(family, torch.float64)
    twin = next(iter(experts_of(truth).values()))
    truth.config._experts_implementation = "eager"
    twin.load_state_dict({n: p for n, p in base.state_dict().items() if "bias" in n}, strict=False)
    inputs = [x.double().requires_grad_(), weights.double().requires_grad_()]
    parts: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = {}
    for name in WEIGHTS:
        if name in experts_layouts(base):
            changed[name] = experts_weight(base, name).dequantize(torch.float32).double()
        else:
            changed[name] = getattr(base, name).detach().double()
        if name in names:
            lora = layer.lora(name)
            a = lora.lora_A.detach().double().requires_grad_()
            b = lora.lora_B.detach().double().requires_grad_()
            parts |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
            order = "eor,eri->eio" if family == "GptOss" else "eor,eri->eoi"
            changed[name] = changed[name] + 5 / 3 * torch.einsum(order, b, a)
    expected = torch.func.functional_call(twin, changed, (inputs[0], index, inputs[1]))
    expected_grads = torch.autograd.grad(expected.square().sum(), [*inputs, *parts.values()])

    mine = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    out = layer(mine[0], index, mine[1])
    own = dict(layer.adapters.named_parameters())
    assert list(own) == list(parts)
    grads = torch.autograd.grad(out.square().sum(), [*mine, *own.values()])
    # float32 against float64: sums of at most 96 terms.
    assert relative(out, expected) < 1e-6
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative(grad, wanted) < 1e-5


def test_beside_a_16_bit_base_the_sum_is_rounded_once():
    layer = one_module("Mixtral", quantized=True)
    layer.base_layer.to(torch.bfloat16)
    lora = layer.lora("down_proj")
    assert lora.lora_A.dtype == torch.float32
    counts = torch.tensor([2, 0, 1, 3])
    x = random(6, 96).bfloat16()
    product = random(6, 64, seed=1).bfloat16()
    out = lora(x, product, counts)
    assert out.dtype == torch.bfloat16
    experts = torch.repeat_interleave(torch.arange(4), counts)
    side = torch.einsum("nor,nri,ni->no", lora.lora_B[experts], lora.lora_A[experts], x.float())
    expected = (product.float() + lora.scaling * side).bfloat16()
    # Sums in another order may round to the neighbour.
    assert (out == expected).float().mean() > 0.99
    torch.testing.assert_close(out, expected)


def test_dropout_acts_on_the_adapters_input_in_training_only():
    model = quantized_and_dense("Mixtral")[0]
    plain = logits(model_with_own_forward(model))
    add_lora(model, r=4, lora_dropout=0.5, target_modules=[], target_parameters=BOTH, seed=0)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    shake(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    module = next(iter(lora_modules(model).values())).lora("down_proj")
    counts, product = torch.tensor([100, 100, 100, 100]), torch.zeros(400, 64)
    torch.manual_seed(0)
    mean = torch.stack([module(torch.ones(400, 96), product, counts) for _ in range(50)]).mean(0)
    module.eval()
    # 5,000 draws for each expert: the mean comes within a few percent of what they are draws of.
    expected = module(torch.ones(400, 96), product, counts)
    means = (mean.view(4, 100, 64).mean(1), expected.view(4, 100, 64).mean(1))
    assert relative(*means) < 0.05


def model_with_own_forward(model: Any) -> Any:
    """The model with its quantized experts computed, without any adapter."""
    twin = copy.deepcopy(model)
    for path, module in experts_of(twin).items():
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, LoraExperts(module, {}))
    return twin


def test_a_compiled_training_step_has_no_graph_break():
    layer = one_module("GptOss", quantized=True).train()
    inputs = routed()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    parameters = list(layer.adapters.parameters())
    mine = torch.autograd.grad(compiled(*inputs).sum(), parameters)
    eager = torch.autograd.grad(layer(*inputs).sum(), parameters)
    torch.testing.assert_close(mine, eager)


def test_it_looks_like_the_module_that_it_wraps():
    layer = one_module("Mixtral", quantized=True)
    assert layer.num_experts == 4
    assert layer.gate_up_proj is layer.base_layer.gate_up_proj
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = layer.nothing_such
    inputs = routed()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*inputs), layer(*inputs))
    assert "4 experts, 64 -> 192, r=3, scaling=1.66667" in repr(layer)
    with pytest.raises(ValueError, match="has no weight down_proj of 4 experts with 64 inputs"):
        LoraExperts(layer.base_layer, {"down_proj": layer.lora("gate_up_proj")})


# --- add and remove -------------------------------------------------------------------------------


def test_all_linear_has_the_experts_and_can_do_without():
    model = quantized_and_dense("Qwen3Moe")[0]
    add_lora(model, r=4)
    kinds = [type(layer).__name__ for layer in lora_modules(model).values()]
    # Attention of two blocks, the experts of one and the plain MLP of the other.
    assert (kinds.count("LoraLinear"), kinds.count("LoraExperts")) == (11, 1)
    size = adapter_size(model)
    dense = moe("Qwen3Moe")
    assert size.base_parameters == sum(part.numel() for part in dense.parameters())
    assert size.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts = next(m for m in lora_modules(model).values() if isinstance(m, LoraExperts))
    assert sum(p.numel() for p in experts.parameters() if p.requires_grad) == 4 * 4 * (
        (64 + 64) + (32 + 64)
    )
    base = experts.base_layer
    remove_lora(model)
    assert lora_modules(model) == {}
    assert model.get_submodule("model.layers.0.mlp.experts") is base
    assert not any(part.requires_grad for part in model.parameters())
    for options in ({"target_parameters": ()}, {"target_modules": ["q_proj"]}):
        add_lora(model, **options)
        assert not any(isinstance(m, LoraExperts) for m in lora_modules(model).values())
        remove_lora(model)
    add_lora(model, r=4, modules_to_save=["layers.0.mlp.gate"])
    assert any(isinstance(m, LoraExperts) for m in lora_modules(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.w1"]}, "which this model does not have; its weights of"),
        ({"target_parameters": ["q_proj.weight"]}, "name linear layers in target_modules"),
        ({"use_dora": True}, "use_dora is for linear layers, and target_parameters names"),
        ({"init_lora_weights": "loftq"}, "pass target_parameters=.. to leave experts"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"rank_pattern": {"experts.w1": 2}}, "rank_pattern has 'experts.w1'"),
        ({"target_modules": ["gate_up_proj"]}, "'gate_up_proj'.*target_parameters"),
        ({"target_modules": ["q_proj", "gate_up_proj"]}, "'gate_up_proj'.*target_parameters"),
    ],
)
def test_options_that_make_no_sense(options, message):
    model = moe("Mixtral", torch.float32)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("init", ["default", "gaussian", False])
def test_starts(init):
    """Each expert's matrices start as those of a linear layer of its size."""
    model = moe("Mixtral", torch.float32)
    plain = logits(model)
    add_lora(model, r=64, target_parameters=BOTH, target_modules=[], init_lora_weights=init, seed=3)
    lora = next(iter(lora_modules(model).values())).lora("gate_up_proj")
    for a, b in zip(lora.lora_A, lora.lora_B, strict=True):
        if init == "gaussian":
            assert a.std().item() == pytest.approx(1 / 64, rel=0.05)
        else:
            # Uniform, to ±1/sqrt(inputs).
            assert a.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
            assert a.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
        assert (b.abs().max().item() > 0) == (init is False)
    again = moe("Mixtral", torch.float32)
    add_lora(again, r=64, target_parameters=BOTH, target_modules=[], init_lora_weights=init, seed=3)
    twin = next(iter(lora_modules(again).values())).lora("gate_up_proj")
    assert torch.equal(twin.lora_A, lora.lora_A)
    if init is not False:
        torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)


def test_gradients_under_checkpointing_are_the_same():
    grads = []
    for checkpointing in (False, True):
        model = quantized_and_dense("Mixtral")[0]
        fourbit.prepare_for_training(model, gradient_checkpointing=checkpointing)
        add_lora(model, r=4, lora_dropout=0.0, seed=0)
        shake(model)
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        grads.append([part.grad for part in model.parameters() if part.requires_grad])
    assert len(grads[0]) == 2 * (4 * 2 + 2 * 2)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- merge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_merge_requantizes_and_unmerge_is_exact(family):
    model = quantized_and_dense(family)[0]
    add_lora(model, r=4, rank_pattern={"experts.*": 2})
    shake(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_adapter = logits(model)
    layer = lora_modules(model)["model.layers.1.mlp.experts"]
    wanted = {name: merged_experts(layer, name) for name in WEIGHTS}
    lora = layer.lora("down_proj")
    order = "eor,eri->eio" if family == "GptOss" else "eor,eri->eoi"
    change = lora.scaling * torch.einsum(order, lora.lora_B, lora.lora_A)
    base = experts_weight(layer.base_layer, "down_proj").dequantize(torch.float32)
    torch.testing.assert_close(wanted["down_proj"], base + change)

    report = fourbit.merge(model)
    assert layer.merged
    assert sum(path.endswith(WEIGHTS) for path in report.layers) == 4
    for name in WEIGHTS:
        stored = experts_weight(layer.base_layer, name)
        groups = 1 if family == "GptOss" else 4
        expected = quantize_experts(wanted[name], groups=groups)
        assert all(torch.equal(a, b) for a, b in zip(stored.parts, expected.parts, strict=True))
        entry = report.layers[f"model.layers.1.mlp.experts.{name}"]
        if name == "down_proj":
            found = stored.dequantize(torch.float32) - base
            assert entry.relative_error == pytest.approx(relative(found, change), rel=1e-4)
            assert entry.change == pytest.approx((change.norm() / base.norm()).item(), rel=1e-4)
            assert entry.survived == pytest.approx(
                ((found * change).sum() / change.norm() ** 2).item(), rel=1e-3
            )
        assert torch.equal(merged_experts(layer, name), wanted[name])
    inputs = routed()
    assert torch.equal(layer(*inputs), experts_forward(layer.base_layer, *inputs))
    with pytest.raises(ValueError, match="is merged already"):
        fourbit.merge(model)
    fourbit.unmerge(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), with_adapter)


def test_merge_of_dense_experts_is_the_adapter():
    model = quantized_and_dense("GptOss")[1]
    add_lora(model, r=4, target_modules=[], target_parameters=BOTH)
    shake(model)
    with_adapter, weight = logits(model), model.model.layers[0].mlp.experts.down_proj
    report = fourbit.merge(model)
    # Nothing but the order of float32 sums.
    assert report.mean_relative_error < 1e-5
    assert relative(logits(model), with_adapter) < 1e-5
    fourbit.unmerge(model)
    assert model.model.layers[0].mlp.experts.down_proj is weight


def test_a_broken_adapter_merges_nothing():
    model = quantized_and_dense("Mixtral")[0]
    add_lora(model, r=4)
    shake(model)
    broken = lora_modules(model)["model.layers.1.mlp.experts"].lora("down_proj")
    with torch.no_grad():
        broken.lora_B[2, 0, 0] = torch.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(fourbit.NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        fourbit.merge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_experts_without_any_change_keep_their_bytes():
    model = quantized_and_dense("Mixtral")[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, r=4)
    report = fourbit.merge(model)
    assert report.mean_relative_error == 0
    remove_lora(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
