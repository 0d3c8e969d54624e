"""A QLoRA step of a small Llama, each format in a process of its own, so that peaks are its own."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fourbit
from fourbit_bench.cpu_models import KINDS, in_format, linear_elements, llama
from fourbit_bench.cpu_products import PACKED
from fourbit_bench.cpu_report import BNB, DENSE, OURS, Goal, Row
from fourbit_bench.memory import give_back_memory, peak_memory, reset_peak_memory

RANK, TOKENS, STEPS, TURNS = 64, 512, 2, 2
KEPT = 1 << 20
"""Bytes of the largest piece of freed memory that the C library keeps, where peaks are taken."""


def rows(*, small: bool, script: Path) -> Iterator[Row]:
    """Processes of all formats take turns.

    Peaks are those of processes of their own, in which the C library keeps no freed memory. What it
    keeps by default depends on the largest thing that was ever freed, which where a model is
    quantized is a weight in 16 bits, and makes up to a quarter of what is saved.
    """
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(1 if small else TURNS):
        for kind in KINDS:
            if turn == 0 or kind != "bitsandbytes":
                results[kind].append(_in_fresh_process(script, kind, small=small))
    columns = {"fourbit": OURS, "bf16": DENSE, "bitsandbytes": BNB}
    seconds = {
        columns[kind]: statistics.median(result["seconds"] for result in found)
        for kind, found in results.items()
    }
    peaks = {
        columns[kind]: _in_fresh_process(script, kind, small=small, keep=KEPT)["peak"]
        for kind in KINDS
    }
    saved = (2 - PACKED) * results["fourbit"][0]["elements"]
    lower = (peaks[DENSE] - peaks[OURS]) / saved
    kept = [
        statistics.median(result["peak"] for result in results[kind])
        for kind in ("bf16", "fourbit")
    ]
    yield Row(
        f"QLoRA step, r {RANK}, {TOKENS if not small else 16} tokens, checkpointing",
        seconds,
        at_most=[(DENSE, 1.05)],
        goals=[Goal("peak memory lower, in saved weight bytes", lower, 1.0)],
        peaks=peaks,
        remark=(
            "torch: the same code with bf16 weights; bitsandbytes: its layers and PEFT; with what "
            f"the C library keeps, {(kept[0] - kept[1]) / saved:.2f} of the saved bytes"
        ),
    )


def work_step(kind: str, size: str) -> dict[str, float]:
    """In a process of its own: median seconds of a step, the steps' peak memory, and elements."""
    small = size == "small"
    model = llama(small=small)
    elements = linear_elements(model)
    model = _with_adapters(in_format(model, kind), kind).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(0, 500, (1, 16 if small else TOKENS))
    gc.collect()
    give_back_memory()
    reset_peak_memory()
    times = []
    for _ in range(1 + (1 if small else STEPS)):
        started = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(times[1:]),
        "peak": peak_memory(),
        "elements": elements,
    }


def _with_adapters(model: Any, kind: str) -> Any:
    if kind != "bitsandbytes":
        return fourbit.add_lora(model, r=RANK, lora_dropout=0.0, seed=0)
    import peft

    for part in model.parameters():
        part.requires_grad_(False)
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", lora_dropout=0.0)
    return peft.get_peft_model(model, config)


def _in_fresh_process(
    script: Path, kind: str, *, small: bool, keep: int | None = None
) -> dict[str, float]:
    command = [sys.executable, script, "--work", "step", kind, "small" if small else "full"]
    environment = (
        os.environ if keep is None else {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(keep)}
    )
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result
