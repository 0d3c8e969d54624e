"""The operators of `ops` for CPU tensors: checks, memory from torch, and calls into the core."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

from fourbit import _core
from fourbit.codebook import by_name
from fourbit.layout import NESTED_BLOCK_SIZE, block_count, packed_bytes
from fourbit.operands import check_float, check_operand, dense_linear, float_bytes, float_values


def quantize(input: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: A002
    """`ops.quantize`."""
    check_float(input, "the input")
    book = by_name(codebook)
    count = input.numel()
    packed = torch.empty((packed_bytes(count, book.code_bits), 1), dtype=torch.uint8)
    absmax = torch.empty(block_count(count, block_size), dtype=torch.float32)
    _core.quantize(
        input.detach().contiguous(),
        book.core,
        block_size,
        packed,
        absmax,
        threads=torch.get_num_threads(),
    )
    return packed, absmax


def _plain_absmax(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """Scales as float32 [blocks], whatever they are stored as."""
    if nested_absmax is None:
        return float_values(absmax)
    if offset is None:
        raise ValueError("nested_absmax is given without nested_offset")
    scales = torch.empty(absmax.numel(), dtype=torch.float32)
    _core.dequantize_absmax(
        absmax.contiguous(),
        float_values(nested_absmax),
        float_values(offset).item(),
        scales,
        threads=torch.get_num_threads(),
    )
    return scales


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """`ops.dequantize`."""
    output = torch.empty(shape, dtype=dtype)
    check_float(output, "dtype")
    scales = _plain_absmax(absmax, nested_absmax, nested_offset)
    return _decode(packed, scales, codebook, block_size, output)


def _decode(
    packed: Tensor, scales: Tensor, codebook: str, block_size: int, output: Tensor
) -> Tensor:
    _core.dequantize(
        packed.contiguous(),
        scales,
        by_name(codebook).core,
        block_size,
        output,
        threads=torch.get_num_threads(),
    )
    return output


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize_absmax`."""
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    nested = torch.empty(block_count(absmax.numel(), NESTED_BLOCK_SIZE), dtype=torch.float32)
    threads = torch.get_num_threads()
    offset = _core.quantize_absmax(absmax.contiguous(), codes, nested, threads=threads)
    return codes, float_bytes(nested), float_bytes(torch.tensor([offset], dtype=torch.float32))


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """`ops.dequantize_absmax`."""
    return _plain_absmax(codes, nested_absmax, nested_offset)


_workspaces = threading.local()
_SMALLEST_WORKSPACE = 1 << 20


def _is_recorded(operand: Tensor) -> bool:
    """Whether torch is to record the graph of what is done with an operand."""
    return torch.is_grad_enabled() and operand.requires_grad


def _weight_memory(shape: tuple[int, int], operand: Tensor) -> Tensor:
    """Memory for a decoded weight; for a large one, memory that this thread uses again and again.

    Large tensors are new memory each time, and for the system to provide that takes several times
    as long as decoding into it. What is kept is as large as the largest weight so far.
    """
    size = shape[0] * shape[1] * operand.dtype.itemsize
    if size < _SMALLEST_WORKSPACE or _is_recorded(operand):  # by a graph, which could hold on to it
        return torch.empty(shape, dtype=operand.dtype)
    buffer: Tensor | None = getattr(_workspaces, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _workspaces.buffer = None  # the old memory goes before the new comes
        with torch.inference_mode(mode=False):  # the thread may leave that mode
            buffer = torch.empty(size, dtype=torch.uint8)
        _workspaces.buffer = buffer
    return buffer[:size].view(operand.dtype).view(shape)


@cache
def _plan(
    codebook: str, dtype: torch.dtype, block_size: int, in_features: int
) -> tuple[_core.Codebook, int]:
    """A codebook's twin in the core, and how many rows are best multiplied there.

    More are best multiplied by torch with a decoded weight. One look-up, as a layer's call finds
    all that it looks at driven out of the cache.
    """
    book = by_name(codebook)
    name = str(dtype).removeprefix("torch.")
    return book.core, _core.fused_rows(name, book.code_bits, block_size, in_features)


def linear(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`ops.linear`."""
    check_operand(x, in_features, "the input")
    if bias is not None:
        bias = bias.to(x.dtype)
    core, most_rows = _plan(codebook, x.dtype, block_size, in_features)
    if x.numel() <= most_rows * in_features and not _is_recorded(x):
        output = x.new_empty(*x.shape[:-1], out_features)
        _core.linear(
            x.contiguous(),
            packed.contiguous(),
            absmax.contiguous(),
            nested_absmax,
            nested_offset,
            core,
            block_size,
            (out_features, in_features),
            bias if bias is None else bias.contiguous(),
            output,
            threads=torch.get_num_threads(),
        )
        return output
    scales = _plain_absmax(absmax, nested_absmax, nested_offset)
    memory = _weight_memory((out_features, in_features), x)
    weight = _decode(packed, scales, codebook, block_size, memory)
    return dense_linear(x, weight, bias)


def linear_transposed(
    y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`ops.linear_transposed`."""
    check_operand(y, out_features, "the gradient")
    core, most_rows = _plan(codebook, y.dtype, block_size, in_features)
    if y.numel() <= most_rows * out_features and not _is_recorded(y):
        output = y.new_empty(*y.shape[:-1], in_features)
        _core.linear_transposed(
            y.contiguous(),
            packed.contiguous(),
            absmax.contiguous(),
            nested_absmax,
            nested_offset,
            core,
            block_size,
            (out_features, in_features),
            output,
            threads=torch.get_num_threads(),
        )
        return output
    scales = _plain_absmax(absmax, nested_absmax, nested_offset)
    memory = _weight_memory((out_features, in_features), y)
    weight = _decode(packed, scales, codebook, block_size, memory)
    return y @ weight
