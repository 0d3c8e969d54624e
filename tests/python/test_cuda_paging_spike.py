"""A spike past the card: a run finishes if its state is paged, and dies if it is not.

How to run: see ``on_card.py``. The runs are those of ``spiked_run.py``, each in a process of its
own; they are tried on the recording card, too.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import emulate
from fourbit import _core

HERE = Path(__file__).parent
PAGERS = ["resident", "unified", "pinned"]


@cache
def spiked(pager: str, *options: str) -> dict:
    """What the run says."""
    paths = [str(HERE), str(HERE.parent / "kernels"), *filter(None, sys.path)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        # The same product in the same bits each time.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    # Torch's own cache is part of what is tested.
    for name in ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(HERE / "spiked_run.py"), pager, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(params=[pytest.param((), marks=pytest.mark.cuda), ("--emulated",)])
def options(request):
    if request.param:
        if emulate.unavailable():
            pytest.skip(emulate.unavailable())
    elif not _core.card_can_page(0):
        pytest.skip("the card and the processor share no memory")
    return request.param


@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_a_spike_is_outlived_with_paged_state_in_the_same_bits(pager, options, record_property):
    found = spiked(pager, *options)
    record_property("run", json.dumps(found))
    assert found["plain"]["outcome"] == "finished"
    assert found["spiked"]["outcome"] == "finished", found["spiked"]
    assert found["spiked"]["digest"] == found["plain"]["digest"]
    report = found["spiked"]["report"]
    assert list(report["pagers"].values()) == [pager]
    if pager == "unified":
        before = found["spiked"]["figures"]["before"]
        assert before["resident_bytes"] == before["state_bytes"], "it was all there"
        assert report["resident_bytes"] == report["state_bytes"], "and came back"
        assert report["paged_steps"] > before["paged_steps"]


def test_a_spike_ends_a_run_with_resident_state(options):
    found = spiked("resident", *options)
    assert found["plain"]["outcome"] == "finished"
    assert found["spiked"]["outcome"] == "OutOfMemoryError"
    assert found["spiked"]["figures"]["before"]["paged_steps"] == 0, "it came as far as the spike"


def test_all_pagers_train_alike(options):
    digests = {pager: spiked(pager, *options)["plain"]["digest"] for pager in PAGERS}
    assert len(set(digests.values())) == 1, digests


def test_the_card_is_given_back(options, record_property):
    for pager in PAGERS:
        found = spiked(pager, *options)
        lost = found["free"] - found["free_after"]
        record_property(f"bytes_lost_{pager}", lost)
        # Lots in which the driver takes memory, and what libraries load late.
        assert lost <= 256 << 20
