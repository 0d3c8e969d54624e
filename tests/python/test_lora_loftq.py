"""LoftQ: adapters that make up for the rounding of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import safetensors.torch
import torch
from peft.utils import loftq_utils
from torch import Tensor, nn

from fourbit import CheckpointError, Linear4bit, NonFiniteError
from fourbit.lora import add_lora, lora_modules, merged_weight, save_adapter
from fourbit.lora.layer import base_weight
from fourbit.lora.loftq import loftq
from lora_models import llama, logits, quantize_linears, relative


def rounding_error(weight: Tensor, r: int, **options: Any) -> float:
    start = loftq(weight, r=r, scaling=0.25, **options)
    return relative(start.quantized.dequantize(torch.float32) + 0.25 * start.b @ start.a, weight)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (70, 33)])
def test_error_is_that_of_the_best_approximation(shape: tuple[int, int]) -> None:
    """Against the singular values themselves, in float64 (Eckart and Young)."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    plain = Linear4bit.from_linear(_linear(weight)).dequantize()
    singular = torch.linalg.svdvals((weight - plain).double())
    for r in (1, 8, 30, 40):
        best = singular[r:].norm() / weight.double().norm()
        # The subspace iteration may lose 0.1% of the error; where r is large the SVD is exact.
        assert rounding_error(weight, r) == pytest.approx(best.item(), rel=1e-3, abs=1e-6)


def test_more_rounds_are_not_worse() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 96)
    errors = [rounding_error(weight, 16, iterations=count) for count in (1, 2, 5)]
    plain = relative(Linear4bit.from_linear(_linear(weight)).dequantize(), weight)
    assert errors[0] < plain
    assert errors[1] < errors[0]
    assert errors[2] <= errors[1]


def test_gains_what_peft_gains() -> None:
    """PEFT's ``loftq_init`` needs a GPU; these are its steps: bitsandbytes' NF4, PEFT's SVD."""
    torch.manual_seed(0)
    weight = torch.randn(128, 192)
    residual = weight
    errors = []
    for _ in range(3):
        packed, state = bitsandbytes.functional.quantize_4bit(residual, quant_type="nf4")
        dense = bitsandbytes.functional.dequantize_4bit(packed, state)
        parts = loftq_utils._low_rank_decomposition(weight - dense, reduced_rank=16)
        correction = parts["L"] @ parts["R"]
        errors.append(relative(dense + correction, weight))
        residual = weight - correction
    base = Linear4bit.from_linear(_linear(weight), double_quant=False)
    # One round has one answer; our subspace iteration may lose 0.1% of it.
    assert rounding_error(weight, 16, base=base) == pytest.approx(errors[0], rel=1e-3)
    # Later rounds amplify the last bits of the first: alike, not equal.
    assert rounding_error(weight, 16, base=base, iterations=3) < 1.01 * min(errors)


def test_same_start_each_time_and_no_trace_in_the_generator() -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    state = torch.random.get_rng_state()
    one, two = (loftq(weight, r=4, scaling=1.0) for _ in range(2))
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)
    assert torch.equal(state, torch.random.get_rng_state())


def folder(tmp_path: Path, model: nn.Module, *, sharded: bool) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    target = tmp_path / "llama"
    target.mkdir()
    if not sharded:
        safetensors.torch.save_file(tensors, target / "model.safetensors")
        return target
    names, index = sorted(tensors), {}
    for number, half in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in half}, target / file)
        index.update(dict.fromkeys(half, file))
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return target


@pytest.mark.parametrize("source", ["mapping", "file", "folder", "sharded"])
def test_quantized_base_with_its_weights(tmp_path: Path, source: str) -> None:
    model = llama(torch.bfloat16)
    wanted, state = logits(model), model.state_dict()
    weights: Any = state
    if source != "mapping":
        weights = folder(tmp_path, model, sharded=source == "sharded")
        weights = weights / "model.safetensors" if source == "file" else str(weights)
    quantize_linears(model)
    packed = {name: part.clone() for name, part in model.state_dict().items()}
    plain = relative(logits(model), wanted)
    add_lora(model, r=16, init_lora_weights="loftq", loftq_weights=weights)
    assert relative(logits(model), wanted) < plain
    for path, layer in lora_modules(model).items():
        dense = state[f"{path}.weight"]
        before = relative(base_weight(layer.base_layer), dense)
        assert relative(merged_weight(layer), dense) < 0.8 * before
        # One round leaves the base as it is: the adapter fits every copy of it.
        assert torch.equal(layer.base_layer.weight, packed[f"{path}.weight"])


@pytest.mark.parametrize("use_dora", [False, True])
def test_dense_base_becomes_four_bits(use_dora: bool) -> None:
    model = llama(torch.bfloat16)
    state = {name: part.clone() for name, part in model.state_dict().items()}
    add_lora(model, r=16, init_lora_weights="loftq", loftq_iterations=3, use_dora=use_dora)
    for path, layer in lora_modules(model).items():
        base, dense = layer.base_layer, state[f"{path}.weight"]
        assert isinstance(base, Linear4bit)
        assert base.weight_dtype == torch.bfloat16
        plain = Linear4bit.from_linear(_linear(dense)).dequantize(torch.float32)
        assert relative(merged_weight(layer), dense) < 0.8 * relative(plain, dense)
        if f"{path}.bias" in state:
            assert torch.equal(base.bias, state[f"{path}.bias"])


def test_keeps_the_format_of_the_base() -> None:
    model = llama()
    weights = model.state_dict()
    quantize_linears(model, codebook="fp4", block_size=32, double_quant=False)
    add_lora(model, r=8, init_lora_weights="loftq", loftq_weights=weights, loftq_iterations=2)
    for layer in lora_modules(model).values():
        base = layer.base_layer
        assert isinstance(base, Linear4bit)
        assert (base.codebook.name, base.block_size, base.double_quant) == ("fp4", 32, False)


def test_files_do_not_ask_for_loftq_again(tmp_path: Path) -> None:
    """PEFT would run its own LoftQ over the base if the config said so."""
    model = add_lora(llama(), r=8, init_lora_weights="loftq")
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_bad_sources(tmp_path: Path) -> None:
    model = llama()
    state = model.state_dict()
    quantize_linears(model)
    keys, path = list(model.state_dict()), "model.layers.0.self_attn.q_proj"

    def refused(source: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            add_lora(model, r=4, init_lora_weights="loftq", loftq_weights=source)
        assert list(model.state_dict()) == keys

    refused(tmp_path, FileNotFoundError, r"no model\.safetensors")
    refused({}, CheckpointError, f"no tensor {path}.weight")
    refused(model.state_dict(), CheckpointError, "uint8; LoftQ needs the weights before")
    refused(
        {**state, f"{path}.weight": torch.zeros(2, 2)},
        CheckpointError,
        f"{path}.*another|"
        r"\(2, 2\)",
    )
    other = llama(seed=5).state_dict()
    refused(other, CheckpointError, "not what the model's layer was quantized from")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    refused(tmp_path, CheckpointError, r"model\.safetensors cannot be read")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    refused(tmp_path, CheckpointError, "not an index")
    index.write_text(json.dumps({"weight_map": {f"{path}.weight": "../x.safetensors"}}))
    refused(tmp_path, CheckpointError, "outside the folder")
    index.write_text(json.dumps({"weight_map": {f"{path}.weight": "model.safetensors"}}))
    refused(tmp_path, CheckpointError, "cannot be read")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(tmp_path, CheckpointError, f"no tensor {path}.weight")


def test_nan_in_a_dense_weight() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        add_lora(model, r=4, init_lora_weights="loftq")
    assert not lora_modules(model)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer
