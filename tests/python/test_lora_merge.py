"""Adapters inside the frozen weights, and out again."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fourbit import Linear4bit, NonFiniteError
from fourbit.lora import add_lora, lora_modules, merge, merged_weight, remove_lora, unmerge
from fourbit.lora.layer import base_weight
from lora_models import llama, logits, quantize_linears, relative, shake

KINDS = ["float32", "bfloat16", "float16", "nf4", "plain-fp4"]


def adapted(kind: str, **options: Any) -> Any:
    dtype = getattr(torch, kind, torch.bfloat16)
    model = llama(dtype)
    if kind == "nf4":
        quantize_linears(model)
    elif kind == "plain-fp4":
        quantize_linears(model, codebook="fp4", block_size=128, double_quant=False)
    add_lora(model, r=4, **options)
    shake(model, size=0.2)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_unmerge_is_exact(kind: str, use_dora: bool) -> None:
    model = adapted(kind, use_dora=use_dora)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    wanted = logits(model)
    for _ in range(3):
        merge(model)
        changed = [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])]
        assert any(name.endswith("base_layer.weight") for name in changed)
        assert not any("lora_" in name for name in changed)
        unmerge(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_float32_model_computes_the_same(use_dora: bool) -> None:
    model = adapted("float32", use_dora=use_dora)
    wanted = logits(model)
    report = merge(model)
    # float32 in another order, through two blocks.
    assert relative(logits(model), wanted) < 1e-5
    assert report.layers[report.worst].relative_error < 1e-5


@pytest.mark.parametrize("use_dora", [False, True])
def test_merges_to_what_peft_merges_to(use_dora: bool) -> None:
    ours = adapted("float32", use_dora=use_dora)
    theirs = peft.get_peft_model(
        llama(),
        peft.LoraConfig(r=4, lora_alpha=16, use_dora=use_dora, target_modules="all-linear"),
    )
    names = {
        name.replace(".default", "").replace("vector.weight", "vector"): part
        for name, part in theirs.base_model.model.named_parameters()
    }
    with torch.no_grad():
        for name, part in ours.named_parameters():
            if part.requires_grad:
                names[name].copy_(part)
    merge(ours)
    merged = theirs.merge_and_unload()
    for path, layer in lora_modules(ours).items():
        assert relative(layer.base_layer.weight, merged.get_submodule(path).weight) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_report_says_what_rounding_left(kind: str, use_dora: bool) -> None:
    model = adapted(kind, use_dora=use_dora)
    twin = copy.deepcopy(model)
    report = merge(model)
    assert set(report.layers) == set(lora_modules(model))
    for path, layer in lora_modules(twin).items():
        before, wanted = base_weight(layer.base_layer).double(), merged_weight(layer).double()
        after = base_weight(lora_modules(model)[path].base_layer).double()
        change, found = wanted - before, report.layers[path]
        error = (after - wanted).norm() / change.norm()
        # Sums in float32 of some thousand squares.
        assert found.relative_error == pytest.approx(error.item(), rel=1e-4, abs=1e-7)
        survived = ((after - before) * change).sum() / change.norm() ** 2
        assert found.survived == pytest.approx(survived.item(), rel=1e-4)
        assert found.change == pytest.approx((change.norm() / before.norm()).item(), rel=1e-4)
        if kind in ("nf4", "plain-fp4"):
            assert found.relative_error > 1e-3
            base = layer.base_layer
            assert isinstance(base, Linear4bit)
            assert base.quantized().codebook == _base(model, path).codebook
            assert base.block_size == _base(model, path).block_size
            assert base.weight_dtype == _base(model, path).weight_dtype
    assert "merged 14 layers" in str(report)
    assert report.worst in str(report)
    errors = [layer.relative_error for layer in report.layers.values()]
    assert report.mean_relative_error == pytest.approx(sum(errors) / len(errors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_without_effect_leaves_the_bytes(kind: str, use_dora: bool) -> None:
    model = adapted(kind, use_dora=use_dora)
    for layer in lora_modules(model).values():
        layer.reset_lora_parameters()
        layer.reset_magnitude()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    report = merge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(layer.relative_error == 0 for layer in report.layers.values())
    unmerge(model)


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weight_does_not_depend_on_the_state(kind: str, use_dora: bool) -> None:
    model = adapted(kind, use_dora=use_dora)
    wanted = {path: merged_weight(layer) for path, layer in lora_modules(model).items()}
    merge(model)
    for path, layer in lora_modules(model).items():
        assert torch.equal(merged_weight(layer), wanted[path])


def test_copies_can_be_unmerged() -> None:
    model = adapted("nf4")
    wanted = logits(model)
    merge(model)
    twin = copy.deepcopy(model)
    unmerge(twin)
    assert torch.equal(logits(twin), wanted)
    assert all(layer.merged for layer in lora_modules(model).values())


def test_a_merged_model_can_lose_its_adapter() -> None:
    model = adapted("nf4")
    merge(model)
    wanted = logits(model)
    remove_lora(model)
    assert torch.equal(logits(model), wanted)
    assert not lora_modules(model)


def test_merge_keeps_a_cast_of_the_model() -> None:
    model = adapted("nf4")
    wanted = logits(model)
    merge(model)
    model.to(torch.bfloat16)
    unmerge(model)
    # The adapter itself was cast.
    assert relative(logits(model), wanted) < 0.05


def test_a_tied_head_is_tied_again_after_unmerge() -> None:
    model = llama(tie_word_embeddings=True)
    add_lora(model, r=4, target_modules=["lm_head"])
    shake(model)
    embeddings = model.model.embed_tokens.weight
    before = embeddings.clone()
    merge(model)
    assert model.lm_head.base_layer.weight is not embeddings
    assert torch.equal(embeddings, before)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        unmerge(each)
        assert each.lm_head.base_layer.weight is each.model.embed_tokens.weight
        assert torch.equal(each.model.embed_tokens.weight, before)


def test_out_of_turn() -> None:
    model = adapted("nf4")
    with pytest.raises(ValueError, match="is not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(ValueError, match="is merged already"):
        merge(model)
    for call in (merge, unmerge):
        with pytest.raises(ValueError, match="has no adapter"):
            call(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("nf4", float("nan")), ("nf4", float("inf")), ("float16", float("nan")), ("float16", 1e6)],
)
def test_a_broken_adapter_changes_nothing(kind: str, value: float) -> None:
    model = adapted(kind)
    with torch.no_grad():
        lora_modules(model)["model.layers.1.mlp.up_proj"].lora_B.weight[2, 1] = value
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        merge(model)
    for name, part in model.state_dict().items():
        assert torch.equal(part.nan_to_num(7), before[name].nan_to_num(7))
    assert not any(layer.merged for layer in lora_modules(model).values())


def _base(model: nn.Module, path: str) -> Linear4bit:
    base = lora_modules(model)[path].base_layer
    assert isinstance(base, Linear4bit)
    return base
