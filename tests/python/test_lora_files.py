"""Adapter files: to and from PEFT, and everything that must not load."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fourbit import CheckpointError, NonFiniteError
from fourbit.lora import add_lora, load_adapter, lora_modules, merge, remove_lora, save_adapter
from fourbit.lora import files as files_module
from lora_models import llama, logits, quantize_linears, relative, shake, tokens

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}},
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.1\..*(q|up)_proj"},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def adapted(dtype: torch.dtype = torch.float32, *, quantized: bool = False, **options: Any) -> Any:
    model = llama(dtype)
    if quantized:
        quantize_linears(model)
    add_lora(model, **{"r": 4, "lora_dropout": 0.1, **options})
    shake(model)
    with torch.no_grad():
        if "modules_to_save" in options:
            model.lm_head.weight.mul_(1.5)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_ours(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    ours = adapted(dtype, **VARIANTS[variant])
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(dtype), tmp_path).eval()
    # float32 in another order; in bfloat16 both round the same sums of the same numbers.
    assert relative(logits(ours), logits(theirs)) < 1e-5
    assert type(theirs) is peft.PeftModelForCausalLM


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_loads_peft(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    options = {"target_modules": "all-linear", **VARIANTS[variant]}
    theirs = peft.get_peft_model(
        llama(dtype),
        peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, task_type="CAUSAL_LM", **options),
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(llama(dtype), tmp_path)
    # The adapter's part alone: the base's output would hide it.
    base = logits(llama(dtype)).double()
    assert relative(logits(ours) - base, logits(theirs) - base) < 1e-3
    assert relative(logits(theirs), base) > 0.01


@pytest.mark.parametrize("use_dora", [False, True])
def test_quantized_base_and_back(tmp_path: Path, use_dora: bool) -> None:
    """Bit for bit through a file; PEFT on the same 4-bit layers computes the same."""
    ours = adapted(quantized=True, use_dora=use_dora, modules_to_save=["lm_head"])
    wanted = logits(ours)
    save_adapter(ours, tmp_path / "a")
    base = llama()
    quantize_linears(base)
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(logits(again), wanted)
    assert not any(module.training for module in again.modules())
    save_adapter(again, tmp_path / "b")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    if not use_dora:
        base = llama()
        quantize_linears(base)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
        assert relative(logits(theirs), wanted) < 1e-5


def test_peft_saves_ours_again_and_we_load_it(tmp_path: Path) -> None:
    ours = adapted(use_dora=True, rank_pattern={"k_proj": 3}, modules_to_save=["lm_head"])
    save_adapter(ours, tmp_path / "a", base_model_name_or_path="some/model")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    first, second = (safetensors.torch.load_file(tmp_path / d / WEIGHTS) for d in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "b")), logits(ours))


def test_fields_and_keys(tmp_path: Path) -> None:
    model = adapted(r=8, lora_alpha=32, use_rslora=True)
    save_adapter(model, tmp_path / "new" / "folder", base_model_name_or_path="llama/")
    fields = json.loads((tmp_path / "new/folder" / CONFIG).read_text())
    assert fields == {
        **fields,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "llama/",
        "r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    assert sorted(fields["target_modules"]) == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    # Every field is one that PEFT's config has.
    assert fields.keys() <= set(peft.LoraConfig().to_dict())
    tensors = safetensors.torch.load_file(tmp_path / "new/folder" / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (8, 64)
    assert tensors[key.format("B")].shape == (96, 8)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_base_model_is_named_by_the_model(tmp_path: Path) -> None:
    model = adapted()
    model.name_or_path = "from/here"
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "from/here"


def test_targets_that_only_a_pattern_can_tell_apart(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        return nn.ModuleDict({"fc": nn.Linear(4, 4), "inner": inner})

    # The head is tied to an embedding, so that all-linear leaves it out; its path ends as fc's.
    ours = model()
    ours["inner"]["emb"] = nn.Embedding(4, 4)
    ours["inner"]["fc"].weight = ours["inner"]["emb"].weight
    add_lora(ours, r=2)
    assert list(lora_modules(ours)) == ["fc"]
    save_adapter(ours, tmp_path)
    assert list(lora_modules(load_adapter(model(), tmp_path))) == ["fc"]
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert isinstance(theirs.base_model.model["fc"], peft.tuners.lora.LoraLayer)
    assert type(theirs.base_model.model["inner"]["fc"]) is nn.Linear


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["k_proj"]},
        {"exclude_modules": r".*\.0\..*"},
    ],
)
def test_limited_targets_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    targets = ["q_proj", "k_proj", "up_proj"]
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=targets, **options))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    ours = load_adapter(llama(), tmp_path / "a")
    assert 0 < len(lora_modules(ours)) < 6
    assert relative(logits(ours), logits(theirs)) < 1e-5
    save_adapter(ours, tmp_path / "b")
    again = load_adapter(llama(), tmp_path / "b")
    assert torch.equal(logits(again), logits(ours))


def test_embeddings_that_peft_saved_along(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(theirs)
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.weight.mul_(2)
    theirs.eval().save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ours = load_adapter(llama(), tmp_path / "a")
    assert relative(logits(ours), logits(theirs)) < 1e-5
    save_adapter(ours, tmp_path / "b")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "b")), logits(ours))
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    assert relative(logits(again), logits(theirs)) < 1e-5
    assert torch.equal(logits(remove_lora(ours)), logits(llama()))


def test_an_adapter_of_the_head(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    randomise(theirs)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.eval().save_pretrained(tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert relative(logits(load_adapter(llama(), tmp_path)), logits(theirs)) < 1e-5
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight.*another base"):
        load_adapter(llama(seed=9), tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoints_of_trainer(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    examples = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    transformers.Trainer(theirs, arguments, train_dataset=examples).train()
    wanted = logits(theirs.eval())
    assert relative(wanted, logits(llama())) > 0.01
    ours = load_adapter(llama(), tmp_path / "checkpoint-2")
    assert relative(logits(ours), wanted) < 1e-5
    assert relative(logits(load_adapter(llama(), tmp_path / "checkpoint-1")), wanted) > 1e-3


def test_adapters_of_transformers_itself(tmp_path: Path) -> None:
    theirs = llama()
    theirs.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    assert relative(logits(load_adapter(llama(), tmp_path)), logits(theirs)) < 1e-5


@pytest.mark.parametrize("use_dora", [False, True])
def test_shards_of_fsdp2_are_put_together(tmp_path: Path, use_dora: bool) -> None:
    model = adapted(quantized=True, use_dora=use_dora)
    wanted = logits(model)
    save_adapter(model, tmp_path / "a")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        assert torch.equal(logits(model), wanted)
        layer = lora_modules(model)["model.layers.0.mlp.up_proj"]
        model.model.layers[0].reshard()
        assert hasattr(layer.lora_A.weight, "full_tensor")
        save_adapter(model, tmp_path / "b")
    finally:
        torch.distributed.destroy_process_group()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_sixteen_bit_adapters_are_kept_in_float32(tmp_path: Path) -> None:
    save_adapter(adapted(adapter_dtype=torch.bfloat16), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for layer in lora_modules(load_adapter(llama(), tmp_path)).values():
        assert layer.lora_A.weight.dtype == torch.float32


@pytest.mark.parametrize("trainable", [False, True])
def test_trainable_or_not(tmp_path: Path, trainable: bool) -> None:
    save_adapter(adapted(modules_to_save=["lm_head"], use_dora=True), tmp_path)
    state = torch.random.get_rng_state()
    base = llama()
    torch.random.set_rng_state(state)
    model = load_adapter(base, tmp_path, trainable=trainable)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, part in model.named_parameters():
        adapter = "lora_" in name or name.startswith("lm_head")
        assert part.requires_grad == (adapter and trainable)


def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    model = adapted(quantized=True)
    save_adapter(model, tmp_path / "a")
    merge(model)
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_permissions_follow_the_umask_and_no_rest_is_left(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    mask = os.umask(0)
    os.umask(mask)
    for name in (WEIGHTS, CONFIG):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


class Killed(BaseException):
    """What a process sees when it is killed, for those who look at the folder afterwards."""


@pytest.mark.parametrize("same_config", [False, True])
def test_killed_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_config: bool
) -> None:
    """After each system call that changes the folder: the old adapter, the new one, or none."""
    old, new = adapted(r=4), adapted(r=4, lora_alpha=16 if same_config else 32)
    shake(new, seed=2)
    wanted = [logits(old), logits(new)]
    outcomes = set()
    step = 0
    while True:
        folder = tmp_path / str(step)
        save_adapter(old, folder)
        calls = 0

        def limited(real: Any, last: int = step) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last:
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            # unlink last: a killed process does not clean up.
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
                patch.setattr(owner, name, limited(getattr(owner, name)))
            try:
                save_adapter(new, folder)
                finished = True
            except Killed:
                finished = False
        try:
            found = logits(load_adapter(llama(), folder))
            matches = [torch.equal(found, each) for each in wanted]
            assert any(matches)
            outcomes.add(matches.index(True))
        except FileNotFoundError:
            outcomes.add(-1)
        if finished:
            break
        step += 1
    assert outcomes == ({0, 1} if same_config else {-1, 0, 1})
    assert step >= (3 if same_config else 6)


# --- what must not load -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path)
    return tmp_path


def refused(folder: Path, error: type[Exception], message: str, model: Any = None) -> None:
    model = llama() if model is None else model
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert list(model.state_dict()) == keys
    assert all(part.requires_grad for part in model.parameters())


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [3]),
        ("arrow_config", {"top_k": 1}),
        ("r", 0),
        ("r", "8"),
        ("lora_alpha", None),
        ("lora_dropout", 2),
        ("use_dora", "yes"),
        ("use_rslora", 1),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", "("),
        ("exclude_modules", "("),
        ("modules_to_save", [3]),
        ("rank_pattern", [1]),
        ("layers_to_transform", ["x"]),
    ],
)
def test_config_fields_that_are_refused(folder: Path, field: str, value: Any) -> None:
    rewrite(folder, **{field: value})
    refused(folder, CheckpointError, rf"adapter_config\.json.*{field}")


def test_configs_that_do_not_fit_the_tensors(folder: Path) -> None:
    original = (folder / CONFIG).read_text()

    def case(message: str, **fields: Any) -> None:
        (folder / CONFIG).write_text(original)
        rewrite(folder, **fields)
        refused(folder, CheckpointError, message)

    case(r"lora_A\.weight is \(4, 64\), not \(8, 64\).*another r", r=8)
    case(r"lora_magnitude_vector is missing", use_dora=True)
    case(r"down_proj\.lora_A\.weight is not among", target_modules=["q_proj"])
    case(r"matches no layer", target_modules=["query"])
    case(r"lm_head\.weight is missing", modules_to_save=["lm_head"])
    case(r"'classifier', which this model does not have", modules_to_save=["classifier"])
    case(r"is not among", exclude_modules=["up_proj"])


def test_unknown_fields_are_told(folder: Path) -> None:
    rewrite(folder, some_new_field={"a": 1}, another=None)
    with pytest.warns(UserWarning, match="unknown fields some_new_field are ignored"):
        load_adapter(llama(), folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff", "[" * 100_000, "null"])
def test_configs_that_are_not_json_objects(folder: Path, text: str) -> None:
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, CheckpointError, r"adapter_config\.json")


def test_tensors_that_do_not_fit(folder: Path) -> None:
    original = (folder / WEIGHTS).read_bytes()
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    a, b = key.format("A"), key.format("B")

    def case(message: str, change: Any, error: type[Exception] = CheckpointError) -> None:
        (folder / WEIGHTS).write_bytes(original)
        retensor(folder, change)
        refused(folder, error, message)

    def whole(tensors: dict[str, Tensor]) -> None:
        del tensors[a], tensors[b]

    def renamed(name: str) -> Any:
        return lambda tensors: tensors.update({name: tensors.pop(a)})

    def with_nan(tensors: dict[str, Tensor]) -> None:
        tensors[b][3, 1] = float("nan")

    case(rf"{b} is missing", lambda tensors: tensors.pop(b))
    case(rf"{a} is missing", lambda tensors: tensors.pop(a))
    case(rf"{a} is missing, though", whole)
    case("layers.7.mlp.up_proj: an adapter for another base", renamed(a.replace("s.1.", "s.7.")))
    case("names nothing that this model has", renamed("base_model.model.nothing.weight"))
    case("names nothing that this model has", renamed("x"))
    case("lora_embedding_A is not supported", renamed(a.replace("A.weight", "embedding_A")))
    case(r"lora_B\.bias is not supported", renamed(b.replace("weight", "bias")))
    magnitude = a.replace("A.weight", "magnitude_vector")
    weight = a.replace("lora_A.", "")
    case("up_proj has an adapter, and", lambda t: t.update({weight: torch.ones(96, 64)}))
    case("use_dora is false", lambda t: t.update({magnitude: torch.ones(96)}))
    case(r"is \(4, 64, 1\), not", lambda t: t.update({a: t[a][..., None].clone()}))
    case("int32; adapters are floating point", lambda t: t.update({a: t[a].int()}))
    case(f"{b} has NaN", with_nan, NonFiniteError)


def test_an_adapter_for_another_base(folder: Path) -> None:
    wide = llama(hidden_size=80, num_attention_heads=5, num_key_value_heads=5)
    refused(folder, CheckpointError, r"lora_A\.weight is \(4, 64\), not \(4, 80\)", wide)
    refused(folder, CheckpointError, "missing, though", llama(num_hidden_layers=3))
    refused(folder, CheckpointError, "an adapter for another base", llama(num_hidden_layers=1))
    refused(folder, CheckpointError, "an adapter for another base", nn.ModuleList([llama()]))


def test_saved_modules_that_do_not_fit(tmp_path: Path) -> None:
    save_adapter(adapted(modules_to_save=["lm_head"]), tmp_path)
    refused(tmp_path, CheckpointError, r"lm_head\.weight is \(96, 64\), not", llama(vocab_size=97))
    retensor(tmp_path, lambda t: t.update({"base_model.model.lm_head.bias": torch.zeros(3)}))
    refused(tmp_path, CheckpointError, r"lm_head\.bias names nothing")


@pytest.mark.parametrize("part", [WEIGHTS, CONFIG])
def test_incomplete_folders(folder: Path, part: str) -> None:
    (folder / part).unlink()
    refused(folder, FileNotFoundError, f"{part} is missing")
    refused(folder / "nowhere", FileNotFoundError, "not a folder")
    refused(folder / (CONFIG if part == WEIGHTS else WEIGHTS), FileNotFoundError, "not a folder")


def test_the_folder_above_names_the_adapters(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).rename(folder / "checkpoint-10" / name)
    refused(folder, FileNotFoundError, r"adapters in its folders checkpoint-10")
    load_adapter(llama(), folder / "checkpoint-10")


def test_pickles_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, CheckpointError, r"adapter_model\.bin is a pickle")


def test_broken_files(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length]
    twice = header[:-1].rstrip(b" }") + b"}," + header[1:].lstrip()
    for broken in (
        b"",
        data[:5],
        data[: 8 + length // 2],
        data[:-1],
        data + b"x",
        struct.pack("<Q", 2**63) + data[8:],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        struct.pack("<Q", length) + b"\xff" + header[1:] + data[8 + length :],
        struct.pack("<Q", len(twice)) + twice + data[8 + length :],
    ):
        (folder / WEIGHTS).write_bytes(broken)
        refused(folder, CheckpointError, WEIGHTS)
    assert b'{"' in twice
    with pytest.raises(CheckpointError, match="twice"):
        load_adapter(llama(), folder)


def test_every_single_bit_of_the_header(folder: Path) -> None:
    """A flipped bit is refused, or the same adapter is read: nothing is guessed."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    model, wanted = llama(), logits(load_adapter(llama(), folder))
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, 8 * (8 + length), (150,), generator=generator).tolist():
        broken = bytearray(data)
        broken[position // 8] ^= 1 << position % 8
        path.write_bytes(broken)
        try:
            load_adapter(model, folder)
        except (CheckpointError, NonFiniteError):
            continue
        # What is left: a bit in the padding, or in a number whose change the sizes allow.
        assert set(lora_modules(model)) == set(lora_modules(load_adapter(llama(), folder)))
        assert logits(model).shape == wanted.shape
        remove_lora(model)


def test_models_that_cannot_take_one(folder: Path) -> None:
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(adapted(), folder)
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(llama().to("meta"), folder)
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(llama(), folder)


def test_nan_is_not_saved(folder: Path) -> None:
    before = (folder / WEIGHTS).read_bytes()
    model = adapted()
    with torch.no_grad():
        lora_modules(model)["model.layers.0.mlp.up_proj"].lora_A.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.lora_A"):
        save_adapter(model, folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_an_unwritable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(adapted(), tmp_path / "file")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    save_adapter(adapted(), tmp_path / "a")
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(adapted(r=2), tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {WEIGHTS, CONFIG}
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before


def randomise(model: nn.Module) -> None:
    """Random adapters and saved modules in a model of PEFT."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_magnitude" in name:
                part.mul_(1 + 0.2 * torch.rand(part.shape, generator=generator))
            elif part.requires_grad:
                part.add_(torch.randn(part.shape, generator=generator) * 0.05)
