"""Quantize and dequantize one matrix, against bitsandbytes and against a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import bitsandbytes.functional as functional
import torch

import fourbit
from fourbit import _core
from fourbit_bench.cpu_report import BNB, OURS, Row
from fourbit_bench.cpu_timing import Call, Clock

SHAPE = (4096, 11008)
SMALL = (512, 1376)
ROTATION = 8
"""Of 113 MB read and written together."""


def weights(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Matrices with the spread of trained weights; together larger than the cache."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(shape[0], 1, generator=generator) * 0.05
    return [
        (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)
        for _ in range(ROTATION)
    ]


def rows(clock: Clock, *, small: bool) -> Iterator[Row]:
    """As users call them, and with outputs that are reused."""
    inputs = weights(SMALL if small else SHAPE)
    elements = inputs[0].numel()
    book = fourbit.codebook.by_name("nf4").core
    threads = torch.get_num_threads()
    packed = [torch.zeros((elements + 1) // 2, dtype=torch.uint8) for _ in inputs]
    absmax = [torch.zeros(-(-elements // 64)) for _ in inputs]
    codes = [torch.zeros(scales.numel(), dtype=torch.uint8) for scales in absmax]
    nested_absmax = [torch.zeros(-(-scales.numel() // 256)) for scales in absmax]
    outputs = [torch.zeros_like(w) for w in inputs]
    quantized = [fourbit.quantize(w) for w in inputs]
    plain = [fourbit.quantize(w, double_quant=False) for w in inputs]
    theirs = [functional.quantize_4bit(w, blocksize=64, quant_type="nf4") for w in inputs]

    def bnb_quantize(double: bool) -> Callable[[int], object]:
        return lambda i: functional.quantize_4bit(
            inputs[i % ROTATION], blocksize=64, quant_type="nf4", compress_statistics=double
        )

    def bnb_dequantize(i: int) -> object:
        codes, state = theirs[i % ROTATION]
        return functional.dequantize_4bit(codes, state)

    def reused_quantize(i: int) -> object:
        i %= ROTATION
        return _core.quantize(inputs[i], book, 64, packed[i], absmax[i], threads=threads)

    def reused_quantize_double(i: int) -> object:
        reused_quantize(i)
        i %= ROTATION
        return _core.quantize_absmax(absmax[i], codes[i], nested_absmax[i], threads=threads)

    def reused_dequantize(i: int) -> object:
        i %= ROTATION
        q = plain[i]
        return _core.dequantize(q.packed, q.scales(), book, 64, outputs[i], threads=threads)

    works: tuple[tuple[str, Call, Call, float, float, float | None], ...] = (
        (
            "quantize nf4",
            lambda i: fourbit.quantize(inputs[i % ROTATION], double_quant=False),
            bnb_quantize(False),
            2.5625,
            100,
            None,
        ),
        (
            "quantize nf4 + double",
            lambda i: fourbit.quantize(inputs[i % ROTATION]),
            bnb_quantize(True),
            2.516,
            150,
            None,
        ),
        (
            "dequantize nf4 + double",
            lambda i: quantized[i % ROTATION].dequantize(),
            bnb_dequantize,
            2.516,
            4.5,
            None,
        ),
        (
            "quantize nf4, outputs reused",
            reused_quantize,
            bnb_quantize(False),
            2.5625,
            100,
            0.5,
        ),
        (
            "quantize nf4 + double, outputs reused",
            reused_quantize_double,
            bnb_quantize(True),
            2.516,
            150,
            0.5,
        ),
        ("dequantize nf4, output reused", reused_dequantize, bnb_dequantize, 2.5625, 4.5, 0.8),
    )
    for name, ours, peer, moved, goal, share in works:
        mine, other = clock.median_seconds([ours, peer])
        yield Row(
            name,
            {OURS: mine, BNB: other},
            amount=moved * elements,
            floor="copy",
            faster=[(BNB, goal)],
            share=share,
        )
