"""From how many rows on another kernel is the faster one: for the constants of ``cuda_ops``.

`_CROSSOVER` says above how many rows the weight is decoded for the vendor's GEMM, and
`_MATVEC_BEFORE_TENSOR` up to how many rows the matrix-vector kernel is taken. Here every route is
taken at every number of rows that it can be taken at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fourbit import cuda_ops
from fourbit_bench.products import SHAPES, SMALL_SHAPES
from fourbit_bench.report import Row
from fourbit_bench.timing import Call, Timing, compare
from fourbit_bench.weights import Matrices, normal

ROWS = (1, 2, 3, 4, 5, 6, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TENSOR, MATVEC, DECODED = "tensor cores", "matrix-vector", "decoded + GEMM"


@torch.no_grad()
def rows(*, small: bool) -> Iterator[Row]:
    """A row for each number of rows: tensor cores first, then the other routes."""
    for shape in SMALL_SHAPES if small else SHAPES:
        matrices = Matrices(*shape)
        out_features, in_features = shape
        most = cuda_ops._TENSOR_ROWS[-1]
        for m in ROWS:
            if m > most:
                break
            x = [normal(m, in_features) for _ in range(matrices.sets)]
            y = [normal(m, out_features) for _ in range(matrices.sets)]
            forward = _forward(matrices, x)
            calls: dict[str, Call | str] = {
                TENSOR: _taken(forward, TENSOR),
                DECODED: _taken(forward, DECODED),
            }
            if m <= cuda_ops._MATVEC_ROWS[-1]:
                calls[MATVEC] = _taken(forward, MATVEC)
            name = f"{out_features} x {in_features}, M = {m}"
            yield Row(f"routes of x W^T, {name}", compare(calls, matrices.sets))
            backward = _backward(matrices, y)
            calls = {which: _taken(backward, which) for which in (TENSOR, DECODED)}
            yield Row(f"routes of y W, {name}", compare(calls, matrices.sets))


def crossovers(measured: list[Row]) -> Iterator[str]:
    """What the rows say of the constants, one sentence a product and shape."""
    groups: dict[str, list[tuple[int, Row]]] = {}
    for row in measured:
        name, found, m = row.name.rpartition(", M = ")
        if found:
            groups.setdefault(name, []).append((int(m), row))
    for name, points in groups.items():
        for other in (DECODED, MATVEC):
            wins, loses = [], []
            for m, row in points:
                timing = row.timings.get(other)
                if isinstance(row.ours, Timing) and isinstance(timing, Timing):
                    faster = row.ours.milliseconds <= timing.milliseconds
                    (wins if faster else loses).append(m)
            if wins or loses:
                yield (
                    f"{name}: against {other}, tensor cores win at M = {_listed(wins)} and lose "
                    f"at M = {_listed(loses)}"
                )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _forward(matrices: Matrices, inputs: list[Tensor]) -> Call:
    return lambda i: matrices.ours[i](inputs[i])


def _backward(matrices: Matrices, inputs: list[Tensor]) -> Call:
    def call(i: int) -> object:
        quantized = matrices.ours[i].quantized()
        layout = (quantized.codebook.name, quantized.block_size, *quantized.shape)
        parts = quantized._parts()
        return torch.ops.fourbit.linear_transposed.default(inputs[i], *parts, *layout)

    return call


def _taken(call: Call, which: str) -> Call:
    """The call, by one route alone."""
    original: Callable[..., bool] = cuda_ops._on_tensor_cores

    def always(operand: Tensor, rows: int, in_features: int, fewest: int = 1) -> bool:
        if not original(operand, rows, in_features, 1):
            raise RuntimeError(f"this card's tensor cores do not take {rows} rows")
        return True

    changes: dict[str, Any] = {
        TENSOR: {"_CROSSOVER": 1 << 30, "_on_tensor_cores": always},
        MATVEC: {"_CROSSOVER": 1 << 30, "_on_tensor_cores": lambda *_, **__: False},
        DECODED: {"_CROSSOVER": 0},
    }[which]

    def routed(i: int) -> object:
        with _changed(changes):
            return call(i)

    return routed


@contextlib.contextmanager
def _changed(changes: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(cuda_ops, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(cuda_ops, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(cuda_ops, name, value)
