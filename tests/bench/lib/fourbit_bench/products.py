"""Products on a packed weight: of a few rows, of many, and with the transposed weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fourbit_bench.report import BNB, OURS, TORCH, Goal, Row, faster, share
from fourbit_bench.timing import compare
from fourbit_bench.weights import Matrices, normal

SHAPES = ((4096, 4096), (14336, 4096))
SMALL_SHAPES = ((256, 512),)
FEW_ROWS = (1, 2, 4, 8, 16, 32, 64)
MANY_ROWS = (128, 512, 2048)
TRANSPOSED_ROWS = (8, 16, 32, 64)


@torch.no_grad()
def rows(*, small: bool) -> Iterator[Row]:
    """All of them, shape by shape."""
    for shape in SMALL_SHAPES if small else SHAPES:
        matrices = Matrices(*shape)
        for m in FEW_ROWS:
            yield _forward(matrices, m)
        yield _forward(matrices, 1, eager=True)
        for m in TRANSPOSED_ROWS:
            yield _transposed(matrices, m)
        for m in MANY_ROWS:
            yield _forward(matrices, m)


def _goals(m: int) -> list[Goal]:
    if m == 1:
        return [share(0.85, "read"), faster(BNB, 1)]
    if 16 <= m <= 64:
        return [faster(TORCH, 3), faster(BNB, 1)]
    return []


def _forward(matrices: Matrices, m: int, *, eager: bool = False) -> Row:
    out_features, in_features = matrices.shape
    inputs = [normal(m, in_features) for _ in range(matrices.sets)]
    timings = compare(
        {
            OURS: lambda i: matrices.ours[i](inputs[i]),
            TORCH: lambda i: matrices.dense[i](inputs[i]),
            BNB: matrices.with_theirs(lambda layers: lambda i: layers[i](inputs[i])),
        },
        matrices.sets,
        eager={OURS, TORCH, BNB} if eager else (),
    )
    called = ", called from Python" if eager else ""
    name = f"x W^T, {out_features} x {in_features}, M = {m}{called}"
    if m > FEW_ROWS[-1]:
        return Row(name, timings, "GEMM", 2.0 * m * matrices.elements)
    moved = matrices.nbytes + 2.0 * m * (out_features + in_features)
    return Row(name, timings, "read", moved, () if eager else _goals(m))


def _transposed(matrices: Matrices, m: int) -> Row:
    out_features, in_features = matrices.shape
    inputs = [normal(m, out_features) for _ in range(matrices.sets)]

    def ours(i: int) -> torch.Tensor:
        quantized = matrices.ours[i].quantized()
        layout = (quantized.codebook.name, quantized.block_size, out_features, in_features)
        result: torch.Tensor = torch.ops.fourbit.linear_transposed.default(
            inputs[i], *quantized._parts(), *layout
        )
        return result

    timings = compare(
        {
            OURS: ours,
            TORCH: lambda i: inputs[i] @ matrices.dense[i].weight,
            # As in its backward pass.
            BNB: matrices.with_theirs(lambda layers: lambda i: inputs[i] @ layers[i].dequantize()),
        },
        matrices.sets,
    )
    moved = matrices.nbytes + 2.0 * m * (out_features + in_features)
    return Row(f"y W, {out_features} x {in_features}, M = {m}", timings, "read", moved)
