"""The operators of mixtures of experts: each row of the input meets the weight of its own expert.

Rows are sorted by expert, and ``counts`` says how many each expert has. That keeps shapes
independent of where tokens are sent, so that a compiled model has no graph break here. Operators:

=======================  =========================================================================
``fourbit::expert_linear``  ``x W_e^T`` or ``x W_e`` with packed, frozen weights
``fourbit::expert_matmul``  the same with dense weights: adapters, and experts left in 16 bits
``fourbit::expert_outer``   the gradient of dense weights
=======================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourbit import ops
from fourbit.layout import NESTED_BLOCK_SIZE, block_count
from fourbit.operands import check_device, check_operand, float_bytes

_library = torch.library.Library("fourbit", "FRAGMENT")

_library.define(
    "expert_linear(Tensor x, Tensor counts, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
    "Tensor? nested_offset, str codebook, int block_size, SymInt rows, SymInt columns, "
    "int groups, bool transposed) -> Tensor"
)
_library.define("expert_matmul(Tensor x, Tensor counts, Tensor weight, bool transposed) -> Tensor")
_library.define("expert_outer(Tensor y, Tensor x, Tensor counts) -> Tensor")


def _segments(counts: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which; on a GPU this is the one wait of a product."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count
    if start > rows:
        raise ValueError(f"counts add up to {start}, and the input has {rows} rows")


# --- packed weights -------------------------------------------------------------------------------


def expert_scales(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    first: int,
    count: int,
    groups: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The scales of blocks ``first ... first + count``, as `ops.dequantize` takes them.

    Scales that were quantized in `groups` equal groups stay codes where the blocks are one whole
    group; where they are a part of one or of several, they come decoded.
    """
    if nested_absmax is None or nested_offset is None:
        return absmax[4 * first : 4 * (first + count)], None, None
    per_group = absmax.numel() // groups
    nested = 4 * block_count(per_group, NESTED_BLOCK_SIZE)

    def constants(group: int) -> tuple[Tensor, Tensor]:
        return (
            nested_absmax[group * nested : (group + 1) * nested],
            nested_offset[4 * group : 4 * (group + 1)],
        )

    if count == per_group and first % per_group == 0:
        return absmax[first : first + count], *constants(first // per_group)
    pieces: list[Tensor] = []
    at, end = first, first + count
    while at < end:
        group, inside = divmod(at, per_group)
        upto = min(end - group * per_group, per_group)
        # Decoding starts where a scale of the scales does.
        aligned = inside - inside % NESTED_BLOCK_SIZE
        scales_of_scales, offset = constants(group)
        upper = 4 * block_count(upto, NESTED_BLOCK_SIZE)
        decoded = ops.dequantize_absmax(
            absmax[group * per_group + aligned : group * per_group + upto],
            scales_of_scales[4 * (aligned // NESTED_BLOCK_SIZE) : upper],
            offset,
        )
        pieces.append(decoded[inside - aligned :])
        at = group * per_group + upto
    return float_bytes(torch.cat(pieces)), None, None


@torch.library.impl(_library, "expert_linear", "CompositeExplicitAutograd")
def _expert_linear(
    x: Tensor,
    counts: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    rows: int,
    columns: int,
    groups: int,
    transposed: bool,
) -> Tensor:
    depth, width = (rows, columns) if transposed else (columns, rows)
    check_operand(x, depth, "the input")
    check_device(x, packed)
    experts = counts.numel()
    codes, bytes_each = packed.view(-1), packed.numel() // max(1, experts)
    blocks = rows * columns // block_size
    # Rows of no expert, after all counted ones, get zeros.
    output = x.new_zeros((x.shape[0], width))
    for expert, segment in _segments(counts, x.shape[0]):
        scales = expert_scales(
            absmax, nested_absmax, nested_offset, expert * blocks, blocks, groups
        )
        weight = (
            codes[expert * bytes_each : (expert + 1) * bytes_each],
            *scales,
            codebook,
            block_size,
            rows,
            columns,
        )
        if transposed:
            output[segment] = torch.ops.fourbit.linear_transposed.default(x[segment], *weight)
        else:
            output[segment] = torch.ops.fourbit.linear.default(x[segment], None, *weight)
    return output


@torch.library.register_fake("fourbit::expert_linear")
def _expert_linear_fake(
    x: Tensor,
    counts: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    rows: int,
    columns: int,
    groups: int,
    transposed: bool,
) -> Tensor:
    check_operand(x, rows if transposed else columns, "the input")
    check_device(x, packed)
    return x.new_empty((x.shape[0], columns if transposed else rows))


class _ExpertLinear(torch.autograd.Function):
    """The product and its gradient, which is the product with the other side of the weights."""

    @staticmethod
    def forward(ctx, x, counts, packed, absmax, nested_absmax, nested_offset, *layout):  # type: ignore[no-untyped-def]
        ctx.layout = layout
        ctx.save_for_backward(counts, packed, absmax, nested_absmax, nested_offset)
        return torch.ops.fourbit.expert_linear.default(
            x, counts, packed, absmax, nested_absmax, nested_offset, *layout
        )

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        *layout, transposed = ctx.layout
        gradient = gradient.contiguous()
        return _packed_product(gradient, *ctx.saved_tensors, *layout, not transposed), *(
            [None] * 11
        )


def _packed_product(x: Tensor, *weight: Tensor | str | int | bool | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _ExpertLinear.apply(x, *weight)  # type: ignore[no-any-return]
    return torch.ops.fourbit.expert_linear.default(x, *weight)  # type: ignore[no-any-return]


def expert_linear(
    x: Tensor,
    counts: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    rows: int,
    columns: int,
    groups: int,
    *,
    transposed: bool = False,
) -> Tensor:
    """``x W_e^T``, or ``x W_e``, with packed, frozen weights; differentiable in ``x``.

    Computes in the dtype of `x` (or autocast's, where that is on).

    Args:
        x: [n, columns], or [n, rows] where `transposed`; sorted by expert.
        counts: int64 [experts]: rows of `x` of each expert. Rows that are left give zeros.
        packed: uint8 codes of all weights, row-major [experts, rows, columns].
        absmax: as in `ops.dequantize`, of all weights.
        nested_absmax: as in `ops.dequantize`, of one group after the other.
        nested_offset: uint8 [4 * groups].
        codebook: a codebook's name.
        block_size: 32, 64, ... 4096; it divides ``rows * columns``.
        rows: of each weight.
        columns: of each weight.
        groups: parts of equal size that had their scales quantized each on its own.
        transposed: whether rows of the weight are its inputs (``x W``).

    Returns:
        [n, rows], or [n, columns] where `transposed`, in the dtype of the computation.
    """
    weight = (packed, absmax, nested_absmax, nested_offset, codebook, block_size)
    return _packed_product(
        ops.autocast_operand(x), counts, *weight, rows, columns, groups, transposed
    )


# --- dense weights --------------------------------------------------------------------------------


@torch.library.impl(_library, "expert_matmul", "CompositeExplicitAutograd")
def _expert_matmul(x: Tensor, counts: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    sides = weight if transposed else weight.transpose(1, 2)
    output = x.new_zeros((x.shape[0], sides.shape[2]))
    for expert, segment in _segments(counts, x.shape[0]):
        torch.mm(x[segment], sides[expert], out=output[segment])
    return output


@torch.library.register_fake("fourbit::expert_matmul")
def _expert_matmul_fake(x: Tensor, counts: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))


@torch.library.impl(_library, "expert_outer", "CompositeExplicitAutograd")
def _expert_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    output = x.new_zeros((counts.numel(), y.shape[1], x.shape[1]))
    for expert, segment in _segments(counts, x.shape[0]):
        torch.mm(y[segment].T, x[segment], out=output[expert])
    return output


@torch.library.register_fake("fourbit::expert_outer")
def _expert_outer_fake(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty((counts.numel(), y.shape[1], x.shape[1]))


class _ExpertMatmul(torch.autograd.Function):
    """The product with dense weights, and its two gradients."""

    @staticmethod
    def forward(ctx, x, counts, weight, transposed):  # type: ignore[no-untyped-def]
        ctx.transposed = transposed
        ctx.save_for_backward(x, counts, weight)
        return torch.ops.fourbit.expert_matmul.default(x, counts, weight, transposed)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, counts, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _ExpertMatmul.apply(gradient, counts, weight, not ctx.transposed)
        if ctx.needs_input_grad[2]:
            left, right = (x, gradient) if ctx.transposed else (gradient, x)
            grad_weight = _ExpertOuter.apply(left, right, counts)
        return grad_x, None, grad_weight, None


class _ExpertOuter(torch.autograd.Function):
    """``y_e^T x_e`` [experts, y, x]: a function of its own, for gradients of gradients."""

    @staticmethod
    def forward(ctx, y, x, counts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y, x, counts)
        return torch.ops.fourbit.expert_outer.default(y, x, counts)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        y, x, counts = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_y = _ExpertMatmul.apply(x, counts, gradient, False)
        grad_x = _ExpertMatmul.apply(y, counts, gradient, True)
        return grad_y, grad_x, None


def expert_matmul(x: Tensor, counts: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
    """``x W_e^T``, or ``x W_e``, with dense weights; differentiable in ``x`` and ``W``.

    Computes in the dtype of both, which is the same (or in autocast's, where that is on).

    Args:
        x: [n, columns], or [n, rows] where `transposed`; sorted by expert.
        counts: int64 [experts]: rows of `x` of each expert. Rows that are left give zeros.
        weight: [experts, rows, columns], of the dtype of `x`.
        transposed: whether rows of the weight are its inputs (``x W``).

    Returns:
        [n, rows], or [n, columns] where `transposed`.
    """
    x, weight = ops.autocast_operand(x), ops.autocast_operand(weight)
    return _ExpertMatmul.apply(x, counts, weight, transposed)  # type: ignore[no-any-return]
