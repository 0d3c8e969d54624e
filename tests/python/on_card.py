"""What the tests of a CUDA device share: the device, inputs, and bounds.

The tests marked ``cuda``, in the files ``test_cuda_*.py``, run the kernels on the first GPU that
torch sees, and are skipped, with the reason, where there is none:

    python -m pytest -m cuda

NVIDIA's compute-sanitizer, which comes with the CUDA toolkit, watches every access to memory, and
the order of accesses to shared memory, at a hundredth of the speed; so the large tensors are left
out, and torch's caching of memory, behind which an access out of bounds would hide:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --target-processes all \\
        python -m pytest -m cuda -k "not 2_31 and not graph and not capture and not spike"
    compute-sanitizer --tool racecheck python -m pytest -m cuda tests/python/test_cuda_products.py

(Graphs need torch's caching; run ``-k "graph or capture"`` without that variable.)

What paging finds out about a driver, the tests record: ``--junitxml=FILE`` keeps it.

Truth never comes from the card: it is the bytes of the Rust core, ``reference.py``, float64 on the
CPU, ``torch.optim``, or bitsandbytes where it is installed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fourbit import Linear4bit, ops
from fourbit.quantized import QuantizedTensor
from kernel_calls import same_bytes
from tensors import product_bound

CARD = torch.device("cuda", 0)
# About half a second on any card: longer than it takes to queue a test's work behind it.
LONG_SLEEP_CYCLES = 1_000_000_000


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    """Normal numbers on the CPU, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_bytes(on_card: Tensor, on_cpu: Tensor) -> None:
    """Equal dtype, shape and bytes (any NaN equals any other)."""
    assert on_card.device.type == CARD.type
    found = on_card.detach().cpu()
    assert found.dtype == on_cpu.dtype
    assert found.shape == on_cpu.shape
    assert same_bytes(found.reshape(-1), on_cpu.detach().reshape(-1))


def assert_same_parts(on_card: QuantizedTensor, on_cpu: QuantizedTensor) -> None:
    """Equal codes and scales."""
    for ours, expected in zip(on_card._parts(), on_cpu._parts(), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            assert_same_bytes(ours, expected)


def assert_product(found: Tensor, operand: Tensor, matrix: Tensor, added: Tensor | None) -> None:
    """``found = operand @ matrix + added``, but for the roundings of `product_bound`.

    Args:
        found: on the card, [..., columns].
        operand: on the CPU, [..., depth], in the dtype of `found`.
        matrix: on the CPU, [depth, columns], rounded to that dtype.
        added: on the CPU, [columns], or None.
    """
    assert found.device.type == CARD.type
    assert found.dtype == operand.dtype
    bias = torch.zeros(()) if added is None else added.detach()
    exact = operand.double() @ matrix.double() + bias.double()
    assert found.shape == exact.shape
    error = (found.detach().cpu().double() - exact).abs()
    excess = error - product_bound(operand, matrix, bias)
    if not excess.numel():
        return
    assert bool((excess <= 0).all()), f"worst element {excess.argmax()}, above by {excess.max()}"


def layer(
    out_features: int,
    in_features: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **options: object,
) -> tuple[Linear4bit, Linear4bit]:
    """A layer on the card and its twin on the CPU, which was quantized there."""
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device="cpu")
    with torch.no_grad():
        dense.weight.copy_(numbers(out_features, in_features))
        if dense.bias is not None:
            dense.bias.copy_(numbers(out_features, seed=8))
    on_cpu = Linear4bit.from_linear(dense, **options)  # type: ignore[arg-type]
    on_card = Linear4bit.from_quantized(
        on_cpu.quantized().to(CARD),
        bias=None if dense.bias is None else dense.bias.detach().to(CARD),
    )
    return on_card, on_cpu


def parts_of(quantized: QuantizedTensor) -> tuple[Tensor | str | int | None, ...]:
    """A weight as the operators take it."""
    out_features, in_features = quantized.shape
    layout = (quantized.codebook.name, quantized.block_size, out_features, in_features)
    return (*quantized._parts(), *layout)


def need_memory(size: int) -> None:
    """Skip the test where the card has fewer free bytes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(CARD)
    if free < size:
        pytest.skip(
            f"needs {size / 2**30:.0f} GiB of free GPU memory; there are {free / 2**30:.1f}"
        )


def captured(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of some work, and its output, which each replay fills again.

    The work runs three times before, on a stream of its own, as torch asks for.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph, output


@contextlib.contextmanager
def watched_synchronisations() -> Iterator[list[str]]:
    """Collects, one entry each, the moments at which torch waits for the card."""
    found: list[str] = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in caught]
    found += [text for text in messages if "called a synchronizing CUDA operation" in text]


def linear(x: Tensor, bias: Tensor | None, quantized: QuantizedTensor) -> Tensor:
    """``fourbit::linear``."""
    packed, *rest = parts_of(quantized)
    return ops.linear(x, bias, packed, *rest)  # type: ignore[arg-type]


def linear_transposed(y: Tensor, quantized: QuantizedTensor) -> Tensor:
    """``fourbit::linear_transposed``."""
    result: Tensor = torch.ops.fourbit.linear_transposed.default(y, *parts_of(quantized))
    return result
