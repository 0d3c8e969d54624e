"""Mixtures of experts in 4 bits through transformers' own ``from_pretrained``."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit import CheckpointError, Linear4bit, NF4Config
from fourbit.experts import experts_layouts, experts_modules, experts_weight
from moe_models import SETTINGS, logits, moe

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM  # noqa: E402

# Tensors of a checkpoint for each of the two weights of a layer's experts.
GROUPS = {"Mixtral": (8, 4), "Qwen3Moe": (8, 4), "GptOss": (1, 1)}


@pytest.fixture(scope="module", params=SETTINGS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def dense(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family) / "dense"
    moe(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(dense):
    folder = dense.with_name("converted")
    fourbit.convert(dense, folder)
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def tensors_of(folder):
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def assert_same(first, second):
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    layouts = {path: experts_layouts(m) for path, m in experts_modules(first).items()}
    assert layouts == {path: experts_layouts(m) for path, m in experts_modules(second).items()}


def assert_same_files(first, second):
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_bytes_are_those_of_convert(family, dense, converted, tmp_path):
    model = load(dense, quantization_config=NF4Config())
    modules = experts_modules(model)
    assert len(modules) == (1 if family == "Qwen3Moe" else 2)
    for module in modules.values():
        layouts = experts_layouts(module)
        assert (layouts["gate_up_proj"].groups, layouts["down_proj"].groups) == GROUPS[family]
    assert_same(model, fourbit.from_pretrained(converted))
    assert_same(model, load(converted))
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", converted)
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    there = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "fourbit"
    assert said.keys() == there.keys()
    # Routers are matrices in files, and no linear layers in the model.
    assert set(said.pop("skip_modules")) == {"lm_head"} <= set(there.pop("skip_modules"))
    assert said == there


def test_matrices_are_read_and_quantized_one_by_one(family, dense, monkeypatch):
    """Where the checkpoint holds them so; never is the whole weight there."""
    from fourbit.integrations.transformers import rooms

    shapes = []

    def recording(weight, **options):
        shapes.append(tuple(weight.shape))
        return fourbit.quantize(weight, **options)

    monkeypatch.setattr(rooms, "quantize", recording)
    model = load(dense, quantization_config=NF4Config())
    layouts = [x for m in experts_modules(model).values() for x in experts_layouts(m).values()]
    matrices = 0 if family == "GptOss" else sum(layout.groups for layout in layouts)
    linear = sum(isinstance(module, Linear4bit) for module in model.modules())
    assert len(shapes) == linear + matrices
    assert {len(shape) for shape in shapes} == {2}


def test_numbers_are_those_of_the_dequantized_model(converted):
    model = load(converted, dtype=torch.float32)
    ours = logits(model)
    dense = copy.deepcopy(model).dequantize()
    assert not experts_modules(dense)
    assert not any(isinstance(module, Linear4bit) for module in dense.modules())
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
    assert dense.config._experts_implementation != "fourbit"
    # The same numbers are multiplied, and added in another order.
    assert torch.allclose(ours, logits(dense), rtol=0, atol=1e-4 * ours.abs().max().item())
    for path, module in experts_modules(model).items():
        for name in experts_layouts(module):
            weight = experts_weight(module, name).dequantize(torch.float32)
            assert torch.equal(dense.get_submodule(path).get_parameter(name), weight)


def test_what_is_saved_again_is_the_same(dense, tmp_path):
    model = load(dense, quantization_config=NF4Config(double_quant=False, codebook="int4"))
    before = logits(model)
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation, max_shard_size="30KB")
        twin = load(tmp_path / generation)
        assert_same(twin, model)
        assert torch.equal(logits(twin), before)
        model = twin
    assert_same_files(tmp_path / "first", tmp_path / "second")
    dequantized = model.dequantize()
    dequantized.save_pretrained(tmp_path / "dense")
    assert set(tensors_of(tmp_path / "dense")) == set(tensors_of(dense))
    assert_same(load(tmp_path / "dense"), dequantized)


def test_experts_that_are_skipped_stay(family, dense, tmp_path):
    for pattern in ("*experts*", "*.experts.gate_up_proj"):
        model = load(dense, quantization_config=NF4Config(skip=[pattern]))
        left = [n for m in experts_modules(model).values() for n in experts_layouts(m)]
        assert set(left) == (set() if pattern == "*experts*" else {"down_proj"})
        model.save_pretrained(tmp_path / str(len(left)))
        assert_same(load(tmp_path / str(len(left))), model)
    only = load(dense, quantization_config=NF4Config(only=["*experts*"]))
    assert len(experts_modules(only)) == (1 if family == "Qwen3Moe" else 2)
    assert not any(isinstance(module, Linear4bit) for module in only.modules())


def test_blocks_that_would_cross_matrices(dense):
    """A block of 4096 is larger than a matrix: experts stay, as `fourbit.convert` leaves them."""
    with pytest.warns(UserWarning, match="experts stay in 16 bits: .*not whole blocks of 4096"):
        model = load(dense, quantization_config=NF4Config(block_size=4096))
    assert all(
        layout.shape[1] * layout.shape[2] % 4096 == 0
        for module in experts_modules(model).values()
        for layout in experts_layouts(module).values()
    )


def test_a_matrix_that_is_no_number_is_named(family, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "nan")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "experts" in n and tensors[n].ndim > 1 and "bias" not in n)
    tensors[name].view(-1)[7] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(fourbit.NonFiniteError, match=f"{name}: element 7 is"):
        load(tmp_path / "nan", quantization_config=NF4Config())


def test_a_missing_part_of_an_expert_is_named(family, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "broken")
    (file,) = (tmp_path / "broken").glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if "experts" in n and n.endswith(".nested_absmax"))
    del tensors[name]
    for other in (tmp_path / "broken").glob("*.json"):
        if other.name != "config.json":
            other.unlink()
    file.unlink()
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.removesuffix(".nested_absmax")):
        load(tmp_path / "broken")


def test_bitsandbytes_config_after_the_takeover(family, dense, converted, tmp_path):
    """Experts too are in 4 bits then, and what is saved says that it is ours."""
    fourbit.replace_bitsandbytes()
    try:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        model = load(dense, quantization_config=config, device_map="cpu")
        assert_same(model, load(converted))
        model.save_pretrained(tmp_path / "saved")
        assert_same(load(tmp_path / "saved"), model)
    finally:
        fourbit.restore_bitsandbytes()
    assert_same(load(tmp_path / "saved"), model)
