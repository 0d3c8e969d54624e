"""Kernels that are wrong on purpose fail on the CPU: what the other tests would see of a bug."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import adamw_calls
import emulate
import kernel_calls as calls
from emulate import KernelError, Kernels, Specialisation
from fourbit import ops
from fourbit.codebook import by_name
from fourbit.operands import float_values
from kernel_calls import CODEBOOKS, same_bytes

pytestmark = pytest.mark.skipif(
    emulate.unavailable() is not None, reason=str(emulate.unavailable())
)

ORDERS = range(5)
SMALL = Specialisation(torch.bfloat16, 64, by_name("nf4"), double_quant=True)
LARGE = Specialisation(torch.float32, 4096, by_name("nf4"))
UPPER = Specialisation(torch.float32, 64, CODEBOOKS["upper"])
GAPS = Specialisation(torch.float16, 64, CODEBOOKS["close"])


def quantizes(kernels: Kernels, specialisation: Specialisation) -> None:
    generator = torch.Generator().manual_seed(3)
    for order in ORDERS:
        count = 2 * calls.tile(specialisation) + 76
        x = torch.randn(count, generator=generator)
        # Midpoints of NF4 where the scale is 1.
        x[:640:64], x[1:600:64] = 1.0, (0.7229568362236023 + 1) / 2
        x[:640] = x[:640].clamp(-1, 1)
        x = x.to(specialisation.dtype)
        packed, absmax, bad = calls.quantize(kernels, specialisation, x, order=order)
        expected = calls.core_quantize(specialisation, x)
        assert bad is None
        assert same_bytes(packed, expected[0])
        assert same_bytes(absmax, expected[1])


def dequantizes(kernels: Kernels, specialisation: Specialisation) -> None:
    generator = torch.Generator().manual_seed(4)
    count = 3 * calls.tile(specialisation) // 8 + 77
    packed, absmax = calls.core_quantize(specialisation, torch.randn(count, generator=generator))
    codes, nested_absmax, offset = ops.quantize_absmax(absmax)
    scales = (codes, float_values(nested_absmax), float_values(offset))
    expected = calls.core_dequantize(specialisation, packed, scales, count)
    for order in ORDERS:
        output = calls.dequantize(kernels, specialisation, packed, scales, count, order=order)
        assert same_bytes(output, expected)


def quantizes_scales(kernels: Kernels, _: Specialisation) -> None:
    absmax = torch.randn(5000, generator=torch.Generator().manual_seed(5)).abs()
    absmax[1024:2048] = 0
    absmax[0], absmax[1024], absmax[4500] = 2.0**60, 1.0, -(2.0**60)
    codes, nested_absmax, offset = ops.quantize_absmax(absmax)
    for order in ORDERS:
        found = calls.quantize_absmax(kernels, absmax, order=order)
        assert same_bytes(found[2], float_values(offset))
        assert same_bytes(found[1], float_values(nested_absmax))
        assert same_bytes(found[0], codes)


def steps(kernels: Kernels, _: Specialisation) -> None:
    generator = torch.Generator().manual_seed(6)
    count = 3 * adamw_calls.BLOCK + 9
    held = [
        adamw_calls.Held(
            *(adamw_calls.numbers(count, torch.bfloat16, generator) for _ in range(2)),
            bits,
            cuts=[adamw_calls.BLOCK, 3 * adamw_calls.BLOCK],
        )
        for bits in (8, 32, 8)
    ]
    held[0].grad[-1] = float("nan")
    theirs = [one.clone() for one in held]
    adamw_calls.step_core(theirs)
    for order in ORDERS:
        ours = [one.clone() for one in held]
        found = adamw_calls.step_kernel(kernels, ours, order=order, updates=(2, 3, 4))
        assert found == ([1, 0, 0], 0)
        adamw_calls.assert_same(ours, theirs)
    held[2].state[1][-1] = float("nan")
    before = [one.clone() for one in held]
    adamw_calls.step_kernel(kernels, held, updates=(2, 3, 4))
    adamw_calls.assert_same(held, before)


@dataclass(frozen=True)
class Broken:
    """One wrong line in place of a right one."""

    kernel_file: str
    check: Callable[[Kernels, Specialisation], None]
    specialisation: Specialisation
    right: str
    wrong: str


BROKEN = {
    "no barrier after the table": Broken(
        "quantize", quantizes, SMALL, "fill(table);\n    __syncthreads();", "fill(table);"
    ),
    "no barrier between warps of a block": Broken(
        "quantize",
        quantizes,
        LARGE,
        "warp_largest[row][warp] = scale_bits;\n            __syncthreads();",
        "warp_largest[row][warp] = scale_bits;",
    ),
    "a barrier that a warp skips": Broken(
        "quantize",
        quantizes,
        LARGE,
        "scale_bits;\n            __syncthreads();",
        "scale_bits;\n            if (warp > 0) __syncthreads();",
    ),
    "one element too many": Broken(
        "quantize", quantizes, SMALL, "if (first + i < count)", "if (first + i <= count)"
    ),
    "one byte too many": Broken(
        "quantize", quantizes, SMALL, "* BYTE_ELEMENTS) < count", "* BYTE_ELEMENTS) <= count"
    ),
    "one lane too few in the maximum": Broken(
        "quantize", quantizes, SMALL, "step < BLOCK_LANES;", "step < BLOCK_LANES / 2;"
    ),
    "the scale of the wrong lane": Broken(
        "quantize", quantizes, SMALL, "v / BLOCK_VECTORS, LANE_BLOCKS)", "v / BLOCK_VECTORS, 2)"
    ),
    "a tie that takes the other value": Broken(
        "quantize", quantizes, UPPER, "TIES_UPPER ? next_below(midpoint)", "false ? midpoint"
    ),
    "a tie in the tree": Broken(
        "quantize", quantizes, GAPS, "CODE_BITS, !TIES_UPPER>", "CODE_BITS, TIES_UPPER>"
    ),
    "no barrier before decoding": Broken(
        "dequantize",
        dequantizes,
        SMALL,
        "    __syncthreads();\n\n    const auto scale_of",
        "    const auto scale_of",
    ),
    "the last tile taken for a whole one": Broken(
        "dequantize", dequantizes, SMALL, "tile + TILE > count", "tile >= count"
    ),
    "the nibbles of a byte exchanged": Broken(
        "dequantize",
        dequantizes,
        SMALL,
        "(BYTE_ELEMENTS - 1 - i % BYTE_ELEMENTS)",
        "(i % BYTE_ELEMENTS)",
    ),
    "sums taken for exact": Broken(
        "double_quant",
        quantizes_scales,
        SMALL,
        "!(extent.magnitude < limit)",
        "extent.magnitude < 0.0 * limit",
    ),
    "no barrier between partial sums": Broken(
        "double_quant",
        quantizes_scales,
        SMALL,
        "extents[warp] = extent;\n    }\n    __syncthreads();",
        "extents[warp] = extent;\n    }",
    ),
    "a flag for each segment, set": Broken(
        "adamw",
        steps,
        SMALL,
        "atomicMax(&flags[segment.parameter]",
        "atomicMax(&flags[&segment - segments]",
    ),
    "a flag for each segment, read": Broken(
        "adamw",
        steps,
        SMALL,
        "if (flags[segment.parameter])",
        "if (flags[&segment - segments])",
    ),
    "damage that is not looked at": Broken(
        "adamw", steps, SMALL, "if (*damaged) return;", "(void)damaged;"
    ),
    "no barrier after the tables of both moments": Broken(
        "adamw",
        steps,
        SMALL,
        "__syncthreads();\n    if (*damaged)",
        "if (*damaged)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_fails(name):
    broken = BROKEN[name]

    def edit(source: str) -> str:
        assert source.count(broken.right) == 1, "the source changed: change this test with it"
        return source.replace(broken.right, broken.wrong)

    (kernels,) = emulate.load(broken.kernel_file, [broken.specialisation], edit)
    with pytest.raises((AssertionError, KernelError)):
        broken.check(kernels, broken.specialisation)


def test_the_same_checks_pass_on_the_kernels_as_they_are():
    for broken in BROKEN.values():
        (kernels,) = emulate.load(broken.kernel_file, [broken.specialisation])
        broken.check(kernels, broken.specialisation)
