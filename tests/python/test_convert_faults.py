"""The converter with every single file operation failing, or killed there."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fourbit import _core
from fourbit.checkpoint import verify

HERE = Path(__file__).parent
INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="faults are injected with LD_PRELOAD, which takes Linux and a C compiler",
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = HERE / "faults.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"layers.{i}.q_proj.weight": torch.randn(64, 64, generator=generator) for i in range(3)
    }
    tensors["norm.weight"] = torch.randn(64, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Converter:
    """Converts into a folder in a process of its own, with faults."""

    def __init__(self, shim: Path, source: Path, result: Path) -> None:
        self.shim, self.result = shim, result
        job = {"source": str(source), "destination": str(result), "max_shard_bytes": 5_000}
        child = str(HERE / "convert_child.py")
        self.command = [sys.executable, child, _core.__file__, json.dumps(job)]
        self.log = result.with_suffix(".log")

    def run(self, mode: str = "none", at: int = 0) -> dict | None:
        """The child's report; None where it was killed."""
        environment = os.environ | {
            "LD_PRELOAD": str(self.shim),
            "FAULT_DIR": str(self.result),
            "FAULT_MODE": mode,
            "FAULT_AT": str(at),
            "FAULT_LOG": str(self.log),
        }
        done = subprocess.run(
            self.command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode < 0:
            return None
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def operations(self) -> int:
        return int(self.log.read_text())


@pytest.fixture(scope="module")
def expected(shim, source, tmp_path_factory) -> tuple[int, dict[str, bytes]]:
    """How many file operations a conversion takes, and what it gives."""
    result = tmp_path_factory.mktemp("faults") / "whole"
    converter = Converter(shim, source, result)
    report = converter.run()
    assert "error" not in report
    assert report["shards"] == 3
    # Three shards, five other files and the marker take several operations each.
    assert converter.operations() > 50
    return converter.operations(), contents(result)


def assert_complete_or_unloadable(result: Path) -> None:
    """The index is there only where all else is."""
    if (result / INDEX).exists():
        verify(result)
    else:
        with pytest.raises((_core.CheckpointError, FileNotFoundError)):
            _core.CheckpointReader(result)
        assert not (result / "model.safetensors").exists()


def test_killed_at_every_file_operation(shim, source, expected, tmp_path):
    operations, whole = expected
    for at in range(1, operations + 1):
        result = tmp_path / f"killed-{at}"
        converter = Converter(shim, source, result)
        assert converter.run("kill", at) is None, f"operation {at} was not reached"
        assert_complete_or_unloadable(result)
        shards_before = len(list(result.glob("model-*.safetensors")))
        report = converter.run()
        assert "error" not in report, f"operation {at}: {report}"
        assert report["shards_kept"] == shards_before
        assert contents(result) == whole, f"operation {at}"
        shutil.rmtree(result)


def test_an_error_at_every_file_operation(shim, source, expected, tmp_path):
    operations, whole = expected
    source_before = contents(source)
    for at in range(1, operations + 1):
        result = tmp_path / f"failed-{at}"
        converter = Converter(shim, source, result)
        code = errno.ENOSPC if at % 2 else errno.EIO
        report = converter.run(str(code), at)
        assert report is not None
        assert (report.get("error"), report.get("errno")) == ("OSError", code), f"operation {at}"
        assert str(result) in report["message"], f"operation {at}: {report['message']}"
        assert_complete_or_unloadable(result)
        report = converter.run()
        assert "error" not in report, f"operation {at}: {report}"
        assert contents(result) == whole, f"operation {at}"
        shutil.rmtree(result)
    assert contents(source) == source_before


def test_short_writes_change_nothing(shim, source, expected, tmp_path):
    operations, whole = expected
    converter = Converter(shim, source, tmp_path / "result")
    assert "error" not in converter.run("short")
    assert converter.operations() > operations
    assert contents(tmp_path / "result") == whole
