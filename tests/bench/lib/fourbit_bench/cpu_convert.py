"""Convert a checkpoint, against load-and-save through transformers and bitsandbytes."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fourbit
from fourbit_bench.cpu_models import llama
from fourbit_bench.cpu_report import BNB, OURS, Row
from fourbit_bench.memory import peak_memory

FASTER = 10


def rows(*, small: bool, script: Path) -> Iterator[Row]:
    """Each in processes of its own, in turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = llama(small=small)
        model.save_pretrained(folder / "source", max_shard_size="500MB")
        total = sum(part.nbytes for part in model.parameters())
        del model
        ours, theirs = [], []
        for turn in range(1 if small else 3):
            for work, results in (("fourbit", ours), ("bitsandbytes", theirs)):
                target = folder / f"{work}-{turn}"
                results.append(_in_fresh_process(script, work, folder / "source", target))
    figures = {OURS: ours, BNB: theirs}
    yield Row(
        f"convert {total / 1e6:.0f} MB",
        {name: statistics.median(r["seconds"] for r in found) for name, found in figures.items()},
        amount=total,
        faster=[(BNB, FASTER)],
        peaks={
            name: statistics.median(r["peak"] for r in found) for name, found in figures.items()
        },
    )


def work_convert(kind: str, source: str, destination: str) -> dict[str, float]:
    """In a process of its own: seconds, and peak bytes over those after the import."""
    seconds, peak = {"fourbit": _fourbit, "bitsandbytes": _bitsandbytes}[kind](source, destination)
    return {"seconds": seconds, "peak": peak}


def _fourbit(source: str, destination: str) -> tuple[float, int]:
    baseline = _resident_bytes()
    started = time.perf_counter()
    fourbit.convert(source, destination)
    return time.perf_counter() - started, peak_memory() - baseline


def _bitsandbytes(source: str, destination: str) -> tuple[float, int]:
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    baseline = _resident_bytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(destination)
    return time.perf_counter() - started, peak_memory() - baseline


def _resident_bytes() -> int:
    """Memory of this process now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def _in_fresh_process(script: Path, work: str, source: Path, destination: Path) -> dict[str, float]:
    command = [sys.executable, script, "--work", "convert", work, str(source), str(destination)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result
