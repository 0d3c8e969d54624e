"""``fourbit doctor``, on machines with and without a GPU."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fourbit
from fake_cards import on_fake_cards
from fourbit import _core, diagnosis, nvrtc
from fourbit.cli.app import app


def by_subject(result: diagnosis.Diagnosis) -> dict[str, diagnosis.Finding]:
    return {finding.subject: finding for finding in result.findings}


def without_driver(monkeypatch):
    def missing():
        raise _core.CudaError("there is no CUDA driver on this machine (not found)")

    monkeypatch.setattr(_core, "cuda_driver_version", missing)
    monkeypatch.setattr(_core, "cuda_devices", missing)


def with_cards(monkeypatch, cards, version=(13, 2), *, shares=True):
    monkeypatch.setattr(_core, "cuda_driver_version", lambda: version)
    monkeypatch.setattr(_core, "cuda_devices", lambda: cards)
    monkeypatch.setattr(_core, "card_can_page", lambda number: shares)
    monkeypatch.setattr(nvrtc, "torch_cuda", lambda: "13.2")
    nothing_wrong = diagnosis.Finding("NVRTC", "ok", "13.2")
    monkeypatch.setattr(diagnosis, "_nvrtc", lambda: nothing_wrong)


def test_this_machine():
    result = fourbit.doctor()
    found = by_subject(result)
    assert found["fourbit"].found.startswith(fourbit.__version__)
    assert _core.simd_backends()[-1] in found["fourbit"].found
    for subject in ("torch", "CUDA driver", "NVRTC", "kernel cache", "transformers"):
        assert found[subject].found
    for finding in result.findings:
        if finding.status != "ok" and finding.subject != "GPU":
            assert finding.advice, f"{finding.subject}: what is to be done?"


def test_without_a_driver(monkeypatch):
    without_driver(monkeypatch)
    result = fourbit.doctor()
    found = by_subject(result)
    assert not result.cuda_works
    assert found["CUDA driver"].status == "missing"
    assert "install NVIDIA's driver" in found["CUDA driver"].advice
    assert found["GPU"].status == "unknown"


def test_with_a_card(monkeypatch):
    with_cards(monkeypatch, [("NVIDIA H100 80GB HBM3", 80 << 30, 90, 132)])
    result = fourbit.doctor()
    assert result.cuda_works
    assert "H100 80GB HBM3, 80 GiB, compute capability 9.0" in by_subject(result)["GPU 0"].found


def test_with_a_card_that_is_too_old(monkeypatch):
    with_cards(monkeypatch, [("Tesla V100", 16 << 30, 70, 80)])
    result = fourbit.doctor()
    assert not result.cuda_works
    assert by_subject(result)["GPU 0"].status == "broken"
    assert "need 7.5 or later" in by_subject(result)["GPU 0"].advice


H100 = ("NVIDIA H100 80GB HBM3", 80 << 30, 90, 132)


@pytest.mark.parametrize(
    ("shares", "said"),
    [(True, 'it shares memory .* "auto" takes "unified"'), (False, 'no memory .* takes "pinned"')],
)
def test_which_pager_a_card_gets(monkeypatch, shares, said):
    with_cards(monkeypatch, [H100, ("Tesla V100", 16 << 30, 70, 80), H100], shares=shares)
    found = by_subject(fourbit.doctor())
    for number in (0, 2):
        assert found[f"GPU {number} paging"].status == "ok"
        assert re.search(said, found[f"GPU {number} paging"].found)
    assert "GPU 1 paging" not in found, "no kernel runs there"


def test_a_card_that_does_not_say_whether_it_shares_memory(monkeypatch):
    def fails(number):
        raise _core.CudaError("cuDeviceGetAttribute failed")

    with_cards(monkeypatch, [H100])
    monkeypatch.setattr(_core, "card_can_page", fails)
    result = fourbit.doctor()
    assert result.cuda_works, "the kernels need no pager"
    paging = by_subject(result)["GPU 0 paging"]
    assert (paging.status, paging.found) == ("unknown", "cuDeviceGetAttribute failed")
    assert 'pager="resident"' in paging.advice


@on_fake_cards(devices=2)
def test_the_driver_is_asked_for_each_card(core, driver):
    for concurrent, pager in ((1, "unified"), (0, "pinned")):
        os.environ["FAKE_CUDA_CONCURRENT"] = str(concurrent)
        found = by_subject(diagnosis.doctor())
        for number in range(2):
            assert f'takes "{pager}"' in found[f"GPU {number} paging"].found
    driver.fail("cuDeviceGetAttribute", call=driver_calls_of_devices(core, driver) + 1)
    found = by_subject(diagnosis.doctor())
    assert "cuDeviceGetAttribute failed" in found["GPU 0 paging"].found
    assert 'takes "pinned"' in found["GPU 1 paging"].found
    assert driver.calls("cuDevicePrimaryCtxRetain") == 0, "a question makes no context"


def driver_calls_of_devices(core, driver):
    """How often the driver is asked for attributes before it is asked whether cards can page."""
    before = driver.calls("cuDeviceGetAttribute")
    core.cuda_devices()
    # The cards are listed, and listed again for those that can be used.
    return 2 * (driver.calls("cuDeviceGetAttribute") - before)


def test_with_a_driver_that_is_too_old(monkeypatch):
    with_cards(monkeypatch, [("NVIDIA A10", 24 << 30, 86, 72)], version=(12, 4))
    found = by_subject(fourbit.doctor())["CUDA driver"]
    assert found.status == "broken"
    assert "CUDA 12.4" in found.found
    assert "driver for CUDA 13" in found.advice


def test_with_all_cards_hidden(monkeypatch):
    with_cards(monkeypatch, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = fourbit.doctor()
    assert not result.cuda_works
    assert "CUDA_VISIBLE_DEVICES" in by_subject(result)["GPU"].advice


def test_without_nvrtc(monkeypatch):
    def missing():
        raise _core.CudaError("NVRTC, which compiles the CUDA kernels, was not found (tried x)")

    monkeypatch.setattr(nvrtc, "load", missing)
    found = by_subject(fourbit.doctor())["NVRTC"]
    assert found.status == "missing"
    assert "CUDA build of torch" in found.advice


def test_with_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path / "file"))
    found = by_subject(fourbit.doctor())["kernel cache"]
    assert found.status == "broken"
    assert "FOURBIT_CACHE_DIR" in found.advice


def test_the_command_prints_lines_and_advice(monkeypatch):
    without_driver(monkeypatch)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "CUDA driver" in result.stdout
    assert "->" in result.stdout
    assert result.stdout.endswith(
        "CUDA tensors cannot be used on this machine; those on the CPU can\n"
    )


def test_the_command_prints_json():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    parsed = json.loads(result.stdout)
    assert parsed == fourbit.doctor().as_dict()
    assert {"subject", "status", "found", "advice"} == set(parsed["findings"][0])


def test_the_import_opens_no_library_of_nvidia():
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    code = (
        "import fourbit, fourbit.nvrtc\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda' not in maps and 'nvrtc' not in maps"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
