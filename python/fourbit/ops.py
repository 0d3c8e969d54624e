"""The operators: ``torch.library`` schemas, their shapes for tracing, and the calls into the core.

Everything above this module works with tensors and never sees the Rust module. Operators:

=============================  ===================================================================
``fourbit::quantize``          tensor -> packed codes, scales
``fourbit::dequantize``        packed codes, scales -> tensor
``fourbit::quantize_absmax``   scales -> 8-bit codes, their scales, offset (double quantization)
``fourbit::dequantize_absmax`` and back
``fourbit::linear``            ``x W^T + b`` on a packed weight
``fourbit::linear_transposed`` ``y W`` on a packed weight: the backward pass of the above
=============================  ===================================================================

Quantized weights travel as uint8 tensors alone: float32 constants are bit-cast, so that no cast
of a model's dtype can touch them. ``nested_absmax is None`` says that ``absmax`` holds plain
float32 scales; otherwise it holds the 8-bit codes of double quantization.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fourbit import _core
from fourbit.codebook import by_name
from fourbit.layout import NESTED_BLOCK_SIZE, block_count, packed_bytes

_library = torch.library.Library("fourbit", "DEF")

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def float_bytes(constants: Tensor) -> Tensor:
    """float32 [n] as its bytes, uint8 [4 n], without a copy."""
    return constants.contiguous().view(torch.uint8)


def float_values(stored: Tensor) -> Tensor:
    """The inverse of `float_bytes`; copies only where the bytes are not aligned."""
    if stored.data_ptr() % 4 or stored.storage_offset() % 4 or not stored.is_contiguous():
        stored = stored.clone(memory_format=torch.contiguous_format)
    return stored.view(-1).view(torch.float32)


# --- blockwise quantization ---------------------------------------------------------------------

_library.define("quantize(Tensor input, str codebook, int block_size) -> (Tensor, Tensor)")
_library.define(
    "dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "str codebook, int block_size, SymInt[] shape, ScalarType dtype) -> Tensor"
)


def check_float(tensor: Tensor, what: str) -> None:
    """That a tensor is of a dtype that can be quantized and multiplied."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} is {tensor.dtype}; use float32, float16 or bfloat16")


@torch.library.impl(_library, "quantize", "CPU")
def _quantize_cpu(input: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: A002
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


@torch.library.register_fake("fourbit::quantize")
def _quantize_fake(input: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: A002
    check_float(input, "the input")
    count = input.numel()
    packed = input.new_empty(
        (packed_bytes(count, by_name(codebook).code_bits), 1), dtype=torch.uint8
    )
    return packed, input.new_empty(block_count(count, block_size), dtype=torch.float32)


def quantize(input: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Blockwise absmax quantization of a tensor of any shape.

    Args:
        input: float32, float16 or bfloat16.
        codebook: a codebook's name.
        block_size: 32, 64, ... 4096.

    Returns:
        Packed codes, uint8 [bytes, 1]; scales, float32 [blocks].

    Raises:
        NonFiniteError: naming the first element that is NaN or infinite.
        ValueError: unknown codebook or block size.
        TypeError: another dtype.
    """
    return torch.ops.fourbit.quantize.default(input, codebook, block_size)  # type: ignore[no-any-return]


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


@torch.library.impl(_library, "dequantize", "CPU")
def _dequantize_cpu(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
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


@torch.library.register_fake("fourbit::dequantize")
def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """Numbers again: ``values[code] * scale`` in float32, rounded once to `dtype`.

    Args:
        packed: uint8, as `quantize` gives it.
        absmax: uint8: bytes of the float32 scales, or the 8-bit codes of double quantization.
        nested_absmax: uint8: bytes of the float32 scales of these codes; None without double
            quantization.
        nested_offset: uint8 [4]: bytes of the float32 offset; None without double quantization.
        codebook: a codebook's name.
        block_size: 32, 64, ... 4096.
        shape: of the result.
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: sizes that do not agree with `shape`.
    """
    return torch.ops.fourbit.dequantize.default(  # type: ignore[no-any-return]
        packed, absmax, nested_absmax, nested_offset, codebook, block_size, list(shape), dtype
    )


# --- double quantization ------------------------------------------------------------------------

_library.define("quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)")
_library.define(
    "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_offset) -> Tensor"
)


@torch.library.impl(_library, "quantize_absmax", "CPU")
def _quantize_absmax_cpu(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    nested = torch.empty(block_count(absmax.numel(), NESTED_BLOCK_SIZE), dtype=torch.float32)
    threads = torch.get_num_threads()
    offset = _core.quantize_absmax(absmax.contiguous(), codes, nested, threads=threads)
    return codes, float_bytes(nested), float_bytes(torch.tensor([offset], dtype=torch.float32))


@torch.library.register_fake("fourbit::quantize_absmax")
def _quantize_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def empty(count: int) -> Tensor:
        return absmax.new_empty(count, dtype=torch.uint8)

    nested = block_count(absmax.numel(), NESTED_BLOCK_SIZE)
    return empty(absmax.numel()), empty(4 * nested), empty(4)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization (paper, section 3).

    Args:
        absmax: float32 [blocks].

    Returns:
        Codes, uint8 [blocks]; bytes of their float32 scales, uint8 [4 * ceil(blocks / 256)]; bytes
        of the float32 offset, uint8 [4].
    """
    return torch.ops.fourbit.quantize_absmax.default(absmax)  # type: ignore[no-any-return]


@torch.library.impl(_library, "dequantize_absmax", "CPU")
def _dequantize_absmax_cpu(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return _plain_absmax(codes, nested_absmax, nested_offset)


@torch.library.register_fake("fourbit::dequantize_absmax")
def _dequantize_absmax_fake(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=torch.float32)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The inverse of `quantize_absmax`: float32 [blocks]."""
    return torch.ops.fourbit.dequantize_absmax.default(  # type: ignore[no-any-return]
        codes, nested_absmax, nested_offset
    )


# --- products -----------------------------------------------------------------------------------

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "str codebook, int block_size, SymInt out_features, SymInt in_features"
)
_library.define(f"linear(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
_library.define(f"linear_transposed(Tensor y, {_WEIGHT}) -> Tensor")


def check_operand(operand: Tensor, features: int, name: str) -> None:
    """That the last dimension of an operand is the layer's."""
    check_float(operand, name)
    if operand.ndim == 0:
        raise ValueError(f"{name} is a single number, and the layer has {features} features")
    if operand.shape[-1] != features:
        raise ValueError(
            f"{name} has {operand.shape[-1]} features in its last dimension, "
            f"and the layer has {features}"
        )


def check_device(operand: Tensor, packed: Tensor) -> None:
    """That an operand is where the layer is."""
    # A layer that was never filled would otherwise give outputs without data.
    if operand.device != packed.device:
        raise RuntimeError(
            f"the input is on {operand.device} and the layer on {packed.device}; "
            "load the layer's weight, or move one of them"
        )


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


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` of a decoded weight, in memory of its own.

    torch's own product is a view of another tensor for inputs that are not 2-D, and torch up to
    2.12 lets nobody add to such an output of an operator in place.
    """
    if torch.is_grad_enabled() and x.requires_grad:  # torch records no graph of products into `out`
        return torch.nn.functional.linear(x, weight, bias)
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, out = x.reshape(-1, weight.shape[1]), output.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias.detach(), rows, weight.T, out=out)
    return output


@torch.library.impl(_library, "linear", "CPU")
def _linear_cpu(
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


@torch.library.register_fake("fourbit::linear")
def _linear_fake(
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
    check_operand(x, in_features, "the input")
    check_device(x, packed)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl(_library, "linear_transposed", "CPU")
def _linear_transposed_cpu(
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


@torch.library.register_fake("fourbit::linear_transposed")
def _linear_transposed_fake(
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
    check_operand(y, out_features, "the gradient")
    check_device(y, packed)
    return y.new_empty((*y.shape[:-1], in_features))


# --- CUDA ---------------------------------------------------------------------------------------


def _on_cuda(name: str) -> Callable[..., Any]:
    """The operator of that name in `cuda_ops`, which is imported when it is first called."""

    def call(*arguments: Any) -> Any:
        from fourbit import cuda_ops

        return getattr(cuda_ops, name)(*arguments)

    return call


for _name in (
    "quantize",
    "dequantize",
    "quantize_absmax",
    "dequantize_absmax",
    "linear",
    "linear_transposed",
):
    _library.impl(_name, _on_cuda(_name), "CUDA")


# --- gradients ----------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """The product and its gradient.

    The frozen weight has no gradient, and nothing of it is decoded for the graph: the packed
    tensors themselves are all that backward needs.
    """

    @staticmethod
    def forward(ctx, x, bias, packed, absmax, nested_absmax, nested_offset, *layout):  # type: ignore[no-untyped-def]
        ctx.layout = layout
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
        return torch.ops.fourbit.linear.default(
            x, bias, packed, absmax, nested_absmax, nested_offset, *layout
        )

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = (*ctx.saved_tensors, *ctx.layout)
            if torch.is_grad_enabled() and gradient.requires_grad:
                grad_x = _LinearTransposed.apply(gradient, *weight)
            else:
                grad_x = torch.ops.fourbit.linear_transposed.default(gradient, *weight)
        if ctx.needs_input_grad[1]:
            grad_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, *([None] * 8)


class _LinearTransposed(torch.autograd.Function):
    """The gradient of `_Linear` as a function of its own, for gradients of gradients."""

    @staticmethod
    def forward(ctx, y, packed, absmax, nested_absmax, nested_offset, *layout):  # type: ignore[no-untyped-def]
        ctx.layout = layout
        ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
        return torch.ops.fourbit.linear_transposed.default(
            y, packed, absmax, nested_absmax, nested_offset, *layout
        )

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return _product(gradient, None, *ctx.saved_tensors, *ctx.layout), *([None] * 8)


def autocast_operand(x: Tensor) -> Tensor:
    """An operand in autocast's dtype, where that is on."""
    if x.is_cpu and not torch.is_autocast_enabled("cpu"):
        return x  # without the device's name, which takes longer than all else here
    device = x.device.type
    # The meta device knows no autocast and would raise.
    if device != "meta" and torch.is_autocast_enabled(device) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(device))
    return x


_linear = torch.ops.fourbit.linear.default


def _product(x: Tensor, bias: Tensor | None, *weight: Tensor | str | int | None) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, bias, *weight)  # type: ignore[no-any-return]
    return _linear(x, bias, *weight)  # type: ignore[no-any-return]


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
    """``x W^T + b`` with a packed, frozen ``W``; differentiable in ``x`` and ``b``.

    Computes in the dtype of `x` (or autocast's, where that is on), as ``torch.nn.Linear`` does.

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        bias: [out_features] or None.
        packed: uint8 codes of the weight, row-major [out_features, in_features].
        absmax: as in `dequantize`.
        nested_absmax: as in `dequantize`.
        nested_offset: as in `dequantize`.
        codebook: a codebook's name.
        block_size: 32, 64, ... 4096.
        out_features: rows of the weight.
        in_features: columns of the weight.

    Returns:
        [..., out_features] in the dtype of the computation.
    """
    return _product(
        autocast_operand(x),
        bias,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        codebook,
        block_size,
        out_features,
        in_features,
    )
