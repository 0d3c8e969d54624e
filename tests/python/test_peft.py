"""PEFT's adapters on `Linear4bit`, against PEFT on the same weights dequantized, in float32."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

import fourbit
from fourbit import Linear4bit
from fourbit.integrations import on_import
from fourbit.integrations import peft as ours
from fourbit.integrations.peft.layer import LoraLinear4bit
from fourbit.quantized import quantize
from lora_models import llama, logits, quantize_linears, relative, tokens

# Both compute in float32; sums are in another order.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def quantized() -> Any:
    model = llama()
    quantize_linears(model)
    return model


@pytest.fixture(scope="module")
def dense(quantized: Any) -> Any:
    """The same model with each 4-bit weight as float32."""
    model = llama()
    for path, layer in quantized.named_modules():
        if isinstance(layer, Linear4bit):
            model.get_submodule(path).weight.data = layer.dequantize(torch.float32)
    return model


def adapted(model: Any, *, seed: int = 0, **options: Any) -> Any:
    """A copy of a model with adapters that change its output."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    shake(model, seed=seed)
    return model.eval()


def shake(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_" in name:
                part.add_(torch.randn(part.shape, generator=generator) * 0.05)


def layers(model: Any) -> list[LoraLinear4bit]:
    return [module for module in model.modules() if isinstance(module, LoraLinear4bit)]


def base_bytes(model: Any) -> dict[str, Tensor]:
    return {
        name: part.clone() for name, part in model.state_dict().items() if part.dtype == torch.uint8
    }


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients(model: Any) -> Tensor:
    torch.manual_seed(1)
    model(tokens(), labels=tokens()).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.5},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"lora_dropout": 0.5, "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "orthogonal"},
        {"alora_invocation_tokens": tokens()[0, 3:5].tolist(), "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_outputs_gradients_and_merged_weights_are_pefts(
    quantized: Any, dense: Any, options: dict[str, Any]
) -> None:
    found, expected = adapted(quantized, **options), adapted(dense, **options)
    assert len(layers(found)) == (4 if "lora_bias" in options else 14)
    assert relative(logits(found), logits(expected)) < CLOSE
    assert relative(logits(found), logits(quantized)) > 0.01
    assert found.train().get_nb_trainable_parameters() == expected.get_nb_trainable_parameters()
    assert relative(gradients(found), gradients(expected.train())) < CLOSE
    if "alora_invocation_tokens" in options:
        return
    merged = [m for m in expected.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for layer, other in zip(layers(found), merged, strict=True):
        other.merge()
        assert relative(layer.weight_with(["default"]), other.base_layer.weight) < CLOSE


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_requantizes_once_and_unmerge_is_exact(quantized: Any, use_dora: bool) -> None:
    options = {"use_dora": use_dora, "lora_bias": not use_dora}
    model = adapted(quantized, target_modules=["q_proj"], **options)
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("second", config)
    shake(model, seed=7)
    before, biases = base_bytes(model), [layer.base_layer.bias.clone() for layer in layers(model)]
    wanted = [layer.weight_with(["default", "second"]) for layer in layers(model)]
    with pytest.warns(UserWarning, match="export_merged"):
        model.merge_adapter(["default"])
    with warnings.catch_warnings(record=True):
        model.merge_adapter(["second"])
    for layer, weight in zip(layers(model), wanted, strict=True):
        # From the weight before both merges, not from the rounded result of the first.
        assert torch.equal(layer.base_layer.weight, quantize(weight).packed)
        assert torch.equal(layer.base_layer.weight_absmax, quantize(weight).absmax)
        assert torch.equal(layer.weight_with(["default", "second"]), weight)
    assert not same_bytes(base_bytes(model), before)
    model.unmerge_adapter()
    assert same_bytes(base_bytes(model), before)
    for layer, bias in zip(layers(model), biases, strict=True):
        assert torch.equal(layer.base_layer.bias, bias)
        assert not layer.merged


@pytest.mark.filterwarnings("ignore:merging into 4 bits")
def test_merge_and_unload_gives_four_bit_layers(quantized: Any) -> None:
    model = adapted(quantized)
    wanted = {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear4bit)}
    weights = {path: layer.weight_with(["default"]) for path, layer in wanted.items()}
    plain = model.merge_and_unload()
    assert not layers(plain)
    for path, weight in weights.items():
        layer = plain.get_submodule(path.removeprefix("base_model.model."))
        assert type(layer) is Linear4bit
        assert torch.equal(layer.weight, quantize(weight).packed)
    unloaded = adapted(quantized).unload()
    assert torch.equal(logits(unloaded), logits(quantized))


@pytest.mark.filterwarnings("ignore:merging into 4 bits")
def test_disabled_and_switched_adapters(quantized: Any, dense: Any) -> None:
    found, expected = adapted(quantized), adapted(dense)
    for model in (found, expected):
        torch.manual_seed(2)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        shake(model, seed=3)
    for name in ("second", "default", ["default", "second"]):
        for model in (found, expected):
            model.base_model.set_adapter(name)
        assert relative(logits(found), logits(expected)) < CLOSE
    with found.disable_adapter():
        assert torch.equal(logits(found), logits(quantized))
    before = base_bytes(found)
    found.merge_adapter()
    with found.disable_adapter():  # as in PEFT, this unmerges
        assert torch.equal(logits(found), logits(quantized))
    assert same_bytes(base_bytes(found), before)
    names = ["second", "__base__"]
    with torch.no_grad():
        mixed = found(tokens(), adapter_names=names).logits
        wanted = expected(tokens(), adapter_names=names).logits
    assert relative(mixed, wanted) < CLOSE
    found.delete_adapter("second")
    expected.delete_adapter("second")
    for model in (found, expected):
        model.base_model.set_adapter("default")
    assert relative(logits(found), logits(expected)) < CLOSE


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(
    quantized: Any, dense: Any, tmp_path: Any, use_dora: bool, low_cpu_mem_usage: bool
) -> None:
    model = adapted(quantized, use_dora=use_dora, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path, **options)
    assert torch.equal(logits(again), logits(model))
    assert len(layers(again)) == 14
    other = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path, **options)
    assert relative(logits(other), logits(model)) < CLOSE


@pytest.mark.filterwarnings("ignore:merging into 4 bits")
def test_copied_and_pickled(quantized: Any) -> None:
    model = adapted(quantized, use_dora=True).eval()
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), expected)
        again.merge_adapter()
        copied = copy.deepcopy(again)
        copied.unmerge_adapter()
        assert same_bytes(base_bytes(copied), base_bytes(model))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_starts_that_change_the_base(quantized: Any, start: str, tmp_path: Any) -> None:
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["o_proj"], init_lora_weights=start)
    model = peft.get_peft_model(copy.deepcopy(quantized), config)
    for index, layer in enumerate(layers(model)):
        weight = quantized.model.layers[index].self_attn.o_proj.dequantize(torch.float32)
        delta = layer.add_delta(torch.zeros_like(weight), "default")
        if start == "olora":
            q, r = torch.linalg.qr(weight)
            assert relative(delta, 0.5 * q[:, :8] @ r[:8]) < CLOSE
        else:
            u, s, v = torch.linalg.svd(weight)
            best = u[:, :8] * s[:8] @ v[:8]
            # A random matrix has no few large singular values, which "niter" would find.
            assert relative(delta, best) < (0.6 if "niter" in start else CLOSE)
        # What is left is in 4 bits, and nothing but its rounding is lost.
        assert torch.equal(layer.base_layer.weight, quantize(weight - delta).packed)
    # The base changes alike when the adapter is loaded: what was saved fits.
    shake(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path)
    assert same_bytes(base_bytes(again), base_bytes(model))
    assert torch.equal(logits(again), logits(model))


def rounding(model: Any, original: Any) -> float:
    """How far the weights with their adapters are from those before quantization."""
    prefix = "base_model.model."
    errors = [
        layer.weight_with(["default"]) - original.get_submodule(path.removeprefix(prefix)).weight
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLinear4bit)
    ]
    return sum(error.square().sum().item() for error in errors) ** 0.5


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.usefixtures("scipy")
def test_loftq_makes_up_for_rounding(quantized: Any, use_dora: bool, tmp_path: Any) -> None:
    original = llama()
    original.save_pretrained(tmp_path)
    error = relative(logits(quantized), logits(original))
    config = {"r": 32, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": use_dora}
    model = peft.get_peft_model(copy.deepcopy(quantized), peft.LoraConfig(**config))
    # PEFT's own function, which knows only its own class.
    peft.replace_lora_weights_loftq(model, tmp_path)
    assert relative(logits(model), logits(original)) < 0.6 * error
    kept = logits(model)
    peft.replace_lora_weights_loftq(model, tmp_path, callback=lambda *_: False)
    assert torch.equal(logits(model), kept)

    start = copy.deepcopy(quantized)
    start.config._name_or_path = str(tmp_path)
    loftq = peft.LoftQConfig(loftq_bits=4, loftq_iter=1)
    settings = {**config, "init_lora_weights": "loftq", "loftq_config": loftq}
    direct = peft.get_peft_model(start, peft.LoraConfig(**settings))
    assert torch.equal(logits(direct), kept)
    assert same_bytes(base_bytes(direct), base_bytes(model))
    loftq.loftq_iter = 5
    start = copy.deepcopy(quantized)
    start.config._name_or_path = str(tmp_path)
    rounds = peft.get_peft_model(start, peft.LoraConfig(**settings))
    assert rounding(rounds, original) < rounding(direct, original)
    # The base is another then, and becomes the same again when the adapter is loaded.
    rounds.save_pretrained(tmp_path / "adapter")
    start = copy.deepcopy(quantized)
    start.config._name_or_path = str(tmp_path)
    again = peft.PeftModel.from_pretrained(start, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(rounds))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_beside_a_16_bit_base(autocast_adapter_dtype: bool) -> None:
    dtype = torch.bfloat16
    model = llama(dtype)
    twin = copy.deepcopy(model)
    quantize_linears(model)
    for path, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            twin.get_submodule(path).weight.data = layer.dequantize(dtype)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    both = []
    for base in (model, twin):
        torch.manual_seed(0)
        options = {"autocast_adapter_dtype": autocast_adapter_dtype}
        both.append(peft.get_peft_model(base, config, **options))
        shake(both[-1])
    found, expected = both
    for layer in layers(found):
        wanted = torch.float32 if autocast_adapter_dtype else dtype
        assert layer.lora_A["default"].weight.dtype == wanted
    # bfloat16 has 8 bits; the rest of the model rounds as well.
    assert relative(logits(found), logits(expected)) < 0.02
    assert logits(found).dtype == dtype


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiles_whole(use_dora: bool) -> None:
    block = llama(num_hidden_layers=1)
    quantize_linears(block)
    model = adapted(block, use_dora=use_dora).train()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(gradients(compiled), expected) < CLOSE


@pytest.mark.filterwarnings("ignore:merging into 4 bits")
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_export(quantized: Any, dense: Any, use_dora: bool, tmp_path: Path) -> None:
    # The output head is dense: an adapter of PEFT's own. The norm is trained whole.
    targets = ["q_proj", "up_proj", "lm_head", *([] if use_dora else ["embed_tokens"])]
    options = {"use_dora": use_dora, "target_modules": targets, "modules_to_save": ["norm"]}
    model = adapted(quantized, **options)
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
    fourbit.export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert relative(logits(merged), logits(model)) < CLOSE
    # A merge into 4 bits does not change what is written.
    model.merge_adapter()
    fourbit.export_merged(model, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name])


def test_preparing_for_training_casts_nothing() -> None:
    model = llama(torch.bfloat16)
    quantize_linears(model)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert model.is_gradient_checkpointing
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # Models without 4-bit layers are PEFT's own business.
    other = peft.prepare_model_for_kbit_training(llama(torch.bfloat16))
    assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_the_hook_comes_out_again() -> None:
    from peft.utils import quantization_utils  # the oldest PEFT has none

    prepare = peft.prepare_model_for_kbit_training
    loftq = peft.replace_lora_weights_loftq.__wrapped__
    resolve = quantization_utils.resolve_quantization_backend

    def state() -> list[Any]:
        return [
            LoraModel._create_and_replace,
            peft.PeftModel.get_nb_trainable_parameters,
            peft.PeftMixedModel.get_nb_trainable_parameters,
            BaseTuner._check_merge_allowed,
            BaseTuner._replace_module,
            BaseTunerLayer._get_base_layer_device_and_dtype,
            *(prepare.__code__, loftq.__code__, resolve.__code__),
            *(prepare.__defaults__, loftq.__defaults__, dict(vars(prepare)), dict(vars(loftq))),
        ]

    installed, signature = state(), inspect.signature(prepare)
    ours.uninstall()
    try:
        before = state()
        assert not any(a is b for a, b in zip(installed[:9], before[:9], strict=True))
        assert LoraModel._create_and_replace.__module__ == "peft.tuners.lora.model"
        assert inspect.signature(prepare) == signature
        model = llama(torch.bfloat16)
        assert prepare(model).dtype == torch.float32
        ours.uninstall()
    finally:
        ours.install()
    ours.install()
    ours.uninstall()
    assert state() == before
    ours.install()


def test_hooks_wait_for_a_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_library.py").write_text("value = 1")
    (tmp_path / "some_hook.py").write_text(
        "import some_library\ncalls = []\ndef register(): calls.append(some_library.value)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(on_import.HOOKS, "some_library", "some_hook")
    monkeypatch.setattr(on_import, "require", lambda _library: None)  # knows no such libraries
    # Libraries ask whether others are installed.
    assert importlib.util.find_spec("some_library") is not None
    assert "some_hook" not in sys.modules
    module = importlib.import_module("some_library")
    assert sys.modules["some_hook"].calls == [1]
    assert module.__spec__.loader is module.__loader__
    assert not type(module.__loader__).__module__.startswith("fourbit")
    monkeypatch.setitem(on_import.HOOKS, "no_such_library", "some_hook")
    assert importlib.util.find_spec("no_such_library") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_library")
    monkeypatch.delitem(sys.modules, "some_library")
    monkeypatch.delitem(sys.modules, "some_hook")


def test_a_router_over_adapters(quantized: Any, dense: Any, tmp_path: Path) -> None:
    for index in range(2):
        adapted(dense, seed=index).save_pretrained(tmp_path / str(index))
    paths = [str(tmp_path / str(index)) for index in range(2)]
    models = [
        create_arrow_model(
            base_model=copy.deepcopy(base),
            task_specific_adapter_paths=paths,
            arrow_config=peft.ArrowConfig(top_k=1, rng_seed=0),
        ).eval()
        for base in (quantized, dense)
    ]
    assert len(layers(models[0])) == 14
    found, expected = (logits(model) for model in models)
    assert relative(found, expected) < CLOSE
    assert relative(found, logits(quantized)) > 0.01
