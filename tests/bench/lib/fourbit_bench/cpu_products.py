"""Products of the layers as a model calls them: modules, without gradients and with them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fourbit
from fourbit_bench.cpu_report import BNB, DENSE, OURS, REPACKED, Goal, Row
from fourbit_bench.cpu_timing import QUICK, Call, Clock, sets_for

Shape = tuple[int, int]
SQUARE, TALL = (4096, 4096), (14336, 4096)
SMALL = (256, 320)
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight's number in NF4 with double quantization."""

AVX2_SHARE = 0.6


def rows(clock: Clock, *, small: bool, script: Path) -> Iterator[Row]:
    """Every number of rows; `script` is the one to start for another instruction set."""
    for shape in (SQUARE, TALL):
        layers = _Layers(SMALL if small else shape, torch.bfloat16, small=small)
        more = shape == SQUARE
        yield layers.row(
            clock,
            1,
            faster=[(DENSE, 3.1), (BNB, 1.0), (REPACKED, 1.0)],
            share=0.8,
            remark=">= 5x where the dense product does not run at the memory's speed",
        )
        if more:
            yield layers.row(clock, 8, faster=[(DENSE, 2.5)])
            yield layers.row(clock, 64)
            yield layers.row(clock, 512, at_most=[(DENSE, 1.08)])
            yield layers.backward_row(clock, 512)
        del layers
    layers = _Layers(SMALL if small else SQUARE, torch.float32, small=small)
    yield layers.row(clock, 1, faster=[(DENSE, 5)])
    yield layers.row(clock, 512, at_most=[(DENSE, 1.08)])
    del layers
    yield from _avx2_rows(script, small=small)


class _Layers:
    """One matrix as a layer of every kind, in as many copies as are larger than the cache."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, small: bool) -> None:
        self.shape, self.dtype, self.small = shape, dtype, small
        dense = _dense(shape, dtype)
        self.ours = self._copies(fourbit.Linear4bit.from_linear(dense))
        theirs = _bitsandbytes(dense, dtype)
        self.theirs = {
            BNB: self._copies(_without_repack(theirs)),
            REPACKED: self._copies(_repacked(theirs)),
        }
        self.dense = self._copies(dense)

    def _copies(self, layer: nn.Module) -> list[nn.Module]:
        nbytes = sum(part.nbytes for part in layer.parameters())
        count = sets_for(nbytes, small=self.small)
        return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]

    def _name(self, work: str) -> str:
        kind = {torch.bfloat16: "bf16", torch.float32: "f32"}[self.dtype]
        return f"{work}, {self.shape[0]} x {self.shape[1]}, {kind}"

    def _calls(self, make: Callable[[Sequence[nn.Module]], Call]) -> dict[str, Call]:
        calls = {OURS: make(self.ours), DENSE: make(self.dense), BNB: make(self.theirs[BNB])}
        if getattr(self.theirs[REPACKED][0].weight.quant_state, "packing_format_for_cpu", False):
            calls[REPACKED] = make(self.theirs[REPACKED])
        return calls

    def row(
        self,
        clock: Clock,
        count: int,
        *,
        faster: Sequence[tuple[str, float]] = (),
        at_most: Sequence[tuple[str, float]] = (),
        share: float | None = None,
        remark: str = "",
    ) -> Row:
        """``x W^T`` of `count` rows, in inference mode."""
        x = torch.randn(count, self.shape[1]).to(self.dtype)
        calls = self._calls(lambda layers: lambda i: layers[i % len(layers)](x))
        with torch.inference_mode():
            seconds = clock.median_seconds(list(calls.values()))
        return Row(
            self._name(f"M = {count}"),
            dict(zip(calls, seconds, strict=True)),
            amount=PACKED * self.shape[0] * self.shape[1] if count <= 16 else None,
            faster=faster,
            at_most=at_most,
            share=share,
            remark=remark,
        )

    def backward_row(self, clock: Clock, count: int) -> Row:
        """``x W^T``, and ``dY W``."""
        x = torch.randn(count, self.shape[1]).to(self.dtype).requires_grad_()
        gradient = torch.randn(count, self.shape[0]).to(self.dtype)

        def make(layers: Sequence[nn.Module]) -> Call:
            return lambda i: torch.autograd.grad(layers[i % len(layers)](x), x, gradient)

        # A layer of bitsandbytes that has been repacked knows no backward pass.
        calls = {OURS: make(self.ours), DENSE: make(self.dense), BNB: make(self.theirs[BNB])}
        seconds = clock.median_seconds(list(calls.values()))
        return Row(
            self._name(f"M = {count}, forward + backward"),
            dict(zip(calls, seconds, strict=True)),
            at_most=[(DENSE, 1.08)],
        )


def _dense(shape: Shape, dtype: torch.dtype) -> nn.Linear:
    """A frozen layer with the spread of trained weights."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
    weight: Tensor = torch.randn(shape, generator=generator)
    weight *= 0.05 * torch.rand(shape[0], 1, generator=generator)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


def _bitsandbytes(dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        dense.weight.data.clone(), requires_grad=False, quant_type="nf4", blocksize=64
    )
    layer = layer.to("cpu")
    layer.eval()
    return layer


def _without_repack(layer: nn.Module) -> nn.Module:
    """As on a processor without AVX512-BF16: the weight is decoded in every call."""
    layer = copy.deepcopy(layer)
    layer.support_avx512bf16_for_cpu = False
    return layer


def _repacked(layer: nn.Module) -> nn.Module:
    """As after its first call in eval mode, where the processor has AVX512-BF16."""
    with torch.inference_mode():
        layer(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))
    return layer


# --- another instruction set ----------------------------------------------------------------------


def work_one_row(size: str) -> dict[str, float]:
    """In a process of its own: seconds of M = 1, bf16, with the instruction set it was told."""
    small = size == "small"
    shape = SMALL if small else SQUARE
    layer = fourbit.Linear4bit.from_linear(_dense(shape, torch.bfloat16))
    layers = [layer]
    count = sets_for(int(PACKED * shape[0] * shape[1]), small=small)
    layers += [copy.deepcopy(layer) for _ in range(count - 1)]
    x = torch.randn(1, shape[1]).to(torch.bfloat16)
    clock = QUICK if small else Clock()
    with torch.inference_mode():
        (seconds,) = clock.median_seconds([lambda i: layers[i % len(layers)](x)])
    return {"seconds": seconds}


def _avx2_rows(script: Path, *, small: bool) -> Iterator[Row]:
    """M = 1 with AVX2, against the same in another process with the fastest set."""
    from fourbit import _core

    fastest = _core.simd_backends()[-1]
    if "avx2" not in _core.simd_backends() or fastest == "avx2":
        return
    found = {}
    for name in ("avx2", fastest):
        done = subprocess.run(
            [sys.executable, script, "--work", "one-row", "small" if small else "full"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "FOURBIT_SIMD": name},
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])["seconds"]
    rows_, columns = SMALL if small else SQUARE
    yield Row(
        f"M = 1, {rows_} x {columns}, bf16, forced AVX2",
        {OURS: found["avx2"]},
        amount=PACKED * rows_ * columns,
        goals=[Goal(f"{fastest}'s time / AVX2's", found[fastest] / found["avx2"], AVX2_SHARE)],
        remark=f"{fastest}: {1e3 * found[fastest]:.3g} ms",
    )
