"""Files of adapters on experts: PEFT's, on a dense model and on 4 bits, and merged checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fourbit
from fourbit.lora import (
    LoraExperts,
    add_lora,
    load_adapter,
    lora_modules,
    merged_experts,
    remove_lora,
    save_adapter,
)
from lora_models import relative
from moe_experts import BOTH, experts_of, quantized_and_dense, shake
from moe_models import logits, tokens

FAMILIES = ("Mixtral", "Qwen3Moe", "GptOss")


# --- PEFT -----------------------------------------------------------------------------------------


def with_peft(dense: Any, names: list[str], **options: Any) -> Any:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=names, **options
    )
    model = peft.get_peft_model(dense, config)
    shake(model)
    return model


@pytest.mark.parametrize(
    ("family", "names"),
    [
        *((family, BOTH) for family in FAMILIES),
        ("Mixtral", ["mlp.experts.down_proj"]),
        ("GptOss", ["gate_up_proj"]),
    ],
)
def test_adapters_go_to_peft_and_back(family, names, tmp_path):
    quantized, dense = quantized_and_dense(family)
    theirs = with_peft(
        copy.deepcopy(dense), names, rank_pattern={".*gate_up_proj": 6}, use_rslora=True
    )
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(quantized, tmp_path / "theirs")
    assert relative(logits(quantized), logits(theirs)) < 1e-5
    for model in (quantized, theirs):
        model(tokens(), labels=tokens()).loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if "lora_" in n}
    save_adapter(quantized, tmp_path / "ours")
    # Their names are those of the file; the gradients in its layout.
    for part in quantized.parameters():
        if part.requires_grad:
            part.data = part.grad
    save_adapter(quantized, tmp_path / "gradients")
    mine = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in grads} == set(mine)
    for name, grad in grads.items():
        assert relative(mine[name.replace(".default", "")], grad) < 1e-4, name

    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert set(ours) == set(stored)
    assert all(torch.equal(ours[name], stored[name]) for name in ours)
    loaded = peft.PeftModel.from_pretrained(dense, tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_trained_here_gives_the_same_in_peft(family, tmp_path):
    # PEFT takes the names of a plain MLP in this family for those of experts before transformers 5.
    own = {"mlp_only_layers": []} if family == "Qwen3Moe" else {}
    quantized, dense = quantized_and_dense(family, **own)
    add_lora(quantized, r=4, lora_dropout=0.1, rank_pattern={"experts.*": 2}, seed=0)
    assert sum(isinstance(layer, LoraExperts) for layer in lora_modules(quantized).values()) == len(
        experts_of(dense)
    )
    shake(quantized)
    quantized.eval()
    save_adapter(quantized, tmp_path)
    loaded = peft.PeftModel.from_pretrained(dense, tmp_path)
    assert relative(logits(loaded), logits(quantized)) < 1e-5


# --- files ----------------------------------------------------------------------------------------


def test_a_saved_adapter_goes_on_where_it_was(tmp_path):
    model = quantized_and_dense("Mixtral")[0]
    again = copy.deepcopy(model)
    add_lora(model, r=4, lora_dropout=0.25, seed=0)
    shake(model)
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_parameters"] == BOTH
    assert fields["lora_dropout"] == 0.0
    load_adapter(again, tmp_path)
    for mine, other in zip(lora_modules(model).values(), lora_modules(again).values(), strict=True):
        assert repr(mine) == repr(other)  # dropout, ranks and scaling are among it
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    assert trained == {name for name, part in again.named_parameters() if part.requires_grad}
    for twin in (model, again):
        twin.train()
        torch.manual_seed(0)
    assert torch.equal(logits_with_seed(model), logits_with_seed(again))


def logits_with_seed(model: Any) -> Tensor:
    torch.manual_seed(0)
    return logits(model)


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = quantized_and_dense("Mixtral")[0]
    add_lora(model, r=4, target_modules=["q_proj"], target_parameters=BOTH)
    save_adapter(model, tmp_path)
    remove_lora(model)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"

    def refused(message: str, tensors: dict[str, Tensor] = tensors, **changes: Any) -> None:
        save_file(tensors, weights)
        config.write_text(json.dumps({**fields, **changes}))
        before = set(model.state_dict())
        with pytest.raises(fourbit.CheckpointError, match=message):
            load_adapter(model, tmp_path)
        assert set(model.state_dict()) == before

    less = {name: tensor for name, tensor in tensors.items() if name != key}
    refused(r"base_layer\.lora_B\.weight, the adapter of .*experts\.gate_up_proj, is missing", less)
    short = {**tensors, key: tensors[key][:, :-1].contiguous()}
    refused(r"is \(192, 15\), not \(192, 16\), which .*gate_up_proj of 4 experts has", short)
    refused(r"is \(16, 64\), not \(32, 64\)", rank_pattern={".*gate_up_proj": 8})
    # What is left has no place: PEFT's nesting says which weight an adapter is of.
    refused("has no linear layer", target_parameters=["experts.down_proj"])
    refused(
        "names 'gate.weight', and model.layers.0.mlp.gate.weight is no 3-D weight",
        target_parameters=["gate.weight"],
    )
    refused("names 'wx', which this model does not have", target_parameters=["wx"])
    refused("use_dora is for linear layers", use_dora=True)
    refused("the field target_modules is missing", target_modules=None, target_parameters=None)


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_export_is_the_checkpoint_that_transformers_writes(family, tmp_path):
    """The names, shapes and numbers of ``save_pretrained`` of the dense model with the sums."""
    model, dense = quantized_and_dense(family)
    add_lora(model, r=4, target_parameters=["experts.down_proj"])
    shake(model)
    for path, layer in lora_modules(model).items():
        if isinstance(layer, LoraExperts):
            dense.get_submodule(path).down_proj.data = merged_experts(layer, "down_proj")
        else:
            dense.get_submodule(path).weight.data = fourbit.lora.merged_weight(layer)
    fourbit.export_merged(model, tmp_path / "ours")
    dense.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fourbit.export_merged(model, tmp_path / "half", dtype=torch.bfloat16)
    half = tensors_in(tmp_path / "half")
    assert all(torch.equal(half[name], theirs[name].bfloat16()) for name in theirs)
    loaded = type(model).from_pretrained(tmp_path / "ours")
    assert relative(logits(loaded), logits(model)) < 1e-5


def tensors_in(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)
