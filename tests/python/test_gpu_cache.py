"""Compiled kernels on disk: kept, checked, made again; by processes side by side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit import _core, nvrtc

REQUEST = {"capability": 80, "dtype": "float32"}


@pytest.fixture(autouse=True)
def _compiler():
    try:
        nvrtc.load()
    except _core.CudaError as error:
        pytest.skip(f"no NVRTC: {error}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "kernels"
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(folder))
    return folder


def build():
    return _core.build_kernel("double_quant", **REQUEST)


def entry(folder) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_compiled_is_kept(folder):
    assert _core.kernel_cache() == (folder, 0, 0)
    cubin, cached = build()
    assert not cached
    assert cubin.startswith(b"\x7fELF")
    assert build() == (cubin, True)
    path = entry(folder)
    assert path.name.startswith("double_quant-sm_80-")
    assert path.read_bytes().endswith(cubin)
    assert _core.kernel_cache() == (folder, 1, path.stat().st_size)
    if os.name == "posix":
        assert folder.stat().st_mode & 0o077 == 0, "what is in it runs on the card"


def test_other_requests_have_other_entries(folder):
    build()
    _core.build_kernel("double_quant", **{**REQUEST, "capability": 90})
    _core.build_kernel("dequantize", **REQUEST, block_size=128)
    _core.build_kernel("dequantize", **REQUEST, block_size=64)
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "longer", "text"])
def test_a_damaged_entry_is_compiled_again(folder, damage):
    cubin, _ = build()
    path = entry(folder)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "flipped": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
            "longer": whole + b"\0",
            "text": b"not found",
        }[damage]
    )
    assert build() == (cubin, False)
    assert path.read_bytes() == whole
    assert build() == (cubin, True)


def test_an_entry_of_another_kernel_is_not_taken(folder):
    cubin, _ = build()
    path = entry(folder)
    _core.build_kernel("dequantize", **REQUEST)
    (other,) = set(folder.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    assert build() == (cubin, False)


def test_a_folder_in_the_entrys_place_is_told_and_the_kernel_built(folder):
    build()
    path = entry(folder)
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match=r"cannot be kept.*FOURBIT_CACHE_DIR"):
        cubin, cached = build()
    assert not cached
    assert cubin.startswith(b"\x7fELF")
    path.rmdir()
    assert list(folder.iterdir()) == [], "no unfinished file stays"


def test_a_cache_that_cannot_be_made_is_told_and_the_kernel_built(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert build()[0].startswith(b"\x7fELF")


def test_without_the_variable_it_is_in_the_users_cache(tmp_path, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("the folder's name is the platform's")
    monkeypatch.delenv("FOURBIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _core.kernel_cache() == (tmp_path / "fourbit", 0, 0)


CHILD = """
import sys
from fourbit import _core, nvrtc
nvrtc.load()
while True:
    cubin, cached = _core.build_kernel("double_quant", capability=80, dtype="float32")
    sys.stdout.buffer.write(len(cubin).to_bytes(8, "little") + cubin)
    if cached:
        break
"""


def test_processes_share_a_folder(folder):
    """Four start at once: every one gets the same kernel, and one whole entry is left."""
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) for _ in range(4)
    ]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4
    cubin, cached = build()
    assert cached
    for output in outputs:
        while output:
            size = int.from_bytes(output[:8], "little")
            assert output[8 : 8 + size] == cubin
            output = output[8 + size :]
    assert entry(folder).read_bytes().endswith(cubin)
