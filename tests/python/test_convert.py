"""`fourbit.convert`: what comes out, and what happens when it is stopped, killed or starved."""

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fourbit import _core
from fourbit.checkpoint import convert, inspect, verify
from fourbit.codebook import Codebook

CHILD = Path(__file__).with_name("convert_child.py")
INDEX = "model.safetensors.index.json"
CONFIG = '{\n  "model_type": "llama",\n  "rms_norm_eps": 1e-05,\n  "vocab_size": 50\n}\n'


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(CONFIG)
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def make_model(layers: int = 2, width: int = 64, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator().manual_seed(layers * 1000 + width)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": randn(50, width), "lm_head.weight": randn(50, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "self_attn.q_proj.weight"] = randn(width, width)
        tensors[prefix + "self_attn.q_proj.bias"] = randn(width)
        tensors[prefix + "mlp.up_proj.weight"] = randn(3 * width, width)
        tensors[prefix + "input_layernorm.weight"] = randn(width)
    return tensors


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                tensors[name] = opened.get_tensor(name)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decode(stored: dict[str, torch.Tensor], weight: str) -> np.ndarray:
    """The weight by the format's definition, in NumPy."""

    def part(name: str) -> np.ndarray:
        return stored[f"{weight}.{name}"].numpy()

    (state_name,) = [name for name in stored if name.startswith(f"{weight}.quant_state.")]
    state = json.loads(bytes(stored[state_name].numpy()))
    if "nested_offset" in state:
        scale = part("nested_absmax").repeat(256)[: part("absmax").size]
        absmax = part("nested_quant_map")[part("absmax")] * scale
        absmax = absmax + np.float32(state["nested_offset"])
    else:
        absmax = part("absmax")
    packed = stored[weight].numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    count = int(np.prod(state["shape"]))
    scales = absmax.repeat(state["blocksize"])[:count]
    return (part("quant_map")[codes[:count]] * scales).reshape(state["shape"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_bitsandbytes_decodes_what_we_write(tmp_path, dtype, double_quant, codebook):
    functional = pytest.importorskip("bitsandbytes.functional")
    model = make_model(dtype=dtype)
    write_model(tmp_path / "source", model, shards=3)
    report = convert(
        tmp_path / "source", tmp_path / "result", codebook=codebook, double_quant=double_quant
    )
    stored = load_all(tmp_path / "result")
    assert len(report.quantized) == 4
    for weight in (tensor.name for tensor in report.quantized):
        expected = decode(stored, weight)
        prefix = weight + "."
        state = functional.QuantState.from_dict(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in stored.items()
                if name.startswith(prefix)
            },
            device=torch.device("cpu"),
        )
        assert state.dtype == dtype
        assert state.shape == model[weight].shape
        decoded = functional.dequantize_4bit(stored[weight], state)
        # bitsandbytes rounds scales or products to the output type in places: two roundings.
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            decoded.float(), torch.from_numpy(expected), rtol=tolerance, atol=1e-6
        )
        # The largest gap of either codebook is a third of the scale, so half of that at most.
        error = np.abs(expected - model[weight].float().numpy()).max()
        assert error <= 0.18 * model[weight].float().abs().max()
    for tensor in report.kept:
        assert torch.equal(stored[tensor.name], model[tensor.name])


def test_the_report_says_what_became_of_each_tensor(tmp_path):
    write_model(tmp_path / "source", make_model(layers=1))
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"PK")
    report = convert(tmp_path / "source", tmp_path / "result")
    reasons = {tensor.name: (tensor.action, tensor.reason) for tensor in report.tensors}
    assert reasons == {
        "model.embed_tokens.weight": ("kept", "embedding"),
        "lm_head.weight": ("kept", "output head"),
        "model.layers.0.self_attn.q_proj.weight": ("quantized", "linear layer"),
        "model.layers.0.self_attn.q_proj.bias": ("kept", "not a weight"),
        "model.layers.0.mlp.up_proj.weight": ("quantized", "linear layer"),
        "model.layers.0.input_layernorm.weight": ("kept", "norm"),
    }
    assert report.copied == ("tokenizer.json",)
    assert set(report.skipped) == {"pytorch_model.bin"}
    assert report.bytes_after < report.bytes_before
    again = convert(tmp_path / "source", tmp_path / "result")
    assert again.already_complete


def test_the_config_gains_one_key_and_keeps_its_numbers(tmp_path):
    write_model(tmp_path / "source", make_model(layers=1))
    convert(tmp_path / "source", tmp_path / "result")
    text = (tmp_path / "result" / "config.json").read_text()
    assert text.startswith(CONFIG.rstrip()[:-1].rstrip())
    config = json.loads(text)
    assert list(config) == [*json.loads(CONFIG), "quantization_config"]
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
        "fourbit_format_version": 1,
    }


def test_quant_states_are_the_text_that_python_writes(tmp_path):
    write_model(tmp_path / "source", make_model())
    convert(tmp_path / "source", tmp_path / "result")
    for name, tensor in load_all(tmp_path / "result").items():
        if ".quant_state." in name:
            text = bytes(tensor.numpy()).decode()
            assert json.dumps(json.loads(text)) == text


def test_a_codebook_of_ones_own(tmp_path):
    entries = [(0, -1.0), (1, 0.25), (2, 0.5), (3, 1.0)]
    codebook = Codebook(dict(entries), ties="upper", name="mine")
    write_model(tmp_path / "source", make_model())
    convert(tmp_path / "source", tmp_path / "result", codebook=codebook)
    weights = inspect(tmp_path / "result").quantized
    assert {weight.codebook for weight in weights} == {"mine"}
    (first, *_) = _core.CheckpointReader(tmp_path / "result").quantized()
    assert first["codebook"].values == [-1.0, 0.25, 0.5, 1.0]
    assert first["codebook"].ties_upper
    config = json.loads((tmp_path / "result" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fourbit"


def test_errors_have_the_types_that_callers_catch(tmp_path):
    source, result = tmp_path / "source", tmp_path / "result"
    model = make_model()
    write_model(source, model)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", result)
    with pytest.raises(ValueError, match="matches no tensor"):
        convert(source, result, skip="*.upproj.*")
    with pytest.raises(ValueError, match="block size 63"):
        convert(source, result, block_size=63)
    with pytest.raises(ValueError, match="chunk_bytes"):
        convert(source, result, chunk_bytes=1)
    with pytest.raises(ValueError, match="same folder"):
        convert(source, source)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        convert(source, occupied)
    assert not result.exists()

    weight = "model.layers.1.mlp.up_proj.weight"
    model[weight][3, 5] = float("nan")
    write_model(source, model)
    with pytest.raises(_core.NonFiniteError, match=rf"model\.safetensors.*{weight}.*element 197"):
        convert(source, result)
    assert not result.exists()
    (source / "model.safetensors").write_bytes(b"\x80\x02}q\x00(X\x05\x00\x00\x00")
    with pytest.raises(_core.CheckpointError, match="a pickle file"):
        convert(source, result)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(_core.CheckpointError, match="never read"):
        convert(source, result)


def test_progress_is_told_and_may_stop_the_conversion(tmp_path):
    write_model(tmp_path / "source", make_model())
    calls = []
    convert(tmp_path / "source", tmp_path / "a", progress=lambda *call: calls.append(call))
    done, total, tensor = calls[-1]
    assert done == total == sum(t.nbytes for t in make_model().values())
    assert tensor in make_model()

    def stop(done: int, total: int, tensor: str) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        convert(tmp_path / "source", tmp_path / "b", progress=stop)
    assert not (tmp_path / "b" / INDEX).exists()
    convert(tmp_path / "source", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def start(job: dict, **kwargs) -> subprocess.Popen:
    arguments = [sys.executable, str(CHILD), _core.__file__, json.dumps(job)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, **kwargs)


def outcome(child: subprocess.Popen) -> dict:
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return json.loads(output.splitlines()[-1])


def child_job(source: Path, destination: Path, **more) -> dict:
    return {"source": str(source), "destination": str(destination), **more}


def assert_nothing_loads(folder: Path) -> None:
    with pytest.raises((_core.CheckpointError, FileNotFoundError)):
        _core.CheckpointReader(folder)
    assert not (folder / INDEX).exists()
    assert not (folder / "model.safetensors").exists()


def test_killed_at_twenty_random_moments_it_ends_in_the_same_bytes(tmp_path):
    source = tmp_path / "source"
    write_model(source, make_model(layers=12, width=512), shards=2)
    small = {"max_shard_bytes": 400_000, "chunk_bytes": 2 << 20}
    child = start(child_job(source, tmp_path / "whole", **small))
    child.stdout.readline()
    began = time.monotonic()
    outcome(child)
    seconds = time.monotonic() - began
    expected = contents(tmp_path / "whole")
    source_before = contents(source)
    moments = random.Random(7)
    unfinished = kept = 0
    for number in range(20):
        result = tmp_path / f"result-{number}"
        child = start(child_job(source, result, **small))
        child.stdout.readline()
        time.sleep(moments.random() * seconds)
        child.kill()
        child.communicate()
        if not (result / INDEX).exists():
            unfinished += 1
            assert_nothing_loads(result)
        shards_before = len(list(result.glob("model-*.safetensors")))
        report = outcome(start(child_job(source, result, **small)))
        # What was finished is kept: at most the shard under way is done again.
        assert report["shards_kept"] == shards_before
        kept += shards_before
        assert contents(result) == expected
    assert contents(source) == source_before
    assert unfinished > 0, "some moments were before the end"
    assert kept > 0, "some moments were after the first shard"


def test_ctrl_c_stops_it_and_it_continues(tmp_path):
    source, result = tmp_path / "source", tmp_path / "result"
    write_model(source, make_model(layers=6, width=256))
    # A shard for every tensor, and the first call of progress waits until the signal is sent.
    job = child_job(source, result, max_shard_bytes=1, wait=str(tmp_path / "go"))
    child = start(job)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert outcome(child)["error"] == "KeyboardInterrupt"
    assert_nothing_loads(result)
    (tmp_path / "go").touch()
    outcome(start(job))
    verify(result)


def test_two_writers_do_not_meet(tmp_path):
    source, result = tmp_path / "source", tmp_path / "result"
    write_model(source, make_model())
    child = start(child_job(source, result, wait=str(tmp_path / "go")))
    child.stdout.readline()
    with pytest.raises(BlockingIOError, match="another process is writing"):
        convert(source, result)
    (tmp_path / "go").touch()
    assert "error" not in outcome(child)
    assert convert(source, result).already_complete


def test_a_write_that_fails_leaves_nothing_that_loads(tmp_path):
    source = tmp_path / "source"
    write_model(source, make_model(layers=4, width=128))
    before = contents(source)
    sizes = [path.stat().st_size for path in source.iterdir()]
    results = []
    for limit in range(0, max(sizes) // 3, 9_973):
        result = tmp_path / f"result-{limit}"
        report = outcome(start(child_job(source, result, file_bytes=limit, max_shard_bytes=60_000)))
        results.append(report.get("error"))
        if "error" in report:
            assert report["error"] == "OSError"
            assert report["errno"] == errno.EFBIG
            assert str(result) in report["message"]
            assert_nothing_loads(result)
        # With room again, it is finished.
        assert "error" not in outcome(start(child_job(source, result, max_shard_bytes=60_000)))
        verify(result)
    assert contents(source) == before
    assert "OSError" in results


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of a megabyte; read-only where asked."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_too_small_a_disk_is_noticed_before_anything_is_written(tmp_path, disk):
    write_model(tmp_path / "source", make_model(layers=8, width=512))
    folder = disk("rw")
    with pytest.raises(OSError, match="bytes are needed") as raised:
        convert(tmp_path / "source", folder / "result")
    assert raised.value.errno == errno.ENOSPC
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(tmp_path, disk):
    source = tmp_path / "source"
    write_model(source, make_model(layers=4, width=256))
    result = disk("rw") / "result"
    filler = result.parent / "filler"

    def fill(done: int, total: int, tensor: str) -> None:
        if not filler.exists():
            free = os.statvfs(result.parent).f_bavail * os.statvfs(result.parent).f_bsize
            filler.write_bytes(b"x" * (free - 200_000))

    with pytest.raises(OSError, match="result") as raised:
        convert(source, result, max_shard_bytes=100_000, progress=fill)
    assert raised.value.errno == errno.ENOSPC
    assert_nothing_loads(result)
    filler.unlink()
    convert(source, result, max_shard_bytes=100_000)
    verify(result)


def test_a_read_only_folder(tmp_path, disk):
    write_model(tmp_path / "source", make_model())
    folder = disk("ro")
    with pytest.raises(OSError, match="disk") as raised:
        convert(tmp_path / "source", folder)
    assert raised.value.errno == errno.EROFS


def test_memory_is_bounded_by_the_budget_not_by_the_tensor(tmp_path):
    """One tensor of a gigabyte; the file has a hole for its zeros."""
    source = tmp_path / "source"
    source.mkdir()
    rows, columns = 1 << 15, 1 << 14
    entry = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}
    header = json.dumps({"a.weight": entry}).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + rows * columns * 2)
    job = child_job(source, tmp_path / "result", chunk_bytes=4 << 20, threads=2)
    report = outcome(start(job))
    # The budget is 8 MiB; the rest is thread stacks, the allocator and the code itself.
    assert report["peak_kib"] <= 24 << 10, report
    assert inspect(tmp_path / "result").quantized[0].shape == (rows, columns)


@pytest.mark.parametrize("option", ["block_size", "max_shard_bytes", "chunk_bytes", "threads"])
@pytest.mark.parametrize("value", [-1, 2**63, 2**64])
def test_numbers_out_of_range_name_their_option(tmp_path, option, value):
    write_model(tmp_path / "source", make_model())
    with pytest.raises(ValueError, match=option):
        convert(tmp_path / "source", tmp_path / "result", **{option: value})
    assert not (tmp_path / "result").exists()


def test_more_threads_than_can_be_started_are_refused(tmp_path):
    write_model(tmp_path / "source", make_model())
    with pytest.raises(ValueError, match=r"threads.*at most 1024"):
        convert(tmp_path / "source", tmp_path / "result", threads=100_000)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 40_000_000], ids=["long", "very long"])
def test_a_name_too_long_is_refused_in_few_words(tmp_path, name):
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(_core.CheckpointError, match="longer than 4096 bytes") as raised:
        convert(source, tmp_path / "result")
    assert len(str(raised.value)) < 500
    assert not (tmp_path / "result").exists()
