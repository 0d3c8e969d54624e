"""Where checkpoints hold experts, against what transformers itself writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.experts import experts_weight, quantize_experts, set_experts
from fourbit.integrations.transformers.expert_names import expert_shapes, expert_sources, is_experts
from fourbit.integrations.transformers.experts import use_fourbit
from moe_models import logits, moe

GATE_UP = ("gate_proj", "up_proj")


def on_meta(name: str, **text: Any) -> Any:
    """A model of the default configuration, of few layers and on the meta device."""
    cls = getattr(transformers, name)
    config = cls.config_class()
    for part in (config, config.get_text_config()):
        if hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = text.get("layers", 2)
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize(
    ("model", "layers", "module", "gate_up", "down"),
    [
        ("MixtralForCausalLM", 1, "block_sparse_moe.experts.{}", ("w1", "w3"), "w2"),
        ("PhimoeForCausalLM", 1, "block_sparse_moe.experts.{}", ("w1", "w3"), "w2"),
        ("Qwen2MoeForCausalLM", 1, "mlp.experts.{}", GATE_UP, "down_proj"),
        ("Qwen3MoeForCausalLM", 1, "mlp.experts.{}", GATE_UP, "down_proj"),
        ("Qwen3_5MoeForCausalLM", 1, "mlp.experts.{}", GATE_UP, "down_proj"),
        ("OlmoeForCausalLM", 1, "mlp.experts.{}", GATE_UP, "down_proj"),
        ("DeepseekV2ForCausalLM", 1, "mlp.experts.{}", GATE_UP, "down_proj"),
        ("DeepseekV3ForCausalLM", 4, "mlp.experts.{}", GATE_UP, "down_proj"),
        ("JambaForCausalLM", 2, "feed_forward.experts.{}", GATE_UP, "down_proj"),
    ],
)
def test_experts_that_are_stored_one_by_one(model, layers, module, gate_up, down):
    made = on_meta(model, layers=layers)
    sources = expert_sources(made)
    *_, gate_up_name, down_name = sources
    layer = f"model.layers.{layers - 1}."
    assert gate_up_name.startswith(layer)
    count = made.get_parameter(down_name).shape[0]
    assert sources[gate_up_name] == tuple(
        f"{layer}{module.format(expert)}.{part}.weight"
        for expert in range(count)
        for part in gate_up
    )
    assert sources[down_name] == tuple(
        f"{layer}{module.format(expert)}.{down}.weight" for expert in range(count)
    )


@pytest.mark.parametrize(
    ("model", "gate_up", "down"),
    [
        ("GptOssForCausalLM", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        (
            "GraniteMoeForCausalLM",
            "block_sparse_moe.input_linear.weight",
            "block_sparse_moe.output_linear.weight",
        ),
        (
            "Qwen3VLMoeForConditionalGeneration",
            "language_model.layers.0.mlp.experts.gate_up_proj",
            "language_model.layers.0.mlp.experts.down_proj",
        ),
    ],
)
def test_experts_that_are_stored_as_one(model, gate_up, down):
    first, second = list(expert_sources(on_meta(model)).values())[:2]
    for found, expected in ((first, gate_up), (second, down)):
        assert found is not None
        (name,) = found
        assert name.endswith(expected)


def test_experts_whose_elements_are_in_another_order_have_no_sources():
    sources = expert_sources(on_meta("InklingForConditionalGeneration"))
    assert {name.rpartition(".")[2]: found is None for name, found in sources.items()} == {
        "gate_up_proj": True,  # gate and up are interleaved
        "down_proj": False,
    }


def test_experts_of_other_forwards_are_none_of_ours():
    model = on_meta("Llama4ForConditionalGeneration")
    assert any(p.ndim == 3 and "experts" in n for n, p in model.named_parameters())
    assert expert_shapes(model) == {}
    assert expert_sources(model) == {}


@pytest.mark.parametrize(
    "model",
    [
        "InklingForConditionalGeneration",
        "JetMoeForCausalLM",
        "Llama4ForConditionalGeneration",
        "LongcatFlashForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
        "Step3p7ForConditionalGeneration",
    ],
)
def test_convert_leaves_experts_of_models_that_cannot_pack_them(model, tmp_path):
    made = on_meta(model, layers=4)
    if model != "Qwen3VLMoeForConditionalGeneration":  # transposed in checkpoints of older versions
        sources = expert_sources(made)
        experts = {n for n, p in made.named_parameters() if p.ndim == 3 and "experts" in n}
        assert any(sources.get(name) is None for name in experts)
    (tmp_path / "source").mkdir()
    made.config.save_pretrained(tmp_path / "source")
    weight = {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 64, 64)}
    save_file(weight, tmp_path / "source" / "model.safetensors")
    (report,) = fourbit.convert(tmp_path / "source", tmp_path / "converted").tensors
    assert report.reason == "experts that this model type computes with in another form"


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_the_sources_are_what_transformers_saves(family, tmp_path):
    model = moe(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sources = expert_sources(model)
    assert list(sources) == list(expert_shapes(model)) != []
    for name, names in sources.items():
        assert names is not None
        weight = model.get_parameter(name)
        pieces = [saved[source] for source in names]
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), weight.flatten())


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_packed_experts_are_computed_by_our_forward_alone(family):
    model = moe(family, torch.float32)
    sources, shapes = expert_sources(model), expert_shapes(model)
    dense = copy.deepcopy(model)
    for name in shapes:
        path, _, leaf = name.rpartition(".")
        module, groups = model.get_submodule(path), sources[name]
        assert is_experts(module)
        assert groups is not None
        set_experts(module, leaf, quantize_experts(module.get_parameter(leaf), groups=len(groups)))
        use_fourbit(module)
        dense.get_parameter(name).data = experts_weight(module, leaf).dequantize()
    assert expert_shapes(model) == shapes
    assert expert_sources(model) == sources
    # Sums of the same float32 terms in another order.
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"'eager'.*set_experts_implementation\('fourbit'\)"):
        logits(model)
    model.set_experts_implementation("fourbit")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
