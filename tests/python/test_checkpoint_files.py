"""Checkpoint folders from Python: read, written, verified; ours and bitsandbytes'."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit import _core
from fourbit.checkpoint import convert, inspect, verify
from fourbit.cli.contents import Contents

CHECKPOINT_ERROR = _core.CheckpointError


@pytest.fixture
def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.proj.weight": (96, 64), "b.proj.weight": (33, 65), "norm.weight": (64,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path, model):
    """A converted folder of two shards."""
    source = tmp_path / "source"
    source.mkdir()
    save_file({k: v.bfloat16() for k, v in model.items()}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    convert(source, tmp_path / "result", max_shard_bytes=4_000)
    return tmp_path / "result"


def read(reader: _core.CheckpointReader, name: str) -> torch.Tensor:
    (entry,) = [tensor for tensor in reader.tensors() if tensor["name"] == name]
    output = torch.empty(entry["bytes"], dtype=torch.uint8)
    reader.read_into(name, output)
    return output


def test_the_reader_gives_the_bytes_that_safetensors_gives(folder):
    reader = _core.CheckpointReader(folder)
    assert reader.format_version == 1
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        assert reader.metadata[file.name]["format"] == "pt"
        for name, tensor in load_file(file).items():
            expected = tensor.contiguous().view(-1).view(torch.uint8)
            assert torch.equal(read(reader, name), expected)
            count += 1
    assert count == len(reader.tensors())


def test_the_reader_refuses_wrong_buffers(folder):
    reader = _core.CheckpointReader(folder)
    with pytest.raises(CHECKPOINT_ERROR, match=r"norm\.weight"):
        reader.read_into("norm.weight", torch.empty(127, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        reader.read_into("norm.weight", torch.empty(128, dtype=torch.int8))
    with pytest.raises(ValueError, match="contiguous"):
        reader.read_into("norm.weight", torch.empty(256, dtype=torch.uint8)[::2])
    with pytest.raises(CHECKPOINT_ERROR, match="no such tensor"):
        reader.read_into("nothing", torch.empty(1, dtype=torch.uint8))


def test_quantized_weights_are_described(folder):
    weights = {weight["name"]: weight for weight in _core.CheckpointReader(folder).quantized()}
    assert set(weights) == {"a.proj.weight", "b.proj.weight"}
    weight = weights["b.proj.weight"]
    assert weight["shape"] == [33, 65]
    assert weight["dtype"] == "bfloat16"
    assert weight["block_size"] == 64
    assert weight["codebook"].name == "nf4"
    assert weight["double_quant"]
    assert weight["nested_offset"] > 0
    assert set(weight["parts"]) == {
        "packed",
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
    }


def test_a_flipped_bit_is_refused_when_it_is_read(folder):
    info = inspect(folder)
    tensor = next(t for t in info.tensors if t.name == "a.proj.weight")
    path = folder / tensor.file
    before = torch.empty(tensor.bytes, dtype=torch.uint8)
    _core.CheckpointReader(folder).read_into(tensor.name, before)
    data = bytearray(path.read_bytes())
    at = data.index(bytes(before.numpy()))
    data[at + 7] ^= 0x10
    path.write_bytes(data)
    reader = _core.CheckpointReader(folder)
    output = torch.empty(tensor.bytes, dtype=torch.uint8)
    with pytest.raises(CHECKPOINT_ERROR, match=rf"{path.name}.*a\.proj\.weight.*checksum"):
        reader.read_into(tensor.name, output)
    reader.read_into(tensor.name, output, verify=False)
    assert (output != before).sum() == 1
    with pytest.raises(CHECKPOINT_ERROR, match=rf"{path.name}.*a\.proj\.weight.*checksum"):
        verify(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "fourbit.json").unlink(), "missing"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002"),
        (
            lambda folder: shutil.copy(
                folder / "model-00001-of-00002.safetensors",
                folder / "model-00002-of-00002.safetensors",
            ),
            "model-0000",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                (folder / "model.safetensors.index.json").read_text().replace("-00001-", "-00002-")
            ),
            "index",
        ),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config\.json"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    verify(folder)
    damage(folder)
    with pytest.raises((CHECKPOINT_ERROR, FileNotFoundError), match=message):
        verify(folder)


def test_a_later_version_is_refused_with_advice(folder):
    # A record as a later version would write it, with a good checksum.
    reader = pytest.importorskip("xxhash")
    path = folder / "fourbit.json"
    body, _ = (
        path.read_text()
        .replace('"format_version": 1', '"format_version": 2')
        .rsplit('"checksum": "', 1)
    )
    body += '"checksum": "'
    path.write_text(body + reader.xxh3_128(body.encode()).hexdigest() + '"\n}\n')
    with pytest.raises(CHECKPOINT_ERROR, match=r"version is fourbit 2 .* upgrade"):
        verify(folder)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_bitsandbytes_saves_is_read(tmp_path, double_quant, storage, quant_type):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        128,
        64,
        bias=True,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(64, 128),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize("cpu")
    state = {f"x.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (weight,) = inspect(tmp_path).quantized
    assert weight.name == "x.weight"
    assert weight.codebook == quant_type
    assert weight.shape == (64, 128)
    assert weight.double_quant == double_quant
    report = verify(tmp_path)
    assert not report.checksums
    assert (report.tensors, report.quantized) == (len(state), 1)


def write(path, tensors: dict[str, torch.Tensor], **options) -> None:
    dtypes = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}
    groups = [[(name, dtypes[t.dtype], list(t.shape))] for name, t in tensors.items()]
    options = {"max_shard_bytes": 1000, "files": [("config.json", b"{}")], **options}
    writer = _core.CheckpointWriter(path, groups, **options)
    for name, tensor in tensors.items():
        writer.write(name, tensor.contiguous().view(-1).view(torch.uint8))
    writer.finish()


def test_what_the_writer_writes_is_read_by_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(10, 20),
        "b": torch.randn(7).bfloat16(),
        "c": torch.zeros(0, 3),
        "d": torch.arange(11, dtype=torch.uint8),
        "e": torch.randn(30, 20),
    }
    write(tmp_path / "new", tensors)
    loaded = {}
    for file in sorted((tmp_path / "new").glob("*.safetensors")):
        loaded |= load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    report = verify(tmp_path / "new")
    assert report.checksums
    assert report.shards == 2
    with pytest.raises(FileExistsError):
        write(tmp_path / "new", tensors)


def test_an_abandoned_writer_leaves_nothing(tmp_path):
    path = tmp_path / "new"
    options = {"max_shard_bytes": 1, "files": []}
    groups = [[("a", "U8", [3])], [("b", "U8", [3])]]
    writer = _core.CheckpointWriter(path, groups, **options)
    writer.write("a", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r'"a" was written where "b" is next'):
        writer.write("a", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(CHECKPOINT_ERROR, match="interrupted"):
        _core.CheckpointReader(path)
    del writer
    assert not path.exists()
    writer = _core.CheckpointWriter(path, groups, **options)
    writer.discard()
    with pytest.raises(ValueError, match="finished or discarded"):
        writer.finish()
    assert not path.exists()


def test_the_writer_refuses_bad_plans(tmp_path):
    def plan(groups, files=()):
        options = {"max_shard_bytes": 1000, "files": list(files)}
        return _core.CheckpointWriter(tmp_path / "new", groups, **options)

    with pytest.raises(CHECKPOINT_ERROR, match="twice"):
        plan([[("a", "U8", [1]), ("a", "U8", [1])]])
    with pytest.raises(CHECKPOINT_ERROR, match="control"):
        plan([[("a\0", "U8", [1])]])
    with pytest.raises(ValueError, match="Q4"):
        plan([[("a", "Q4", [1])]])
    with pytest.raises(ValueError, match="64 bits"):
        plan([[("a", "F32", [1 << 62, 1 << 62])]])
    with pytest.raises(OSError, match="bytes are needed"):
        plan([[("a", "F32", [1 << 50])]])
    for name in ("../x.json", "fourbit.json", "model.safetensors", "a/b"):
        with pytest.raises(ValueError, match="plain file name"):
            plan([[("a", "U8", [1])]], files=[(name, b"")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("nested_offset", [None, 0.08696746826171875])
def test_a_quantized_layout_is_what_the_converter_writes(nested_offset):
    parts, state = _core.quantized_layout(
        "x.weight",
        codebook=_core.Codebook.by_name("nf4"),
        block_size=64,
        dtype="bfloat16",
        shape=[64, 128],
        nested_offset=nested_offset,
    )
    expected = {
        "packed": ("x.weight", "U8", [4096, 1]),
        "absmax": ("x.weight.absmax", "F32" if nested_offset is None else "U8", [128]),
        "quant_map": ("x.weight.quant_map", "F32", [16]),
        "quant_state": ("x.weight.quant_state.bitsandbytes__nf4", "U8", [len(state)]),
    }
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}
    if nested_offset is not None:
        expected["nested_absmax"] = ("x.weight.nested_absmax", "F32", [1])
        expected["nested_quant_map"] = ("x.weight.nested_quant_map", "F32", [256])
        values |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        values |= {"nested_offset": nested_offset}
    found = {part["part"]: (part["name"], part["dtype"], part["shape"]) for part in parts}
    assert found == expected
    assert state.decode() == json.dumps(values)


def test_a_quantization_config_is_added_to_a_text():
    options = {"block_size": 64, "double_quant": True, "dtype": "float16", "skipped": ["a.b"]}
    text = '{"eps": 1e-05}'
    codebook = _core.Codebook.by_name("int4")
    added = _core.add_quantization_config(text, codebook=codebook, **options)
    assert added.startswith('{"eps": 1e-05,')
    assert json.loads(added)["quantization_config"]["codebook"] == "int4"
    with pytest.raises(CHECKPOINT_ERROR, match="quantized already"):
        _core.add_quantization_config(added, codebook=codebook, **options)


def test_the_reasons_of_a_conversion_are_shown(folder):
    info = inspect(folder)
    reasons = {tensor.name: tensor.reason for tensor in info.tensors}
    assert reasons["norm.weight"] == "norm"
    assert reasons["a.proj.weight"] == "linear layer"
    assert reasons["a.proj.weight.absmax"] is None
    assert {weight.reason for weight in info.quantized} == {"linear layer"}

    contents = Contents.of(info)
    shown = {tensor["name"]: tensor["reason"] for tensor in contents.as_json()["tensors"]}
    assert shown == {
        "a.proj.weight": "linear layer",
        "b.proj.weight": "linear layer",
        "norm.weight": "norm",
    }
    assert contents.table().columns[-1].header == "why"
    assert list(contents.table().columns[-1].cells) == ["linear layer", "linear layer", "norm"]


def test_a_folder_without_reasons_is_shown_without(tmp_path):
    network = fourbit.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    fourbit.save(network, tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "plain" / "model.safetensors")
    for name in ("saved", "plain"):
        info = inspect(tmp_path / name)
        assert {entry.reason for entry in (*info.tensors, *info.quantized)} == {None}
        assert "why" not in [column.header for column in Contents.of(info).table().columns]


def test_verify_tells_how_far_it_is_and_can_be_stopped(folder):
    seen = []
    report = verify(folder, progress=lambda done, total: seen.append((done, total)))
    files = sum(path.stat().st_size for path in folder.iterdir() if path.name != "fourbit.json")
    assert seen[-1] == (files, files)
    assert report.checksums

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(folder, progress=stop)
