"""Mixtures of experts in folders: convert, load, save, quantize in memory, and back to 16 bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import fourbit
from fourbit.experts import (
    experts_layouts,
    experts_modules,
    experts_weight,
    quantize_experts,
    set_experts,
)
from fourbit.integrations.transformers.expert_names import expert_sources
from moe_models import SETTINGS, logits, moe

FAMILIES = list(SETTINGS)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = tensors_in(folder), tensors_in(other)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def quantization(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """A family, a model of it, its folder and that converted."""
    root = tmp_path_factory.mktemp(request.param)
    model = moe(request.param)
    model.save_pretrained(root / "source")
    fourbit.convert(root / "source", root / "converted")
    return request.param, model, root / "source", root / "converted"


def test_converted_experts_are_quantized_one_by_one(folders):
    family, _, source, converted = folders
    plain = tensors_in(source)
    info = {weight.name: weight for weight in fourbit.inspect(converted).quantized}
    experts = [name for name in plain if "experts" in name and not name.endswith("bias")]
    assert set(experts) < set(info)
    assert {info[name].reason for name in experts} == {"mixture of experts"}
    assert quantization(converted)["quant_method"] == "fourbit"
    assert quantization(converted)["codebook"] == "nf4"
    assert not any("expert" in path for path in quantization(converted)["skip_modules"])
    stored = tensors_in(converted)
    for name in experts:
        alone = fourbit.quantize(plain[name])
        assert torch.equal(stored[name], alone.packed)
        assert torch.equal(stored[f"{name}.absmax"], alone.absmax)
        nested = alone.nested_absmax
        assert nested is not None
        assert torch.equal(stored[f"{name}.nested_absmax"].view(torch.uint8), nested)
    assert fourbit.verify(converted).checksums
    assert len(experts) == {"Mixtral": 2 * 4 * 3, "Qwen3Moe": 4 * 3, "GptOss": 2 * 2}[family]


def test_a_loaded_model_computes_what_its_dense_twin_does(folders):
    _, model, source, converted = folders
    loaded = fourbit.from_pretrained(converted, dtype=torch.float32)
    dense = type(model).from_pretrained(source, dtype=torch.float32).eval()
    for path, module in loaded.named_modules():
        if isinstance(module, fourbit.Linear4bit):
            dense.get_submodule(path).weight.data = module.dequantize(torch.float32)
        for name in experts_layouts(module):
            whole = experts_weight(module, name).dequantize(torch.float32)
            dense.get_submodule(path).get_parameter(name).data = whole
    assert set(experts_modules(loaded)) == {n.rpartition(".")[0] for n in expert_sources(model)}
    dense.set_experts_implementation("eager")
    # Sums of the same float32 terms in another order.
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_was_converted(folders, tmp_path):
    _, model, _, converted = folders
    fourbit.save(fourbit.from_pretrained(converted), tmp_path / "saved")
    assert_same(tmp_path / "saved", converted)
    assert quantization(tmp_path / "saved")["quant_method"] == "fourbit"
    # And so is what is quantized in memory; `load` fills a model that is quantized already, too.
    quantized = fourbit.quantize_model(copy.deepcopy(model))
    fourbit.save(quantized, tmp_path / "in_memory")
    assert_same(tmp_path / "in_memory", converted)
    other = fourbit.quantize_model(moe(folders[0], seed=1))
    fourbit.load(other, converted)
    assert torch.equal(logits(other), logits(quantized))


def test_experts_of_bitsandbytes_are_read(tmp_path):
    """transformers 4 computed with experts one by one, and bitsandbytes quantized each."""
    model = moe("Qwen3Moe")
    model.save_pretrained(tmp_path / "source")
    folder = tmp_path / "converted"
    fourbit.convert(tmp_path / "source", folder, double_quant=False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = fourbit.from_pretrained(folder)
    fourbit.save(loaded, tmp_path / "saved")
    assert_same(tmp_path / "saved", folder)


def test_merged_export_is_a_plain_checkpoint(folders, tmp_path):
    _, _, source, converted = folders
    loaded = fourbit.from_pretrained(converted, dtype=torch.float32)
    fourbit.export_merged(loaded, tmp_path / "plain", dtype=torch.float32)
    assert {n: t.shape for n, t in tensors_in(tmp_path / "plain").items()} == {
        n: t.shape for n, t in tensors_in(source).items()
    }
    plain = type(loaded).from_pretrained(tmp_path / "plain").eval()
    # Sums of the same float32 terms in another order.
    torch.testing.assert_close(logits(plain), logits(loaded), rtol=1e-4, atol=1e-4)


# --- what is not quantized ------------------------------------------------------------------------


def test_experts_that_are_skipped_leave_a_folder_for_bitsandbytes(folders, tmp_path):
    _, model, source, _ = folders
    report = fourbit.convert(source, tmp_path / "skipped", skip="*experts*")
    assert not any("experts" in tensor.name for tensor in report.quantized)
    assert quantization(tmp_path / "skipped")["quant_method"] == "bitsandbytes"
    loaded = fourbit.from_pretrained(tmp_path / "skipped")
    for name in expert_sources(model):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    fourbit.save(loaded, tmp_path / "saved")
    assert_same(tmp_path / "saved", tmp_path / "skipped")
    assert quantization(tmp_path / "saved")["quant_method"] == "bitsandbytes"
    fourbit.save(
        fourbit.quantize_model(copy.deepcopy(model), skip=["*experts*"]), tmp_path / "in_memory"
    )
    assert_same(tmp_path / "in_memory", tmp_path / "skipped")


def test_experts_alone(folders, tmp_path):
    _, model, source, _ = folders
    fourbit.convert(source, tmp_path / "converted", only="*experts*")
    alone = fourbit.quantize_model(copy.deepcopy(model), only=["*experts*"])
    assert not any(isinstance(module, fourbit.Linear4bit) for module in alone.modules())
    fourbit.save(alone, tmp_path / "saved")
    assert_same(tmp_path / "saved", tmp_path / "converted")
    fourbit.save(fourbit.from_pretrained(tmp_path / "saved"), tmp_path / "again")
    assert_same(tmp_path / "again", tmp_path / "converted")


def test_matrices_that_are_no_whole_blocks_stay(tmp_path):
    # 64 * 24 elements are one and a half blocks of 1024.
    model = moe("Qwen3Moe", moe_intermediate_size=24)
    model.save_pretrained(tmp_path / "source")
    report = fourbit.convert(tmp_path / "source", tmp_path / "ours", block_size=1024)
    kept = {tensor.reason for tensor in report.kept if ".experts." in tensor.name}
    assert kept == {"experts whose matrices are not whole blocks"}
    loaded = fourbit.from_pretrained(tmp_path / "ours")
    assert experts_modules(loaded) == {}
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj and 1 more.*blocks of 1024"):
        quantized = fourbit.quantize_model(model, block_size=1024)
    fourbit.save(quantized, tmp_path / "saved")
    assert_same(tmp_path / "saved", tmp_path / "ours")


# --- folders that do not fit ----------------------------------------------------------------------


def test_experts_in_part_are_refused_with_what_to_do(folders, tmp_path):
    family, _, source, _ = folders
    if family == "GptOss":
        # One of its two weights may well be quantized alone.
        fourbit.convert(source, tmp_path / "part", skip="*down_proj")
        (module, *_) = experts_modules(fourbit.from_pretrained(tmp_path / "part")).values()
        assert list(experts_layouts(module)) == ["gate_up_proj"]
        return
    fourbit.convert(source, tmp_path / "part", skip="*experts.1.*")
    with pytest.raises(fourbit.CheckpointError, match=r"experts\.1\..*--skip '\*experts\*'"):
        fourbit.from_pretrained(tmp_path / "part")


def test_experts_in_another_order_are_refused_with_what_to_do(tmp_path):
    """Experts that a checkpoint holds transposed cannot be packed; only `only` packs them."""
    config = transformers.Qwen3VLMoeConfig()
    text = config.text_config
    text.num_hidden_layers, text.num_experts, text.num_experts_per_tok = 1, 2, 1
    text.hidden_size, text.moe_intermediate_size, text.vocab_size = 32, 64, 64
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 2, 16
    text.intermediate_size = 64
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 32, 2
    vision.out_hidden_size, vision.deepstack_visual_indexes = 32, [0]
    vision.num_position_embeddings = 4
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    stored = load_file(file)
    for name, tensor in stored.items():
        if tensor.ndim == 3 and "experts" in name:
            stored[name] = tensor.transpose(1, 2).contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    report = fourbit.convert(tmp_path / "source", tmp_path / "ours")
    kept = [t for t in report.kept if t.reason.startswith("experts that this model type computes")]
    assert len(kept) == 2
    loaded = fourbit.from_pretrained(tmp_path / "ours")
    for name in expert_sources(model):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    fourbit.convert(tmp_path / "source", tmp_path / "packed", only="*experts*")
    with pytest.raises(fourbit.CheckpointError, match=r"another form.*--skip '\*experts\*'"):
        fourbit.from_pretrained(tmp_path / "packed")


def test_experts_of_two_kinds_are_refused(tmp_path):
    model = moe("Qwen3Moe")
    for options in ({}, {"block_size": 32}):
        folder = tmp_path / f"{options}"
        fourbit.save(fourbit.quantize_model(copy.deepcopy(model), **options), folder)
    first, second = (tensors_in(folder) for folder in sorted(tmp_path.iterdir()))
    mixed = {
        name: (first if ".experts.0.down_proj" in name else second)[name]
        for name in second
        if ".experts.0.down_proj" not in name or name in first
    }
    (tmp_path / "mixed").mkdir()
    save_file(mixed, tmp_path / "mixed" / "model.safetensors")
    with pytest.raises(fourbit.CheckpointError, match=r"experts\.0\.down_proj.*block_size"):
        fourbit.load(model, tmp_path / "mixed")


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_experts_of_other_models_have_numbered_groups(groups, tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(2, 64, 16))

    module = Experts()
    weight = quantize_experts(module.w, groups=groups)
    set_experts(module, "w", weight)
    fourbit.save(module, tmp_path / "saved")
    assert len(fourbit.inspect(tmp_path / "saved").quantized) == groups
    for other in (Experts(), module):
        loaded = fourbit.load(other, tmp_path / "saved")
        assert experts_layouts(loaded)["w"] == weight.layout
        for part, expected in zip(experts_weight(loaded, "w").parts, weight.parts, strict=True):
            assert part is not None
            assert expected is not None
            assert torch.equal(part, expected)


def test_groups_that_no_checkpoint_has_are_not_saved(tmp_path):
    model = moe("Mixtral")
    experts = model.model.layers[0].mlp.experts
    set_experts(experts, "down_proj", quantize_experts(experts.down_proj, groups=2))
    with pytest.raises(ValueError, match=r"experts\.down_proj is quantized in 2 groups"):
        fourbit.save(model, tmp_path / "saved")
