"""PEFT's methods other than LoRA on `Linear4bit`, against PEFT on the same weights, dense."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from fourbit import Linear4bit, NonFiniteError
from fourbit.integrations.peft.backend import FourbitBackend
from fourbit.lora.loftq import requantize
from lora_models import llama, logits, quantize_linears, relative

# Both compute in float32; sums are in another order.
CLOSE = 1e-5
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
METHODS = [
    peft.BOFTConfig(boft_block_size=4, init_weights=False, **TARGETS),
    peft.OFTConfig(oft_block_size=4, init_weights=False, **TARGETS),
    peft.MissConfig(r=2, init_weights=False, **TARGETS),
    peft.ShiraConfig(r=4, random_seed=0, init_weights=False, **TARGETS),
    peft.VeraConfig(r=4, init_weights=False, **TARGETS),
]
LAYERS = 4  # q_proj and v_proj of two blocks


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A quantized model, and one with the same weights in float32."""
    quantized, dense = llama(), llama()
    quantize_linears(quantized)
    for path, layer in quantized.named_modules():
        if isinstance(layer, Linear4bit):
            dense.get_submodule(path).weight.data = layer.dequantize(torch.float32)
    return quantized, dense


def adapted(model: Any, config: peft.PeftConfig) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()


def bases(model: Any) -> dict[str, Any]:
    return {
        path: layer.get_base_layer()
        for path, layer in model.named_modules()
        if isinstance(getattr(layer, "quantization_backend", None), FourbitBackend)
    }


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.peft_type.value)
def test_outputs_gradients_and_merges_are_pefts(models: Any, config: peft.PeftConfig) -> None:
    ours, theirs = (adapted(model, config) for model in models)
    before = {path: base.quantized() for path, base in bases(ours).items()}
    assert len(before) == LAYERS
    assert relative(logits(ours), logits(models[0])) > 1e-3  # the adapter does something
    assert relative(logits(ours), logits(theirs)) < CLOSE

    grown = [_gradients(model) for model in (ours, theirs)]
    assert grown[0].norm() > 0
    assert relative(*grown) < CLOSE

    merged = {}
    for model in (ours, theirs):
        model.merge_adapter()
    for path, base in bases(ours).items():
        # PEFT merges in float32 here too; then each weight is quantized as it was.
        dense = theirs.get_submodule(path).get_base_layer().weight.data
        expected = requantize(dense, before[path]).dequantize(torch.float32)
        # Rounding to 4 bits may fall on the other side where sums differ in their last bit.
        assert (base.dequantize(torch.float32) != expected).float().mean() < 0.01
        merged[path] = expected.norm()
    ours.unmerge_adapter()
    # As exact as 4 bits are: two roundings, each of about 9% of the norm of what is merged.
    for path, base in bases(ours).items():
        assert (base.dequantize() - before[path].dequantize()).norm() < 0.2 * merged[path]


def _gradients(model: Any) -> Tensor:
    model(input_ids=torch.arange(10)[None]).logits.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_merge_that_is_not_finite_leaves_the_layer(models: Any) -> None:
    model = adapted(models[0], METHODS[-1])
    layer = next(m for m in model.modules() if getattr(m, "quantization_backend", None))
    before = layer.get_base_layer().weight.data.clone()
    with torch.no_grad():
        layer.vera_lambda_b["default"].fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        layer.merge()
    assert torch.equal(layer.get_base_layer().weight.data, before)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_start_in_the_dtype_of_the_weight(autocast: bool) -> None:
    model = llama(torch.bfloat16)
    quantize_linears(model)
    model = peft.get_peft_model(model, METHODS[-1], autocast_adapter_dtype=autocast)
    found = {p.dtype for name, p in model.named_parameters() if "vera_lambda" in name}
    assert found == {torch.float32 if autocast else torch.bfloat16}


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
        peft.RoadConfig(group_size=4, **TARGETS),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_methods_that_would_merge_into_bytes_are_refused(
    models: Any, config: peft.PeftConfig
) -> None:
    model = adapted(models[0], config)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"_proj is in 4 bits, .* cannot be merged"):
            merge()
    assert torch.equal(logits(model), before)
    model.unload()


@pytest.mark.parametrize("method", ["Hira", "LoHa", "LoKr", "UniLora"])
def test_methods_that_would_compute_with_bytes_are_refused(models: Any, method: str) -> None:
    config = getattr(peft, f"{method}Config")(**TARGETS)
    with pytest.raises(ValueError, match=rf"PEFT's {method.lower()} computes with the weight"):
        adapted(models[0], config)
    peft.get_peft_model(copy.deepcopy(models[1]), config)  # a dense layer has numbers
