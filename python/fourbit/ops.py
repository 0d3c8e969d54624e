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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import cpu_ops
from fourbit.codebook import by_name
from fourbit.dispatch import only_cpu
from fourbit.layout import NESTED_BLOCK_SIZE, block_count, packed_bytes
from fourbit.operands import check_device, check_float, check_operand

_library = torch.library.Library("fourbit", "DEF")

# --- blockwise quantization ---------------------------------------------------------------------

_library.define("quantize(Tensor input, str codebook, int block_size) -> (Tensor, Tensor)")
_library.define(
    "dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "str codebook, int block_size, SymInt[] shape, ScalarType dtype) -> Tensor"
)


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


# --- devices ------------------------------------------------------------------------------------


def _on_cuda(name: str) -> Callable[..., Any]:
    """The operator of that name in `cuda_ops`, which is imported when it is first called."""

    def call(*arguments: Any) -> Any:
        from fourbit import cuda_ops

        return getattr(cuda_ops, name)(*arguments)

    return call


for _operator in (
    cpu_ops.quantize,
    cpu_ops.dequantize,
    cpu_ops.quantize_absmax,
    cpu_ops.dequantize_absmax,
    cpu_ops.linear,
    cpu_ops.linear_transposed,
):
    _library.impl(_operator.__name__, _operator, "CPU")
    _library.impl(_operator.__name__, _on_cuda(_operator.__name__), "CUDA")


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
    if only_cpu(x, weight[0]):  # type: ignore[arg-type]
        return cpu_ops.linear(x, bias, *weight)  # type: ignore[arg-type]
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
