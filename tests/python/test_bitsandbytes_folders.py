"""transformers with bitsandbytes reads our folders, and we read theirs: equal logits.

bitsandbytes runs in a process of its own, without fourbit in it.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from conftest import REPOSITORY

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
BASE = REPOSITORY / "examples" / "base_model"

THEIR_SIDE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

task, source, target, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
tokens = torch.arange(3, 51).reshape(2, 24)
if task == "write":
    storage = getattr(torch, options.pop("storage"))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage, **options
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32
    )
    # Before the first forward pass: in eval mode that one reorders the scales.
    model.save_pretrained(target)
else:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, options["dtype"]))
layers = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
assert layers, "bitsandbytes is not in use"
assert "fourbit" not in sys.modules
model.train()  # its training path dequantizes the weight as stored
with torch.no_grad():
    torch.save(model(tokens).logits, target + "/logits.pt" if task == "write" else target)
print(len(layers))
"""


def theirs(task, source, target, **options):
    command = [sys.executable, "-c", THEIR_SIDE, task, str(source), str(target)]
    done = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.splitlines()[-1])


@torch.no_grad()
def our_logits(folder, dtype):
    model = fourbit.from_pretrained(folder, dtype=dtype)
    return model(torch.arange(3, 51).reshape(2, 24)).logits


# bitsandbytes computes in bfloat16 even where float32 is asked for, so each of the 28 layers
# rounds its inputs, weights and outputs to 8 bits of mantissa.
def assert_equal_within_bf16(ours, others):
    difference = (ours.float() - others.float()).norm() / ours.float().norm()
    assert difference < 2**-7, difference


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_they_read_ours(codebook, double_quant, tmp_path):
    fourbit.convert(BASE, tmp_path / "ours", codebook=codebook, double_quant=double_quant)
    count = theirs("read", tmp_path / "ours", tmp_path / "logits.pt", dtype="bfloat16")
    assert count == 28
    ours = our_logits(tmp_path / "ours", torch.bfloat16)
    assert_equal_within_bf16(ours, torch.load(tmp_path / "logits.pt", weights_only=True))


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_use_double_quant": False, "storage": "uint8"},
        {"bnb_4bit_use_double_quant": True, "storage": "uint8"},
        {"bnb_4bit_use_double_quant": False, "storage": "bfloat16"},
        {"bnb_4bit_use_double_quant": True, "storage": "bfloat16", "bnb_4bit_quant_type": "fp4"},
    ],
    ids=str,
)
def test_we_read_theirs(options, tmp_path):
    options = {"bnb_4bit_quant_type": "nf4", **options}
    folder = tmp_path / "theirs"
    assert theirs("write", BASE, folder, **options) == 28
    expected = torch.load(folder / "logits.pt", weights_only=True)
    (folder / "logits.pt").unlink()
    assert_equal_within_bf16(our_logits(folder, torch.float32), expected)
    model = fourbit.from_pretrained(folder)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.codebook.name == options["bnb_4bit_quant_type"]
    assert layer.double_quant == options["bnb_4bit_use_double_quant"]
    report = fourbit.verify(folder)
    assert report.quantized == 28
    assert not report.checksums


EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_models_of_experts_load_on_both_sides(family, tmp_path):
    """Experts that are left out: they are stored one by one, and computed with as one tensor.

    Were they quantized, only we could load the folder.
    """
    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **EXPERTS[family],
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    report = fourbit.convert(tmp_path / "source", tmp_path / "ours", skip="*experts*")
    kept = [tensor for tensor in report.kept if tensor.reason == "named by skip"]
    assert len(kept) == 2 * 4 * 3
    assert len(report.quantized) == 2 * 4
    assert theirs("read", tmp_path / "ours", tmp_path / "logits.pt", dtype="bfloat16") == 8
    loaded = fourbit.from_pretrained(tmp_path / "ours")
    experts = [(n, p) for n, p in model.named_parameters() if "experts" in n]
    assert len(experts) == 2 * 2
    for name, expected in experts:
        assert torch.equal(loaded.get_parameter(name), expected)
    ours = our_logits(tmp_path / "ours", torch.bfloat16)
    assert_equal_within_bf16(ours, torch.load(tmp_path / "logits.pt", weights_only=True))
    # The list of what is left alone names all experts of a layer at once.
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert len(config["quantization_config"]["llm_int8_skip_modules"]) == 2 * 2 + 1


def test_a_missing_expert_is_named(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **EXPERTS["Qwen3Moe"],
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    for skip in ("*experts*", ()):
        folder = tmp_path / f"skip {skip}"
        fourbit.convert(tmp_path / "source", folder, skip=skip)
        with pytest.raises(fourbit.CheckpointError, match=r"mlp\.experts\.gate_up_proj"):
            fourbit.from_pretrained(folder)
