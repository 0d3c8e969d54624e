"""Models and folders: `quantize_model`, `save`, `load`, `from_pretrained`, `export_merged`."""

import json
import shutil

import pytest
import torch
from torch import nn

import fourbit
from conftest import REPOSITORY
from fourbit import Linear4bit

transformers = pytest.importorskip("transformers")
BASE = REPOSITORY / "examples" / "base_model"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The shipped model, converted."""
    folder = tmp_path_factory.mktemp("converted") / "tiny-4bit"
    fourbit.convert(BASE, folder)
    return folder


@pytest.fixture(scope="module")
def tokens():
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    text = "The import statement combines two operations; it searches for the named module."
    return tokenizer(text, return_tensors="pt").input_ids


def dense_model():
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def network():
    torch.manual_seed(0)
    shared = nn.Linear(24, 24)
    return nn.ModuleDict(
        {
            "first": nn.Linear(16, 24),
            "once": shared,
            "again": shared,
            "norm": nn.BatchNorm1d(24),
            "tiny": nn.Linear(24, 2),
            "head": nn.Linear(24, 40),
        }
    )


def test_memory_and_disk_quantize_alike(converted, tokens, tmp_path):
    from_folder = fourbit.from_pretrained(converted)
    in_memory = fourbit.quantize_model(dense_model())
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(tensor, from_folder.state_dict()[name]), name
    assert torch.equal(logits(from_folder, tokens), logits(in_memory, tokens))
    fourbit.save(in_memory, tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_text() == (
        converted / "config.json"
    ).read_text()
    assert fourbit.verify(tmp_path / "saved").checksums
    again = fourbit.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, tokens), logits(in_memory, tokens))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(default, tmp_path):
    model = fourbit.quantize_model(network())
    fourbit.save(model, tmp_path / "plain")
    torch.set_default_dtype(default)
    try:
        other = fourbit.quantize_model(network().float())
        fourbit.load(other, tmp_path / "plain")
        fourbit.save(other, tmp_path / "other")
    finally:
        torch.set_default_dtype(torch.float32)
    for plain in (tmp_path / "plain").glob("*.safetensors"):
        assert plain.read_bytes() == (tmp_path / "other" / plain.name).read_bytes()


def test_what_is_quantized_and_what_is_not(converted):
    model = fourbit.from_pretrained(converted)
    assert not model.training
    assert model.config.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    quantized = [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    assert len(quantized) == 7 * model.config.num_hidden_layers
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_it_generates_with_the_same_rotary_embeddings(converted, tokens):
    model = fourbit.from_pretrained(converted, dtype=torch.float32)
    reference = fourbit.quantize_model(dense_model()).float()
    assert torch.equal(logits(model, tokens), logits(reference, tokens))
    output = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert output.shape[1] > tokens.shape[1]


def test_any_module_round_trips(tmp_path):
    model = network()
    model["norm"].running_mean.fill_(0.5)
    fourbit.quantize_model(model, block_size=32, double_quant=False)
    assert isinstance(model["first"], Linear4bit)
    assert type(model["head"]) is nn.Linear
    assert model["once"] is model["again"]
    fourbit.save(model, tmp_path / "net")
    twin = fourbit.load(network(), tmp_path / "net")
    on_meta = fourbit.load(network().to("meta"), tmp_path / "net")
    for other in (twin, on_meta):
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert other["once"] is other["again"]
    x = torch.randn(3, 16)
    assert torch.equal(twin["first"](x), model["first"](x))


@pytest.mark.parametrize("codebook", ["int4", {0: -1.0, 1: -0.4, 2: 0.0, 3: 0.4, 4: 1.0}])
def test_codebooks_that_only_we_know_round_trip(codebook, tmp_path):
    model = fourbit.quantize_model(network(), codebook=codebook)
    fourbit.save(model, tmp_path / "net")
    twin = fourbit.load(network(), tmp_path / "net")
    assert twin["first"].codebook == model["first"].codebook
    assert torch.equal(twin["first"].dequantize(), model["first"].dequantize())


def test_patterns_choose_the_layers():
    only = fourbit.quantize_model(network(), only=["he*"])
    assert [n for n, m in only.named_modules() if isinstance(m, Linear4bit)] == ["head"]
    skip = fourbit.quantize_model(network(), skip=["first"])
    assert type(skip["first"]) is nn.Linear
    with pytest.raises(ValueError, match=r'"frist".*matches no tensor'):
        fourbit.quantize_model(network(), skip=["frist"])
    with pytest.raises(ValueError, match="no linear layer to quantize"):
        fourbit.quantize_model(nn.Sequential(nn.ReLU()))
    model = network()
    model["first"].weight.data[0, 3] = float("inf")
    with pytest.raises(fourbit.NonFiniteError, match="layer first: element 3 is inf"):
        fourbit.quantize_model(model)


def test_save_refuses_what_would_be_lost(tmp_path, converted):
    model = fourbit.from_pretrained(converted)
    with pytest.raises(FileExistsError):
        fourbit.save(model, converted)
    fourbit.add_lora(model, r=2)
    with pytest.raises(ValueError, match="save_adapter"):
        fourbit.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match="meta device"):
        fourbit.save(network().to("meta"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_does_not_fit_is_refused_before_the_model_is_touched(converted, tmp_path):
    config = transformers.LlamaConfig.from_pretrained(BASE)
    config.num_hidden_layers = 3
    smaller = transformers.LlamaForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    with pytest.raises(fourbit.CheckpointError, match=r"no layer model\.layers\.3"):
        fourbit.load(smaller, converted)
    assert all(torch.equal(smaller.state_dict()[name], before[name]) for name in before)
    config.num_hidden_layers = 5
    with pytest.raises(fourbit.CheckpointError, match=r"it has no tensor model\.layers\.4\."):
        fourbit.load(transformers.LlamaForCausalLM(config), converted)
    config.num_hidden_layers, config.intermediate_size = 4, 512
    with pytest.raises(fourbit.CheckpointError, match="mlp"):
        fourbit.load(transformers.LlamaForCausalLM(config), converted)
    with pytest.raises(fourbit.CheckpointError, match="quantized in the model"):
        fourbit.load(fourbit.quantize_model(dense_model()), BASE)


def test_from_pretrained_names_what_is_wrong(converted, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fourbit.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fourbit.from_pretrained(tmp_path)
    with pytest.raises(fourbit.CheckpointError, match="not quantized"):
        fourbit.from_pretrained(BASE)


def damage(folder, kind):
    """Damage one thing; returns what the error must name."""
    shard = next(folder.glob("*.safetensors"))
    if kind == "missing shard":
        shard.unlink()
    elif kind == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif kind == "flipped bit":
        data = bytearray(shard.read_bytes())
        data[-100] ^= 1
        shard.write_bytes(data)
    elif kind == "mis-indexed":
        index = folder / "model.safetensors.index.json"
        fields = json.loads(index.read_text())
        name = next(iter(fields["weight_map"]))
        fields["weight_map"][name + "x"] = fields["weight_map"].pop(name)
        index.write_text(json.dumps(fields))
    return "index" if kind == "mis-indexed" else shard.name


@pytest.mark.parametrize("kind", ["missing shard", "truncated shard", "flipped bit", "mis-indexed"])
@pytest.mark.parametrize("reader", ["verify", "load"])
def test_damage_is_refused_by_verify_and_by_load(converted, tmp_path, kind, reader):
    folder = tmp_path / "damaged"
    shutil.copytree(converted, folder)
    culprit = damage(folder, kind)
    with pytest.raises((fourbit.CheckpointError, FileNotFoundError), match=culprit) as error:
        fourbit.verify(folder) if reader == "verify" else fourbit.from_pretrained(folder)
    if kind == "flipped bit":
        assert "tensor" in str(error.value)


def test_export_is_the_dequantized_model(converted, tokens, tmp_path):
    model = fourbit.from_pretrained(converted)
    fourbit.export_merged(model, tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(plain, tokens), logits(model, tokens))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == json.loads((BASE / "config.json").read_text())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (BASE / name).read_bytes()
    # It is a checkpoint like any other: it converts to the same codes, NF4 being idempotent.
    assert len(fourbit.convert(tmp_path / "plain", tmp_path / "again").quantized) == 28


@pytest.mark.parametrize("use_dora", [False, True])
def test_export_adds_the_adapter_in_float32(converted, tokens, tmp_path, use_dora):
    model = fourbit.from_pretrained(converted, dtype=torch.float32)
    fourbit.add_lora(
        model, r=4, lora_dropout=0.0, use_dora=use_dora, init_lora_weights=False, seed=3
    )
    adapted = logits(model.eval(), tokens)
    fourbit.export_merged(model, tmp_path / "merged", base=BASE, dtype=torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    # Two orders of the same float32 sums.
    assert (logits(merged, tokens) - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    assert not torch.allclose(adapted, logits(fourbit.from_pretrained(converted), tokens).float())
    assert torch.equal(logits(model, tokens), adapted), "the model is unchanged"
    bf16 = tmp_path / "merged-16"
    fourbit.export_merged(model, bf16, base=BASE, dtype=torch.bfloat16)
    assert json.loads((bf16 / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(FileExistsError):
        fourbit.export_merged(model, bf16)
    with pytest.raises(ValueError, match="int8"):
        fourbit.export_merged(model, tmp_path / "y", dtype=torch.int8)


@pytest.mark.parametrize("trained", ["adapter on the head", "head", "embeddings"])
def test_export_of_a_model_whose_head_was_tied(converted, tokens, tmp_path, trained):
    model = fourbit.from_pretrained(converted, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    saved = {"head": ["lm_head"], "embeddings": ["embed_tokens"]}.get(trained)
    targets = ["q_proj", "lm_head"] if saved is None else ["q_proj"]
    fourbit.add_lora(
        model,
        r=4,
        target_modules=targets,
        modules_to_save=saved,
        lora_dropout=0.0,
        init_lora_weights=False,
        seed=1,
    )
    if saved is not None:
        twin = model.lm_head if trained == "head" else model.model.embed_tokens
        twin.weight.data *= 1.1
    adapted = logits(model.eval(), tokens)
    fourbit.export_merged(model, tmp_path / "merged", dtype=torch.float32)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, tokens) - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    if saved is None:
        # Merged for good, a head is no longer what a tied configuration says.
        fourbit.merge(model)
        fourbit.save(fourbit.remove_lora(model), tmp_path / "saved")
        again = fourbit.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_export_of_a_model_with_a_larger_vocabulary(converted, tokens, tmp_path):
    model = fourbit.from_pretrained(converted)
    size = model.config.vocab_size + 8
    model.resize_token_embeddings(size, mean_resizing=False)
    fourbit.export_merged(model, tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.vocab_size == size
    assert torch.equal(logits(plain, tokens), logits(model, tokens))


def test_export_refuses_what_is_not_finite(tmp_path):
    model = fourbit.add_lora(fourbit.quantize_model(network()), r=2, init_lora_weights=False)
    model["once"].lora_B.weight.data[3] = 1e6
    with pytest.raises(fourbit.NonFiniteError, match=r"once\.weight.*torch\.float16"):
        fourbit.export_merged(model, tmp_path / "net", dtype=torch.float16)
    assert not list(tmp_path.glob("net/*.safetensors*"))
    model["once"].lora_B.weight.data[3] = float("nan")
    with pytest.raises(fourbit.NonFiniteError, match=r"once\.weight"):
        fourbit.export_merged(model, tmp_path / "net")


def test_buffers_that_no_file_holds_are_missed(converted):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(BASE))
    with pytest.raises(ValueError, match=r"rotary_emb\.inv_freq is on the meta device"):
        fourbit.load(model, converted)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_interrupted_save_leaves_nothing_that_loads(tmp_path, monkeypatch):
    model = fourbit.quantize_model(network())
    calls = []

    def interrupted(part):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.Tensor.contiguous(part)

    monkeypatch.setattr(torch.Tensor, "cpu", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fourbit.save(model, tmp_path / "net")
    monkeypatch.undo()
    assert not list(tmp_path.glob("net/*.safetensors*"))
    fourbit.save(model, tmp_path / "net")
    fourbit.load(network(), tmp_path / "net")
