"""PEFT's `target_parameters` on 4-bit experts, against PEFT on the dense model in float32."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.experts import experts_weight, quantize_experts
from fourbit.integrations.peft.experts import ParamWrapper
from lora_models import relative
from moe_experts import BOTH, WEIGHTS, experts_of, quantized_and_dense, shake
from moe_models import logits, tokens

FAMILIES = ("Mixtral", "Qwen3Moe", "GptOss")


def adapted(model: Any, names: list[str] = BOTH, **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **options}
    made = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_parameters=names, **settings)
    )
    shake(made)
    return made


def wrappers(model: Any) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def base_bytes(model: Any) -> list[Tensor]:
    return [
        part.clone()
        for module in experts_of(model).values()
        for name in WEIGHTS
        for part in experts_weight(module, name).parts
    ]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("Mixtral", {"names": ["experts.down_proj"], "use_rslora": True}),
        ("Mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "names": None}),
        ("GptOss", {"names": ["gate_up_proj"], "init_lora_weights": "gaussian"}),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_pefts(family: str, options: dict[str, Any]) -> None:
    quantized, dense = quantized_and_dense(family)
    found, expected = adapted(quantized, **options), adapted(dense, **options)
    assert wrappers(found)
    assert not wrappers(expected)
    assert relative(logits(found), logits(expected)) < 1e-5
    mine, theirs = gradients(found), gradients(expected)
    assert list(mine) == list(theirs)
    for name in mine:
        assert relative(mine[name], theirs[name]) < 1e-4, name
    # Numbers, not bytes: those of the packed linear layers and experts, one by one.
    assert found.get_nb_trainable_parameters() == expected.get_nb_trainable_parameters()


def test_files_go_to_peft_on_the_dense_model_and_to_load_adapter(tmp_path: Any) -> None:
    quantized, dense = quantized_and_dense("Mixtral")
    model = adapted(quantized)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert relative(logits(peft.PeftModel.from_pretrained(dense, tmp_path)), expected) < 1e-5
    again = peft.PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path)
    assert len(wrappers(again)) == 4
    assert torch.equal(logits(again), expected)
    fourbit.load_adapter(quantized, tmp_path)
    assert relative(logits(quantized), expected) < 1e-6
    again.save_pretrained(tmp_path / "again")
    first, second = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again")
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_merge_requantizes_once_and_unmerge_is_exact(family: str) -> None:
    model = adapted(quantized_and_dense(family)[0], target_modules=[])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    shake(model, seed=7)
    before = base_bytes(model)
    layer = next(w for w in wrappers(model) if w.parameter_name == "down_proj")
    weight = experts_weight(layer.get_base_layer(), "down_proj").dequantize(torch.float32)
    for name in ("default", "second"):
        # PEFT's own arithmetic.
        weight = weight + layer.get_delta_weight(name)
    with pytest.warns(UserWarning, match="export_merged"):
        model.merge_adapter(["default"])
    with warnings.catch_warnings(record=True):
        model.merge_adapter(["second"])
    stored = experts_weight(layer.get_base_layer(), "down_proj")
    expected = quantize_experts(weight, groups=stored.layout.groups)
    # The sums are made in another order: a number in a thousand may round to its neighbour.
    assert (stored.packed != expected.packed).float().mean() < 1e-3
    assert relative(stored.dequantize(torch.float32), expected.dequantize(torch.float32)) < 1e-2
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(base_bytes(model), before, strict=True))
    with_both = logits_of(model, ["default", "second"])
    assert relative(with_both, logits_of(model, ["default"])) > 1e-3
    with model.disable_adapter():
        without = logits(model)
    assert relative(without, with_both) > 1e-3


def logits_of(model: Any, names: list[str]) -> Tensor:
    model.base_model.set_adapter(names)
    return logits(model)


def test_a_compiled_step_has_no_graph_break() -> None:
    model = adapted(quantized_and_dense("Mixtral")[0], target_modules=[])
    layer = wrappers(model)[0]
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(5, 64, generator=generator),
        torch.tensor([[0, 1], [2, 3], [1, 0], [0, 2], [3, 1]]),
        torch.full((5, 2), 0.5),
    )
    parameters = [p for p in layer.parameters() if p.requires_grad]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(*inputs).sum(), parameters)
    eager = torch.autograd.grad(layer(*inputs).sum(), parameters)
    torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' is not possible for experts"),
        ({"init_lora_weights": "olora"}, "'olora' is not possible for experts"),
        ({"lora_dropout": 0.1}, "does not work with lora_dropout"),
        ({"use_dora": True}, "does not work with"),
        ({"names": ["experts.gate_up_proj_bias"]}, "only gate_up_proj and down_proj can have"),
    ],
    ids=str,
)
def test_what_experts_cannot_have_is_refused(options: dict[str, Any], message: str) -> None:
    model = quantized_and_dense("GptOss")[0]
    with pytest.raises(ValueError, match=message):
        adapted(model, **{"target_modules": [], **options})


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_merged_export(family: str, tmp_path: Any) -> None:
    model = adapted(quantized_and_dense(family)[0])
    fourbit.export_merged(model, tmp_path / "merged")
    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    # No tensor of an adapter is left over.
    assert not any(report.values())
    assert relative(logits(merged), logits(model)) < 1e-5
