"""`add_lora` and what looks at a model with adapters."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fourbit import Linear4bit
from fourbit.lora import adapter_size, add_lora, lora_modules, remove_lora
from lora_models import llama, logits, quantize_linears, shake

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class Plain(nn.Module):
    """No method of transformers: two blocks, a head tied to the embedding, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        result: torch.Tensor = self.head(hidden)
        return result


def test_all_linear_is_what_peft_takes() -> None:
    ours = add_lora(llama(), r=4)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    taken = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(lora_modules(ours)) == taken
    assert {path.rpartition(".")[2] for path in taken} == PROJECTIONS


@pytest.mark.parametrize("quantized", [False, True])
def test_only_the_adapter_is_trained(quantized: bool) -> None:
    model = llama(torch.bfloat16)
    if quantized:
        quantize_linears(model)
    before = logits(model)
    assert add_lora(model, r=4) is model
    assert torch.equal(logits(model), before)
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    assert trained == {
        f"{path}.lora_{part}.weight" for path in lora_modules(model) for part in "AB"
    }
    assert not any(module.training for module in model.modules())
    for layer in lora_modules(model).values():
        assert isinstance(layer.base_layer, Linear4bit) == quantized
        assert layer.lora_A.weight.dtype == torch.float32


def test_plain_modules_keep_their_tied_head_and_attention() -> None:
    model = add_lora(Plain(), r=2)
    assert set(lora_modules(model)) == {f"blocks.{b}.{i}" for b in (0, 1) for i in (0, 2)}
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        (["self_attn.q_proj"], 2),
        (["model.layers.1.mlp.up_proj"], 1),
        (r".*layers\.0\..*_proj", 7),
        ("lm_head", 1),
        (["lm_head", "q_proj"], 3),
    ],
)
def test_targets_by_name_and_by_pattern(targets: Any, count: int) -> None:
    model = add_lora(llama(), r=4, target_modules=targets)
    assert len(lora_modules(model)) == count


def test_ranks_and_alphas_by_pattern() -> None:
    options: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"v_proj": 32, "layers.0.self_attn.k_proj": 3},
    }
    ours = add_lora(llama(), r=4, lora_alpha=8, **options)
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    )
    for path, layer in lora_modules(ours).items():
        other = theirs.base_model.model.get_submodule(path)
        assert layer.r == other.r["default"]
        assert layer.scaling == other.scaling["default"]
    ranks = {path: layer.r for path, layer in lora_modules(ours).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.mlp.up_proj"] == 6
    assert ranks["model.layers.0.mlp.up_proj"] == 4


def test_a_layer_in_two_places_is_wrapped_in_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = nn.Sequential(model["a"])
    add_lora(model, r=2)
    assert model["a"] is model["b"][0]
    assert list(lora_modules(model)) == ["a"]
    remove_lora(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.Linear


def test_same_seed_same_adapter() -> None:
    def adapter(quantized: bool, seed: int | None, **options: Any) -> dict[str, torch.Tensor]:
        model = llama()
        if quantized:
            quantize_linears(model)
        state = torch.random.get_rng_state()
        add_lora(model, r=4, seed=seed, **options)
        drawn = not torch.equal(state, torch.random.get_rng_state())
        assert drawn == (seed is None)
        return {n: p for n, p in model.state_dict().items() if "lora_" in n}

    first = adapter(False, 7)
    for again in (adapter(False, 7), adapter(True, 7)):
        assert all(torch.equal(first[name], again[name]) for name in first)
    other = adapter(False, 8)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    # llama() seeds the global generator.
    assert all(
        torch.equal(one, two)
        for one, two in zip(adapter(True, None).values(), adapter(True, None).values(), strict=True)
    )


def test_adapter_dtype() -> None:
    model = add_lora(llama(), r=4, use_dora=True, adapter_dtype=torch.bfloat16)
    size = adapter_size(model)
    assert size.nbytes == 2 * size.parameters
    shake(model)
    assert logits(model).dtype == torch.float32


@pytest.mark.parametrize("quantized", [False, True])
def test_adapter_size(quantized: bool) -> None:
    model = llama()
    total = sum(part.numel() for part in model.parameters())
    if quantized:
        quantize_linears(model)
    size = adapter_size(add_lora(model, r=4))
    wanted = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert (size.parameters, size.nbytes) == (wanted, 4 * wanted)
    assert size.base_parameters == total
    assert size.share == wanted / (wanted + total)
    assert f"{wanted:,} trainable" in str(size)


def test_modules_to_save_are_trained_copies() -> None:
    model = llama(tie_word_embeddings=True)
    quantize_linears(model)
    head = model.lm_head
    add_lora(model, r=4, modules_to_save=["lm_head", "norm"])
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad
    before = head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert logits(model).eq(0).all()
    remove_lora(model)
    assert model.lm_head is head
    assert torch.equal(head.weight, before)
    assert head.weight is model.model.embed_tokens.weight


def test_layers_inside_modules_to_save_get_no_adapter() -> None:
    model = add_lora(llama(), r=4, modules_to_save=["layers.1.mlp"])
    assert not any(path.startswith("model.layers.1.mlp") for path in lora_modules(model))
    assert len(lora_modules(model)) == 11


def test_nested_modules_to_save_are_saved_once() -> None:
    model = llama()
    layer = model.model.layers[1]
    add_lora(model, r=4, modules_to_save=["layers.1", "layers.1.mlp"])
    assert model.model.layers[1] is not layer
    remove_lora(model)
    assert model.model.layers[1] is layer


def test_remove_gives_the_model_back() -> None:
    model = llama()
    quantize_linears(model)
    keys, before = list(model.state_dict()), logits(model)
    add_lora(model, r=4)
    shake(model)
    assert not torch.equal(logits(model), before)
    assert remove_lora(model) is model
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    add_lora(model, r=2)
    assert len(lora_modules(model)) == 14


def test_copies_of_a_model_remember_the_adapter(tmp_path: Any) -> None:
    model = llama()
    quantize_linears(model)
    add_lora(model, r=4, modules_to_save=["lm_head"])
    shake(model)
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), wanted)
        remove_lora(twin)
        assert torch.equal(logits(model), wanted)


def test_meta_device() -> None:
    model = llama().to("meta")
    add_lora(model, r=4, use_dora=True)
    assert all(part.is_meta for part in model.parameters())
    with pytest.raises(ValueError, match="meta device"):
        add_lora(remove_lora(model), r=4, init_lora_weights="loftq")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": "x"}, "lora_dropout is 'x'"),
        ({"rank_pattern": {"q_proj": -1}}, "q_proj is -1"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern has 'q_prj', which matches no layer"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern has 'lm_head', which matches no layer"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern '\\(' is not a regular expression"),
        ({"target_modules": "("}, "target_modules '\\(' is not a regular expression"),
        ({"target_modules": []}, "target_modules is \\(\\)"),
        ({"target_modules": ["query"]}, r"\['query'\] matches no layer.*down_proj.*q_proj"),
        ({"target_modules": "q_proj"}, "'q_proj' matches no layer"),
        ({"target_modules": ["q_proj", "vproj"]}, "'vproj', which matches no"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, which is a Embedding"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["nothing"]}, "'nothing', which this model does not have"),
        ({"modules_to_save": ["mlp"]}, "mlp, whose weights are quantized"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype is torch.int8"),
        ({"init_lora_weights": "loftq"}, "before it was quantized"),
        ({"init_lora_weights": "loftq", "loftq_iterations": 0}, "loftq_iterations is 0"),
        ({"loftq_weights": {}}, 'only used with init_lora_weights="loftq"'),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], message: str) -> None:
    model = llama()
    quantize_linears(model)
    keys = list(model.state_dict())
    trained = [part.requires_grad for part in model.parameters()]
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"r": 4, **options})
    assert list(model.state_dict()) == keys
    assert [part.requires_grad for part in model.parameters()] == trained


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(add_lora(llama(), r=4), r=4)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter of PEFT"):
        add_lora(theirs, r=4)


def test_remove_without_adapter_or_from_another_root() -> None:
    model = llama()
    with pytest.raises(ValueError, match="has no adapter"):
        remove_lora(model)
    add_lora(model.model, r=4)
    with pytest.raises(ValueError, match="submodule model"):
        remove_lora(model)


def test_a_model_that_is_itself_a_linear_layer() -> None:
    with pytest.raises(ValueError, match="none at all"):
        add_lora(nn.Linear(4, 4), r=2)


def test_needs_neither_transformers_nor_peft() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'accelerate'): sys.modules[name] = None\n"
        "import fourbit.lora, fourbit.training, torch\n"
        "model = fourbit.lora.add_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), r=2)\n"
        "fourbit.lora.merge(model)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
