"""Greedy decoding by transformers' ``generate``, one sequence, with a cache."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from fourbit_bench.cpu_models import in_format, linear_elements, llama
from fourbit_bench.cpu_products import PACKED
from fourbit_bench.cpu_report import BNB, DENSE, OURS, REPACKED, Row

PROMPT = 16
TOKENS = 32
TURNS = 3


def rows(*, small: bool) -> Iterator[Row]:
    """Seconds a token; models take turns."""
    dense = llama(small=small)
    elements = linear_elements(dense)
    head = dense.get_output_embeddings().weight.nbytes
    theirs = in_format(copy.deepcopy(dense), "bitsandbytes")
    models = {OURS: in_format(copy.deepcopy(dense), "fourbit"), DENSE: dense, REPACKED: theirs}
    tokens, turns = (2, 1) if small else (TOKENS, TURNS)
    prompt = torch.randint(0, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    # Without the repack it decodes every weight in every call; few tokens are enough to see that.
    unpacked = copy.deepcopy(theirs)
    for module in unpacked.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    taken: dict[str, list[float]] = {OURS: [], DENSE: [], REPACKED: []}
    for model in models.values():
        _seconds_a_token(model, prompt, 2)
    for _ in range(turns):
        for name, model in models.items():
            taken[name].append(_seconds_a_token(model, prompt, tokens))
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    seconds[BNB] = _seconds_a_token(unpacked, prompt, 2)
    if not _was_repacked(theirs):
        del seconds[REPACKED]
    yield Row(
        f"greedy decode, {elements / 1e6:.0f} M in linear layers, a token",
        seconds,
        amount=PACKED * elements + head,
        faster=[(BNB, 4), (REPACKED, 4), (DENSE, 3)],
        remark=f"{1 / seconds[OURS]:.1f} tokens/s; the head in bf16",
    )


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when ``generate`` hands over the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _seconds_a_token(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """The median over those after the first, which reads the prompt."""
    clock = _Clock()
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=1 + tokens,
            max_new_tokens=1 + tokens,
            do_sample=False,
            streamer=clock,
        )
    _, *made = clock.times
    return statistics.median(after - before for before, after in itertools.pairwise(made))


def _was_repacked(model: Any) -> bool:
    states = (getattr(part, "quant_state", None) for part in model.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)
