"""A QLoRA linear forward and backward, against the same code with 16-bit weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.lora.layer import LoraLinear
from fourbit_bench.report import BNB, OURS, Row, at_most
from fourbit_bench.timing import Call, Timing, compare
from fourbit_bench.weights import Matrices, normal

SHAPE = (14336, 4096)
SMALL_SHAPE = (256, 512)
RANK = 64
# Tokens, and how many times the 16-bit layer's time ours may take.
TOKENS = ((1024, 1.15), (2048, 1.08), (4096, 1.04))
LORA_SHARE = 0.03
DENSE = "bf16 weights"
WITHOUT = "fourbit without LoRA"


def rows(*, small: bool) -> Iterator[Row]:
    """For each number of tokens: the layer with LoRA, in all formats, and ours without."""
    matrices = Matrices(*(SMALL_SHAPE if small else SHAPE), most=4)
    out_features, in_features = matrices.shape
    ours = _with_lora(matrices.ours)
    dense = _with_lora(matrices.dense)
    theirs = matrices.with_theirs(_with_lora)
    for tokens, times in TOKENS:
        tokens = tokens // 16 if small else tokens
        inputs = [normal(tokens, in_features).requires_grad_() for _ in range(matrices.sets)]
        gradients = [normal(tokens, out_features) for _ in range(matrices.sets)]

        def step(
            layers: Sequence[nn.Module],
            inputs: list[Tensor] = inputs,
            gradients: list[Tensor] = gradients,
        ) -> Call:
            def call(i: int) -> object:
                wanted = [inputs[i], *(p for p in layers[i].parameters() if p.requires_grad)]
                return torch.autograd.grad(layers[i](inputs[i]), wanted, gradients[i])

            return call

        timings = compare(
            {
                OURS: step(ours),
                DENSE: step(dense),
                BNB: theirs if isinstance(theirs, str) else step(theirs),
                WITHOUT: step(matrices.ours),
            },
            matrices.sets,
        )
        base = 4.0 * tokens * matrices.elements
        side = 6.0 * tokens * RANK * (in_features + out_features)
        yield Row(
            f"QLoRA linear, {out_features} x {in_features}, r {RANK}, {tokens} tokens, "
            "forward + backward",
            timings,
            "GEMM",
            base + side,
            [at_most(times, DENSE)],
            list(_lora_share(timings[OURS], timings[WITHOUT])),
        )


def _with_lora(layers: Sequence[Any]) -> list[nn.Module]:
    """Adapters in bf16, as training under autocast computes them; B is not zero."""
    return [
        LoraLinear(layer, r=RANK, lora_alpha=16, init_lora_weights=False, dtype=torch.bfloat16)
        for layer in layers
    ]


def _lora_share(
    whole: Timing | str, without: Timing | str
) -> Iterator[tuple[str, float, float | None]]:
    if isinstance(whole, Timing) and isinstance(without, Timing):
        added = whole.milliseconds / without.milliseconds - 1
        yield "LoRA side over the linear", added, LORA_SHARE
