"""One token through linear layers of the shapes of Llama-3.1-8B: batch 1, 32 blocks.

Between the products stands what keeps numbers in range: a norm, a gate, the residual sum. There is
no attention and no head, in any of the variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourbit
from fourbit_bench.report import BNB, OURS, TORCH, Row, faster
from fourbit_bench.timing import DEVICE, Call, compare, why
from fourbit_bench.weights import BitsandbytesLinear, dense_linear, normal, weight

BLOCKS = 32
HIDDEN, KEYS, INNER = 4096, 1024, 14336
SMALL = (2, 256, 64, 512)
# Free memory that the 16-bit model may take at most, as the others must fit beside it.
DENSE_SHARE = 0.5
BNB_GRAPH = "bitsandbytes in a graph"
OURS_EAGER = "fourbit, called from Python"
TORCH_GRAPH = "torch bf16 in a graph"


def rows(*, small: bool) -> Iterator[Row]:
    """One row: ours in a graph; the others, and ours, from Python and in graphs."""
    blocks, hidden, keys, inner = SMALL if small else (BLOCKS, HIDDEN, KEYS, INNER)
    shapes = {
        "q": (hidden, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, hidden),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    elements = blocks * sum(n * k for n, k in shapes.values())
    free, _ = torch.cuda.mem_get_info(DEVICE)
    keep_dense = 2 * elements <= DENSE_SHARE * free
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] | str = []
    dense: list[dict[str, Any]] | str = [] if keep_dense else "too large for this card's memory"
    for _ in range(blocks):
        matrices = {name: dense_linear(weight(*shape)) for name, shape in shapes.items()}
        ours.append(_made(matrices, fourbit.Linear4bit.from_linear))
        if isinstance(theirs, list):
            try:
                theirs.append(_made(matrices, lambda layer: BitsandbytesLinear(layer.weight.data)))
            except Exception as error:
                theirs = why(error)
        if isinstance(dense, list):
            dense.append(matrices)
    x = normal(1, hidden)
    ours_call, theirs_call, dense_call = (_stack(model, x) for model in (ours, theirs, dense))
    with torch.no_grad():
        timings = compare(
            {
                OURS: ours_call,
                BNB: theirs_call,
                BNB_GRAPH: theirs_call,
                OURS_EAGER: ours_call,
                TORCH: dense_call,
                TORCH_GRAPH: dense_call,
            },
            1,
            eager={BNB, OURS_EAGER, TORCH},
        )
    moved = sum(layer.quantized().nbytes for block in ours for layer in block.values())
    yield Row(
        f"decode, batch 1, linears of {elements / 1e9:.2f} G weights, CUDA graph",
        timings,
        "read",
        float(moved),
        [faster(BNB, 5)],
    )


def _made(
    layers: dict[str, nn.Linear], make: Callable[[nn.Linear], nn.Module]
) -> dict[str, nn.Module]:
    return {name: make(layer) for name, layer in layers.items()}


def _stack(model: Sequence[dict[str, Any]] | str, x: Tensor) -> Call | str:
    """A token through all blocks."""
    if isinstance(model, str):
        return model

    def call(_: int) -> Tensor:
        h = x
        for block in model:
            y = F.rms_norm(h, (h.shape[-1],))
            queries, _keys, _values = block["q"](y), block["k"](y), block["v"](y)
            h = h + block["o"](queries)
            y = F.rms_norm(h, (h.shape[-1],))
            h = h + block["down"](F.silu(block["gate"](y)) * block["up"](y))
        return h

    return call
