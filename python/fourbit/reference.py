"""The slow, plain-torch twin of every operator: the oracle of every test.

Written for clarity and from the paper (arXiv 2305.14314) and the file format, without a look at
the Rust code; nothing here is called by the library itself. All arithmetic is in float32 with one
rounding an operation unless it says otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# NF4: the quantiles of a standard normal distribution, normalised (paper, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# FP4 (E2M1) in the code order of existing checkpoints: bit 3 is the sign.
FP4 = tuple(
    sign * torch.tensor(magnitude / 12).item()
    for sign in (1, -1)
    for magnitude in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)
# INT4: sevenths; the last code repeats 1.
INT4 = tuple(torch.tensor(min(step, 7) / 7).item() for step in range(-7, 9))
CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}

NESTED_BLOCK_SIZE = 256
OPTIMIZER_BLOCK_SIZE = 256
SUBNORMAL_LIFT = 2.0**64


def dynamic_map(*, signed: bool) -> Tensor:
    """The dynamic 8-bit map (arXiv 2110.02861), float32 [256], ascending."""
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        boundaries = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        centres = (boundaries[:-1] + boundaries[1:]) / 2
        scaled = 10.0 ** (decade - 6) * centres
        values += scaled.tolist()
        if signed:
            values += (-scaled).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def encode(normalised: Tensor, values: Tensor, *, ties_upper: bool = False) -> Tensor:
    """The code (uint8) of the nearest value: by counting the midpoints below each number.

    Args:
        normalised: float32, any shape.
        values: float32 [codes], by code; NaN where undefined.
        ties_upper: whether a number halfway between two values takes the upper one.
    """
    distinct = sorted({v + 0.0 for v in values.tolist() if not math.isnan(v)})
    listed = values.tolist()
    code_of_rank = torch.tensor([listed.index(v) for v in distinct], dtype=torch.uint8)
    ordered = torch.tensor(distinct, dtype=torch.float32)
    midpoints = (ordered[:-1] + ordered[1:]) / 2
    rank = torch.zeros(normalised.shape, dtype=torch.int64)
    for midpoint in midpoints:
        rank += (midpoint <= normalised) if ties_upper else (midpoint < normalised)
    return code_of_rank[rank]


def code_bits(values: Tensor) -> int:
    """Bits of one stored code."""
    return 2 if len(values) <= 4 else 4 if len(values) <= 16 else 8


def pack(codes: Tensor, bits: int, zero_code: int) -> Tensor:
    """Codes (uint8 [n]) to bytes (uint8 [ceil(n * bits / 8)]), high bits first."""
    per_byte = 8 // bits
    padding = -len(codes) % per_byte
    padded = torch.cat([codes, torch.full((padding,), zero_code, dtype=torch.uint8)])
    packed = torch.zeros(len(padded) // per_byte, dtype=torch.int64)
    for position in range(per_byte):
        packed = (packed << bits) | padded[position::per_byte].long()
    return packed.to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [count]."""
    per_byte = 8 // bits
    shifts = [bits * (per_byte - 1 - position) for position in range(per_byte)]
    codes = torch.stack([(packed.long() >> shift) & (2**bits - 1) for shift in shifts], dim=1)
    return codes.reshape(-1)[:count].to(torch.uint8)


def quantize(
    x: Tensor, values: Tensor, block_size: int, *, ties_upper: bool = False
) -> tuple[Tensor, Tensor]:
    """Blockwise absmax quantization (paper, section 2).

    Args:
        x: float32, float16 or bfloat16, any shape; finite.
        values: the codebook, float32, by code.
        block_size: elements that share a scale.
        ties_upper: as in `encode`.

    Returns:
        Packed codes (uint8, flat) and scales (float32 [blocks]).
    """
    flat = x.detach().reshape(-1).float()
    assert flat.isfinite().all()
    count = len(flat)
    padded = torch.nn.functional.pad(flat, (0, -count % block_size)).reshape(-1, block_size)
    absmax = padded.abs().amax(dim=1) if count else torch.zeros(0)
    inverse = 1 / absmax
    # The reciprocal of a scale below 2^-128 overflows: lift scale and elements by a power of two.
    tiny = inverse.isinf() & (absmax > 0)
    lift = torch.where(tiny, torch.tensor(SUBNORMAL_LIFT), torch.tensor(1.0))
    inverse = torch.where(tiny, 1 / (absmax * lift), inverse)
    inverse = torch.where(absmax == 0, torch.zeros_like(inverse), inverse)
    normalised = padded * lift[:, None] * inverse[:, None]
    codes = encode(normalised, values, ties_upper=ties_upper).reshape(-1)[:count]
    zero_code = int(encode(torch.zeros(1), values, ties_upper=ties_upper))
    return pack(codes, code_bits(values), zero_code), absmax


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    values: Tensor,
    block_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """``values[code] * absmax`` in float32, rounded once to `dtype`."""
    count = math.prod(shape)
    codes = unpack(packed.reshape(-1), code_bits(values), count)
    scales = absmax.repeat_interleave(block_size)[:count]
    return (values[codes.long()] * scales).to(dtype).reshape(shape)


def mean(scales: Tensor) -> float:
    """The mean in the format's order of summation, in float64, rounded once to float32.

    Chunks of 1024; within a chunk 32 lanes, added in a binary tree; chunks in order.
    """
    if len(scales) == 0:
        return 0.0
    total = 0.0
    for chunk in torch.split(scales.double(), 1024):
        rows = torch.nn.functional.pad(chunk, (0, -len(chunk) % 32)).reshape(-1, 32)
        lanes = torch.zeros(32, dtype=torch.float64)
        for row in rows:
            lanes = lanes + row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += lanes.item()
    return torch.tensor(total / len(scales), dtype=torch.float64).float().item()


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """Double quantization (paper, section 3): codes (uint8), nested_absmax (float32), offset."""
    offset = mean(absmax)
    codes, nested_absmax = quantize(
        absmax - torch.tensor(offset), dynamic_map(signed=True), NESTED_BLOCK_SIZE
    )
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: float) -> Tensor:
    """The inverse of `quantize_absmax`: float32 [blocks]."""
    shape = (len(codes),)
    values = dynamic_map(signed=True)
    decoded = dequantize(codes, nested_absmax, values, NESTED_BLOCK_SIZE, shape, torch.float32)
    return decoded + torch.tensor(offset)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in float64. ``weight`` is the dequantized matrix [out, in]."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def lora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``x W^T + s x A^T B^T`` in float64 (paper, equation 5)."""
    side = x.double() @ lora_A.double().T @ lora_B.double().T
    return linear(x, weight) + scaling * side


def dora_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """``m (W + s B A) / ‖W + s B A‖`` with row norms, in float64 (arXiv 2402.09353)."""
    merged = weight.double() + scaling * lora_B.double() @ lora_A.double()
    norms = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
    weights: Tensor = magnitude.double()[:, None] * merged / norms
    return weights


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step (arXiv 1711.05101) in float64: new parameter and moments."""
    gradient, parameter = gradient.double(), parameter.double()
    parameter = parameter * (1 - lr * weight_decay)
    exp_avg = betas[0] * exp_avg.double() + (1 - betas[0]) * gradient
    exp_avg_sq = betas[1] * exp_avg_sq.double() + (1 - betas[1]) * gradient**2
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    parameter = parameter - lr * (exp_avg / (1 - betas[0] ** step)) / denominator
    return parameter, exp_avg, exp_avg_sq


def adamw_float32(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`adamw` in float32 and in the library's order of operations: the same bits.

    Constants are computed in float64 and rounded once. The parameter may be float32, float16 or
    bfloat16 and is rounded once, at the end; the gradient likewise is widened first.
    """
    gradient, new = gradient.float(), parameter.float()

    def constant(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64).float()

    beta1, beta2 = constant(betas[0]), constant(betas[1])
    exp_avg = beta1 * exp_avg + constant(1 - betas[0]) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + constant(1 - betas[1]) * (gradient * gradient)
    step_size = constant(lr / (1 - betas[0] ** step))
    correction = constant(1 / math.sqrt(1 - betas[1] ** step))
    new = new * constant(1 - lr * weight_decay)
    # torch's float32 square root is not always the nearest number; by way of float64 it is.
    root = exp_avg_sq.double().sqrt().float()
    new = new - step_size * (exp_avg / (root * correction + constant(eps)))
    return new.to(parameter.dtype), exp_avg, exp_avg_sq


def adamw8(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`adamw_float32` with blockwise 8-bit moments (arXiv 2110.02861).

    The parameter takes its step with the new moments as they are before they are rounded.

    Args:
        parameter: any shape.
        gradient: of the same shape.
        exp_avg: uint8 codes of the signed map, of the same shape.
        exp_avg_absmax: float32 [blocks of 256].
        exp_avg_sq: uint8 codes of the unsigned map, of the same shape.
        exp_avg_sq_absmax: float32 [blocks of 256].
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled.
        step: 1 for the first.

    Returns:
        New parameter, codes, scales, codes, scales.
    """
    maps = dynamic_map(signed=True), dynamic_map(signed=False)
    shape = tuple(parameter.shape)
    old = [
        dequantize(codes, absmax, values, OPTIMIZER_BLOCK_SIZE, shape, torch.float32)
        for codes, absmax, values in zip(
            (exp_avg, exp_avg_sq), (exp_avg_absmax, exp_avg_sq_absmax), maps, strict=True
        )
    ]
    parameter, *moments = adamw_float32(
        parameter,
        gradient,
        *old,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
    )
    (codes, absmax), (codes_sq, absmax_sq) = (
        quantize(moment, values, OPTIMIZER_BLOCK_SIZE)
        for moment, values in zip(moments, maps, strict=True)
    )
    # A second moment that is not zero never takes the code of zero, or its element would run away.
    codes_sq[(moments[1].reshape(-1) > 0) & (codes_sq == 0)] = 1
    return parameter, codes.reshape(shape), absmax, codes_sq.reshape(shape), absmax_sq
