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


def _weight_memory(shape: tuple[int, int], operand: Tensor) -> Tensor:
    """Memory for a decoded weight; for a large one, memory that this thread uses again and again.

    Large tensors are new memory each time, and for the system to provide that takes several times
    as long as decoding into it. What is kept is as large as the largest weight so far.
    """
    size = shape[0] * shape[1] * operand.dtype.itemsize
    in_graph = torch.is_grad_enabled() and operand.requires_grad  # which could hold on to it
    if size < _SMALLEST_WORKSPACE or in_graph:
        return torch.empty(shape, dtype=operand.dtype)
    buffer: Tensor | None = getattr(_workspaces, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _workspaces.buffer = None  # the old memory goes before the new comes
        with torch.inference_mode(mode=False):  # the thread may leave that mode
            buffer = torch.empty(size, dtype=torch.uint8)
        _workspaces.buffer = buffer
    return buffer[:size].view(operand.dtype).view(shape)


@cache
def _fused_rows(dtype: torch.dtype, code_bits: int, block_size: int, in_features: int) -> int:
    name = str(dtype).removeprefix("torch.")
    return _core.fused_rows(name, code_bits, block_size, in_features)


def _is_fused(
    operand: Tensor, depth: int, in_features: int, code_bits: int, block_size: int
) -> bool:
    """Whether a product is best made from the codes, without a decoded weight in memory."""
    if torch.is_grad_enabled() and operand.requires_grad:  # whose graph torch is to record
        return False
    most = _fused_rows(operand.dtype, code_bits, block_size, in_features)
    return operand.numel() <= most * depth


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
    book = by_name(codebook)
    if _is_fused(x, in_features, in_features, book.code_bits, block_size):
        output = x.new_empty(*x.shape[:-1], out_features)
        _core.linear(
            x.contiguous(),
            packed.contiguous(),
            absmax.contiguous(),
            nested_absmax,
            nested_offset,
            book.core,
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
    book = by_name(codebook)
    if _is_fused(y, out_features, in_features, book.code_bits, block_size):
        output = y.new_empty(*y.shape[:-1], in_features)
        _core.linear_transposed(
            y.contiguous(),
            packed.contiguous(),
            absmax.contiguous(),
            nested_absmax,
            nested_offset,
            book.core,
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
