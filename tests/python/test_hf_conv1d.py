"""GPT-2's `Conv1D`, a linear layer whose weight is stored transposed, in 4 bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fourbit
from fourbit import CheckpointError, Linear4bit, NF4Config
from lora_models import logits

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

LAYERS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
PATHS = [f"transformer.h.{block}.{name}" for block in range(2) for name in LAYERS]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear4bit)}


def assert_same(first, second):
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert [repr(m) for m in first.modules()] == [repr(m) for m in second.modules()]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A random GPT-2 of two blocks; its `attn.c_proj` are square."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=32, initializer_range=0.2
    )
    folder = tmp_path_factory.mktemp("conv1d") / "dense"
    model = transformers.GPT2LMHeadModel(config)
    for path in PATHS:
        nn.init.normal_(model.get_submodule(path).bias)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(dense):
    folder = dense.with_name("saved")
    load(dense, quantization_config=NF4Config()).save_pretrained(folder)
    return folder


def test_the_transposed_weight_is_quantized(dense):
    model = load(dense, quantization_config=NF4Config())
    assert list(layers(model)) == PATHS
    reference = load(dense)
    for path, layer in layers(model).items():
        source = reference.get_submodule(path)
        rows = source.weight.t().contiguous()
        assert (layer.out_features, layer.in_features) == tuple(rows.shape)
        assert torch.equal(layer.dequantize(), fourbit.quantize(rows).dequantize())
        assert torch.equal(layer.bias, source.bias)
        source.weight.data = layer.dequantize().t().contiguous()
    # The same sums in another order, in float32: three decimal digits fewer than its seven.
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    assert_same(model, fourbit.quantize_model(load(dense)))


def test_a_checkpoint_without_the_prefix_of_the_model(dense, tmp_path):
    """Such as the hub's own of GPT-2."""
    load(dense).transformer.save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path, quantization_config=NF4Config())
    assert_same(model, load(dense, quantization_config=NF4Config()))


@pytest.mark.parametrize("options", [{"codebook": "int4"}, {"skip": ["*.c_proj"]}], ids=str)
def test_folders_load_bit_for_bit(options, dense, tmp_path):
    model = load(dense, quantization_config=NF4Config(**options))
    model.save_pretrained(tmp_path / "saved")
    kept = sum(isinstance(module, Conv1D) for module in model.modules())
    assert kept == (4 if "skip" in options else 0)
    assert_same(load(tmp_path / "saved"), model)
    assert_same(fourbit.from_pretrained(tmp_path / "saved"), model)
    fourbit.save(model, tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), model)
    # Layers that stay are named, since bitsandbytes would else take them for 4-bit ones.
    for name in ("saved", "ours"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        said = config["quantization_config"]
        left = said["skip_modules"] if "skip_modules" in said else said["llm_int8_skip_modules"]
        assert len(left) == kept + 1


def test_bitsandbytes_reads_ours_and_we_read_its_own(dense, saved, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )

    def decoded(layer):
        assert type(layer) is bitsandbytes.nn.Linear4bit
        weight = layer.weight
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)

    theirs, ours = load(saved, quantization_config=config), load(saved)
    for path, layer in layers(ours).items():
        assert torch.equal(decoded(theirs.get_submodule(path)), layer.dequantize())
    of_theirs = load(dense, quantization_config=config)
    of_theirs.save_pretrained(tmp_path)
    again = load(tmp_path, quantization_config=NF4Config())
    assert list(layers(again)) == PATHS
    for path, layer in layers(again).items():
        assert torch.equal(decoded(of_theirs.get_submodule(path)), layer.dequantize())
    assert_same(again, fourbit.from_pretrained(tmp_path))


@pytest.mark.parametrize("way", ["dequantize", "export"])
def test_dense_again_is_the_model_of_its_class(way, dense, saved, tmp_path):
    """With bitsandbytes' ``nn.Linear`` layers, what is saved of it would not load."""
    model = load(saved)
    expected = {path: layer.dequantize() for path, layer in layers(model).items()}
    if way == "dequantize":
        model.dequantize().save_pretrained(tmp_path / "dense")
        assert type(model.get_submodule(PATHS[0])) is Conv1D
    else:
        fourbit.export_merged(model, tmp_path / "dense")
    again = load(tmp_path / "dense")
    reference = load(dense)
    for name, tensor in reference.state_dict().items():
        path = name.removesuffix(".weight")
        wanted = expected[path].t() if path in expected else tensor
        assert torch.equal(again.state_dict()[name], wanted), name


@pytest.mark.parametrize("targets", ["c_attn", "all-linear"])
def test_peft(targets, saved, tmp_path):
    peft = pytest.importorskip("peft")
    names = targets if targets == "all-linear" else [targets]
    config = peft.LoraConfig(
        target_modules=names, init_lora_weights=False, fan_in_fan_out=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(saved), config).eval()
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(adapted) == (2 if targets == "c_attn" else 8)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    fourbit.export_merged(model, tmp_path / "merged")
    # The sum of weight and adapter is rounded once more, to float32.
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)
    again = peft.PeftModel.from_pretrained(load(saved), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    # On a dense `Conv1D` PEFT transposes what it adds.
    on_dense = peft.PeftModel.from_pretrained(load(saved).dequantize(), tmp_path / "adapter")
    torch.testing.assert_close(logits(on_dense.eval()), expected, rtol=1e-4, atol=1e-4)


def test_our_adapters(dense, saved, tmp_path):
    """LoftQ reads the dense weights, which are the transposes of ours."""
    model = load(saved)
    fourbit.add_lora(model, target_modules=["c_attn", "c_proj"], loftq_weights=dense,
                     init_lora_weights="loftq")  # fmt: skip
    expected = logits(model)
    fourbit.export_merged(model, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("only", [[], ["*.c_proj"]], ids=str)
def test_convert_keeps_them(only, dense, tmp_path):
    """It streams tensors as they are; what it wrote of `Conv1D` would be no 4-bit layer."""
    fourbit.convert(dense, tmp_path / "converted", only=only)
    model = fourbit.from_pretrained(tmp_path / "converted")
    assert not layers(model)
    assert sum(isinstance(module, Conv1D) for module in model.modules()) == 8
    with pytest.raises(CheckpointError, match="holds no quantized weight; "):
        load(tmp_path / "converted")
