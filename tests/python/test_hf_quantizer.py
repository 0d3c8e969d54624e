"""Models of transformers in 4 bits through transformers' own ``from_pretrained``."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fourbit
from conftest import REPOSITORY
from fourbit import Linear4bit, NF4Config
from lora_models import llama, logits

transformers = pytest.importorskip("transformers")
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

MAP = {0: -1.0, 1: -0.4, 2: 0.0, 3: 0.4, 4: 1.0}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A random Llama of two blocks in bfloat16."""
    folder = tmp_path_factory.mktemp("hf") / "dense"
    llama(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(dense):
    folder = dense.with_name("converted")
    fourbit.convert(dense, folder)
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def kinds(model):
    """The kind of each linear layer, by path."""
    return {p: type(m) for p, m in model.named_modules() if isinstance(m, nn.Linear)}


def assert_same(first, second):
    """That two models hold the same bytes under the same names."""
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    for path, layer in first.named_modules():
        if isinstance(layer, Linear4bit):
            twin = second.get_submodule(path)
            assert repr(layer) == repr(twin)
            assert layer.weight_dtype == twin.weight_dtype
            assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")


def stored(folder):
    """All tensors of a folder."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def assert_same_files(first, second):
    one, other = stored(first), stored(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double_quant": False, "codebook": "fp4"},
        {"codebook": "int4", "block_size": 128},
        {"codebook": MAP, "skip": ["*.{q,k}_proj"]},
        {"only": ["*.layers.1.mlp.*", "lm_head"]},
    ],
    ids=str,
)
def test_bytes_are_those_of_convert_and_of_quantize_model(options, dense, tmp_path):
    model = load(dense, quantization_config=NF4Config(**options), dtype=torch.bfloat16)
    fourbit.convert(dense, tmp_path / "converted", **options)
    assert_same(model, fourbit.quantize_model(load(dense, dtype=torch.bfloat16), **options))
    pre_quantized = load(tmp_path / "converted")
    assert_same(model, pre_quantized)
    assert_same(model, fourbit.from_pretrained(tmp_path / "converted"))
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", tmp_path / "converted")
    # Both say the same of it, and so does the model that was loaded from it.
    said = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "saved", tmp_path / "converted")
    ]
    for fields in said:
        key = "skip_modules" if "skip_modules" in fields else "llm_int8_skip_modules"
        # By name and shape alone, an embedding that `only` does not name might be a linear layer.
        fields[key] = set(fields[key]) - {"model.embed_tokens"}
    assert said[0] == said[1]
    assert pre_quantized.config.quantization_config == model.config.quantization_config
    assert torch.equal(logits(model), logits(pre_quantized))


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_saved_model_is_the_same_when_loaded_again(double_quant, dense, tmp_path):
    model = load(dense, quantization_config=NF4Config(double_quant=double_quant))
    before = logits(model)
    for generation in ("first", "second"):
        again = tmp_path / generation
        model.save_pretrained(again, max_shard_size="20KB")
        assert len(list(again.glob("model-*.safetensors"))) > 3
        twin = load(again)
        assert_same(twin, model)
        assert torch.equal(logits(twin), before)
        assert model.config.to_diff_dict() == twin.config.to_diff_dict()
        model = twin
    assert_same(fourbit.from_pretrained(tmp_path / "second"), model)
    assert fourbit.verify(tmp_path / "second").quantized == 14


def test_what_is_left_alone_is_as_the_dense_model_has_it(dense):
    plain = load(dense, dtype=torch.float32)
    model = load(dense, quantization_config=NF4Config(), dtype=torch.float32)
    assert {kind for path, kind in kinds(model).items() if path != "lm_head"} == {Linear4bit}
    assert type(model.lm_head) is nn.Linear
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            expected = plain.get_parameter(name)
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected), name
            assert parameter.requires_grad == expected.requires_grad
    assert not model.training


def test_plain_weights_of_a_folder_take_the_dtype_asked_for(converted):
    for dtype in (torch.float16, torch.float32):
        model = load(converted, dtype=dtype)
        floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        assert floats == {dtype}
        assert logits(model).dtype == dtype
        # What it was quantized from is a fact of the folder.
        assert model.model.layers[0].mlp.up_proj.weight_dtype == torch.bfloat16


def test_tied_weights_stay_tied(tmp_path):
    llama(torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    # `skip` says nothing of the head, and `only` names it: it is the embedding either way.
    for options in ({"skip": ["*.q_proj"]}, {"only": ["*"]}):
        model = load(tmp_path / "dense", quantization_config=NF4Config(**options))
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path / str(options))
        twin = load(tmp_path / str(options))
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
        assert_same(twin, model)


def test_a_base_model_loads_from_a_folder_with_a_head(converted):
    base = AutoModel.from_pretrained(converted)
    whole = load(converted)
    assert type(base.layers[0].self_attn.q_proj) is Linear4bit
    assert_same(base, whole.model)


def test_dequantize_gives_the_model_before_but_for_the_rounding(converted, tmp_path):
    model = load(converted)
    expected = {
        path: layer.dequantize(torch.float32)
        for path, layer in model.named_modules()
        if isinstance(layer, Linear4bit)
    }
    dense = copy.deepcopy(model).dequantize(dtype=torch.float32)
    assert set(kinds(dense).values()) == {nn.Linear}
    for path, weight in expected.items():
        layer = dense.get_submodule(path)
        assert torch.equal(layer.weight, weight)
        assert layer.bias is None or layer.bias.dtype == torch.float32
    assert not hasattr(dense.config, "quantization_config")
    assert not dense.is_quantized
    dense = model.dequantize()
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    assert_same(load(tmp_path / "dense"), dense)


def test_casts_copies_and_moves_leave_the_bytes(converted):
    model = load(converted)
    for other in (
        copy.deepcopy(model),
        copy.deepcopy(model).to(torch.float16),
        load(converted, device_map="auto"),
        load(converted, device_map={"": "cpu"}),
        load(converted, device_map="cpu"),
    ):
        for path, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                twin = other.get_submodule(path)
                assert torch.equal(twin.weight, layer.weight)
                assert torch.equal(twin.weight_absmax, layer.weight_absmax)
        assert logits(other).isfinite().all()
    assert_same(load(converted, device_map="auto"), model)


def test_memory_is_counted_as_it_is(converted, dense):
    """The estimates behind ``device_map="auto"`` and the footprint count packed bytes."""
    from transformers.integrations.accelerate import compute_module_sizes

    model = load(converted)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model.get_memory_footprint(return_buffers=False) == size
    from fourbit.integrations.transformers.quantizer import FourbitQuantizer

    for source, pre_quantized in ((converted, True), (dense, False)):
        config = transformers.AutoConfig.from_pretrained(source)
        quantizer = FourbitQuantizer(NF4Config(), pre_quantized=pre_quantized)
        with torch.device("meta"):
            empty = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
            files = [str(source / "model.safetensors")]
            if not (source / "model.safetensors").is_file():
                files = [str(path) for path in source.glob("*.safetensors")]
            quantizer.preprocess_model(empty, device_map=None, checkpoint_files=files)
        sizes, _ = compute_module_sizes(empty, quantizer)
        buffers = sum(b.numel() * b.element_size() for b in empty.buffers())
        assert sizes[""] - buffers == size


def test_hooks_that_keep_layers_elsewhere_leave_the_numbers(converted):
    """What accelerate does to layers that a device map puts elsewhere than they run."""
    from accelerate import cpu_offload

    model = load(converted)
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"self_attn.q_proj.weight is offloaded"):
        model.hf_quantizer.get_state_dict_and_metadata(model)


def test_what_trainer_asks(converted, dense):
    model = load(dense, quantization_config=NF4Config())
    for quantizer in (model.hf_quantizer, load(converted).hf_quantizer):
        assert quantizer.is_trainable
        assert quantizer.is_compileable
        assert quantizer.is_serializable()
    # It refuses a model of which nothing would be trained, and takes one with adapters of ours.
    assert not model.hf_quantizer.is_qat_trainable
    fourbit.add_lora(model, r=4)
    assert model.hf_quantizer.is_qat_trainable
    assert copy.deepcopy(model).hf_quantizer.is_qat_trainable


def test_a_config_is_not_changed_by_what_is_loaded_with_it(dense):
    config = NF4Config(skip=["*.q_proj"])
    before = config.to_dict()
    model = load(dense, quantization_config=config)
    assert config.to_dict() == before
    assert NF4Config.from_dict(before) == config
    assert model.config.quantization_config.skip_modules == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    # A dict does as well, as in the arguments of a trainer.
    assert_same(load(dense, quantization_config=before), model)


# --- bitsandbytes' layout -------------------------------------------------------------------------


def as_if_theirs(folder, target, storage=None):
    """A folder of ours as bitsandbytes writes them, with packed codes of another dtype."""
    target.mkdir()
    tensors = stored(folder)
    if storage is not None:
        packed = [name for name in tensors if f"{name}.absmax" in tensors]
        for name in packed:
            tensors[name] = tensors[name].view(-1).view(storage)[:, None]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    del quantization["fourbit_format_version"]
    if storage is not None:
        quantization["bnb_4bit_quant_storage"] = str(storage).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("storage", [None, torch.bfloat16], ids=str)
def test_folders_of_bitsandbytes(storage, converted, tmp_path, monkeypatch):
    as_if_theirs(converted, tmp_path / "theirs", storage)
    model = load(tmp_path / "theirs", quantization_config=NF4Config())
    assert_same(model, load(converted))
    # Nobody else can read it where bitsandbytes is not installed.
    monkeypatch.setattr("fourbit.integrations.transformers.registration.find_spec", lambda _: None)
    assert_same(load(tmp_path / "theirs"), model)
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", converted)


def test_bitsandbytes_reads_what_is_saved(plain_folder, tmp_path):
    """As it does for everybody who has not imported fourbit."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load(plain_folder, quantization_config=NF4Config(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    theirs = load(tmp_path / "saved", quantization_config=config, dtype=torch.float32)
    for path, ours in model.named_modules():
        if isinstance(ours, Linear4bit):
            layer = theirs.get_submodule(path)
            assert type(layer) is bitsandbytes.nn.Linear4bit
            decoded = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            )
            assert torch.equal(decoded, ours.dequantize())
    # Their training path multiplies with the weight as it is stored, rounded to bfloat16, and so
    # rounds inputs and outputs of each layer to 8 bits of mantissa.
    theirs.train()
    expected = logits(model)
    assert (logits(theirs) - expected).norm() < 2**-7 * expected.norm()


# --- how transformers comes to know of it ---------------------------------------------------------


def test_either_library_may_be_imported_first(dense, tmp_path):
    """Here fourbit was; in a process of its own, it comes second, or is never asked."""
    fourbit.convert(dense, tmp_path / "int4", codebook="int4")
    code = textwrap.dedent("""
        import sys
        from transformers import AutoModelForCausalLM, LlamaConfig
        import transformers.quantizers.auto
        import fourbit
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        assert type(model.model.layers[0].mlp.up_proj) is fourbit.Linear4bit
        from fourbit.integrations.transformers.registration import register, unregister
        register()
        unregister()
        mapping = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
        merge = transformers.quantizers.auto.AutoHfQuantizer.merge_quantization_configs
        assert "fourbit" not in mapping and not hasattr(merge, "_fourbit_original")
        assert merge.__func__.__module__ == "transformers.quantizers.auto"
    """)
    command = [sys.executable, "-c", code, str(tmp_path / "int4")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert type(load(tmp_path / "int4").lm_head) is nn.Linear


def test_the_import_of_transformers_is_as_it_was():
    from transformers.quantizers import auto

    assert type(auto.__spec__.loader).__module__ != "fourbit.integrations.on_import"
    assert auto.__loader__ is auto.__spec__.loader


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux")
def test_a_model_that_was_quantized_does_not_hold_on_to_its_file(dense):
    model = load(dense, quantization_config=NF4Config())
    assert model.model.embed_tokens.weight.is_floating_point()
    assert str(dense) not in Path("/proc/self/maps").read_text()


@pytest.mark.slow
def test_memory_is_that_of_the_4_bit_model_and_one_tensor(dense, tmp_path):
    """Of a checkpoint of half a gigabyte; the pages of its mapped files are not the process's."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
    )
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    tensors = {name: torch.randn(t.shape).mul_(0.02).bfloat16() for name, t in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    script = REPOSITORY / "tests" / "python" / "load_child.py"
    command = [sys.executable, str(script), str(dense), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, model, largest = map(int, done.stdout.split())
    dense_bytes = sum(2 * t.numel() for t in tensors.values())
    assert dense_bytes > 500 << 20
    # Above: a tensor, its parts and the allocator's slack. Below: what the small model left free.
    assert 0.9 * model < grown < model + 2 * largest + (16 << 20) < dense_bytes / 2
