"""What the quantizer for transformers refuses, in one sentence that names it."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit import CheckpointError, NF4Config
from lora_models import llama

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "dense"
    llama(torch.bfloat16, num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(dense):
    """A model of ours as transformers saves it: one file."""
    folder = dense.with_name("saved")
    load(dense, quantization_config=NF4Config()).save_pretrained(folder)
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def changed(folder, target, *, tensors=None, config=None, quantization=None):
    """A copy of a folder with some tensors replaced, or taken out where they are None."""
    shutil.copytree(folder, target)
    if tensors is not None:
        file = target / "model.safetensors"
        state = {**load_file(file), **tensors}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        save_file(state, file, metadata={"format": "pt"})
    path = target / "config.json"
    fields = json.loads(path.read_text()) | (config or {})
    if quantization is not None:
        fields["quantization_config"] = fields.get("quantization_config", {}) | quantization
    path.write_text(json.dumps(fields))
    return target


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codebook": "nf5"}, ValueError, "unknown codebook 'nf5'; use one of nf4, fp4, int4"),
        ({"codebook": 4}, TypeError, "a codebook is a name, an .* not a int"),
        ({"codebook": {0: 1.0}}, ValueError, "codebook"),
        ({"block_size": 100}, ValueError, "100"),
        ({"block_size": -64}, ValueError, "block_size is -64"),
        ({"block_size": "64"}, TypeError, "block_size is '64', which is no int"),
        ({"double_quant": "no"}, TypeError, "double_quant is 'no', which is no bool"),
        ({"skip": "lm_head"}, TypeError, "skip is 'lm_head'; give a list of strings"),
        ({"only": [1]}, TypeError, "only has 1; give a list of strings"),
        ({"load_in_8bit": True}, TypeError, "load_in_8bit"),
    ],
    ids=str,
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        NF4Config(**options)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"skip": ["q_prj"]}, r"skip.*q_prj.*it matches no tensor"),
        ({"only": ["*.layers.2.*"]}, r"only.*layers\.2.*it matches no tensor"),
        ({"skip": ["a[b"]}, r"skip.*a\[b"),
        ({"skip": ["*"]}, "LlamaForCausalLM has no linear layer to quantize"),
    ],
    ids=str,
)
def test_patterns(patterns, message, dense):
    with pytest.raises(ValueError, match=message):
        load(dense, quantization_config=NF4Config(**patterns))


def test_a_dict_with_an_unknown_codebook(dense):
    request = {"quant_method": "fourbit", "codebook": "nf5"}
    with pytest.raises(ValueError, match="unknown codebook 'nf5'"):
        load(dense, quantization_config=request)
    with pytest.raises(ValueError, match="'gptq' is not one that fourbit reads"):
        NF4Config.from_dict({"quant_method": "gptq"})


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_of_another_method(dense, tmp_path):
    other = changed(dense, tmp_path / "gptq", quantization={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantized already, by gptq, which fourbit does not read"):
        load(other, quantization_config=NF4Config())
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    other = changed(dense, tmp_path / "eight", quantization=eight)
    with pytest.raises(ValueError, match="by bitsandbytes in 8 bits, which fourbit does not read"):
        load(other, quantization_config=NF4Config())


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        ({"quant_method": "gptq"}, ValueError, r"config\.json: .*'gptq' is not one that fourbit"),
        ({"load_in_4bit": False, "load_in_8bit": True}, ValueError, "asks for 8 bits"),
        ({"fourbit_format_version": 99}, CheckpointError, "version 99.* install a newer fourbit"),
    ],
)
def test_folders_that_from_pretrained_does_not_read(quantization, error, message, saved, tmp_path):
    folder = changed(saved, tmp_path / "x", quantization={"load_in_4bit": False, **quantization})
    with pytest.raises(error, match=message):
        fourbit.from_pretrained(folder)


@pytest.mark.parametrize("version", [2, "1", 0])
def test_a_later_version_of_the_format(version, saved, tmp_path):
    later = changed(saved, tmp_path / "v", quantization={"fourbit_format_version": version})
    with pytest.raises(CheckpointError, match=f"format version {version}.*install a newer fourbit"):
        load(later)


def test_what_a_later_version_adds_is_passed_over(saved, tmp_path):
    model = load(changed(saved, tmp_path / "more", quantization={"colour": "blue"}))
    assert model.is_quantized


def test_a_folder_that_is_not_what_it_says(saved, dense, tmp_path):
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    liar = changed(dense, tmp_path / "liar", quantization=config)
    with pytest.raises(CheckpointError, match="holds no quantized weight; convert it again"):
        load(liar)
    with pytest.raises(ValueError, match="not from a state_dict"):
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=transformers.AutoConfig.from_pretrained(saved), state_dict={}
        )


@pytest.mark.parametrize(
    "part", [".absmax", ".nested_absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ""]
)
def test_a_missing_part_is_named(part, saved, tmp_path):
    broken = changed(saved, tmp_path / "broken", tensors={UP + part: None})
    with pytest.raises(CheckpointError, match=UP.replace(".", r"\.")):
        load(broken)


def test_a_part_of_the_wrong_size_is_named(saved, tmp_path):
    short = load_file(saved / "model.safetensors")[f"{UP}.absmax"][:-1].clone()
    broken = changed(saved, tmp_path / "broken", tensors={f"{UP}.absmax": short})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*absmax"):
        load(broken)


def test_a_weight_of_another_model_is_named(saved, tmp_path):
    other = changed(saved, tmp_path / "other", config={"intermediate_size": 128})
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight in .* is \[.*in the model"):
        load(other)


def test_a_model_without_any_of_the_weights_is_refused(dense, tmp_path):
    folder = tmp_path / "head"
    load(dense, quantization_config=NF4Config(only=["lm_head"])).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"a LlamaModel has none of its .*lm_head\.weight"):
        transformers.LlamaModel.from_pretrained(folder)


# --- on the fly -----------------------------------------------------------------------------------


def test_a_weight_that_is_no_number_is_named(dense, tmp_path):
    weight = load_file(dense / "model.safetensors")[UP]
    weight[0, 5] = float("nan")
    broken = changed(dense, tmp_path / "nan", tensors={UP: weight})
    with pytest.raises(fourbit.NonFiniteError, match=r"up_proj\.weight: element 5 is NaN"):
        load(broken, quantization_config=NF4Config())


def test_a_weight_that_is_not_there_is_named(dense, tmp_path):
    broken = changed(dense, tmp_path / "missing", tensors={UP: None})
    with pytest.raises(CheckpointError, match=f"does not hold {UP}"):
        load(broken, quantization_config=NF4Config())


def test_a_weight_of_another_shape_is_named(dense, tmp_path):
    broken = changed(dense, tmp_path / "shape", tensors={UP: torch.zeros(8, 8).bfloat16()})
    message = r"model.layers.1.mlp.up_proj.weight: it is \(8, 8\), and \(96, 64\) in the model"
    with pytest.raises(ValueError, match=message):
        load(broken, quantization_config=NF4Config())


def test_a_bias_that_is_not_there_is_what_transformers_makes_of_it(dense, tmp_path):
    bias = "model.layers.0.self_attn.q_proj.bias"
    model = load(
        changed(dense, tmp_path / "bias", tensors={bias: None}), quantization_config=NF4Config()
    )
    assert torch.equal(model.get_parameter(bias), torch.zeros(64, dtype=torch.bfloat16))


def test_layers_on_the_disk(dense, saved, tmp_path):
    places = {"": "cpu", "model.layers.1": "disk"}
    for folder in (dense, saved):
        with pytest.raises(ValueError, match="puts layers on the disk, which 4-bit layers do not"):
            load(
                folder,
                device_map=places,
                offload_folder=tmp_path,
                quantization_config=NF4Config(),
            )


# --- options of bitsandbytes ----------------------------------------------------------------------


def test_options_of_bitsandbytes_are_translated():
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    for source in (theirs, theirs.to_dict()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config = NF4Config.from_bitsandbytes(source)
        assert (config.codebook, config.block_size, config.double_quant) == ("nf4", 64, True)
        assert config.skip_modules == ["lm_head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, r"asks for 8 bits \(load_in_8bit\), and fourbit has 4"),
        ({}, "does not ask for 4 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type is 'nf3'"),
    ],
    ids=str,
)
def test_what_bitsandbytes_would_not_do_in_4_bits(options, message):
    with pytest.raises(ValueError, match=message):
        NF4Config.from_bitsandbytes(BitsAndBytesConfig(**options))


def test_options_of_8_bits_are_named_once(monkeypatch):
    monkeypatch.setattr("fourbit.integrations.transformers.config._said", set())
    theirs = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_threshold=4.0, llm_int8_has_fp16_weight=True
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        NF4Config.from_bitsandbytes(theirs)
        NF4Config.from_bitsandbytes(theirs)
    assert sorted(str(warning.message).split()[0] for warning in said) == [
        "llm_int8_has_fp16_weight",
        "llm_int8_threshold",
    ]
