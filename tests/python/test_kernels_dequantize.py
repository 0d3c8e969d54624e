"""`cuda/dequantize.cu` on the CPU: the bytes of the Rust core."""

from dataclasses import replace

import pytest
import torch

import emulate
import kernel_calls as calls
from fourbit import ops, reference
from fourbit.layout import block_count, packed_bytes
from fourbit.operands import float_values
from kernel_calls import by_library, rotation, same_bytes

pytestmark = pytest.mark.skipif(
    emulate.unavailable() is not None, reason=str(emulate.unavailable())
)


def specialisations_of(group):
    """Every dtype and block size, each with plain scales and, by another codebook, quantized."""
    plain = by_library(rotation())[group]
    double = [replace(s, double_quant=True) for s in by_library(rotation(shift=1))[group]]
    return [*plain, *double]


def stored(specialisation, count, generator):
    """Random codes, undefined ones included, and scales of both signs."""
    book = specialisation.codebook
    packed = torch.randint(
        256, (packed_bytes(count, book.code_bits),), dtype=torch.uint8, generator=generator
    )
    blocks = block_count(count, specialisation.block_size)
    scales = torch.randn(blocks, generator=generator).exp() - 0.5
    if not specialisation.double_quant:
        return packed, (scales,)
    codes, nested_absmax, offset = ops.quantize_absmax(scales)
    return packed, (codes, float_values(nested_absmax), float_values(offset))


def assert_equals_core(kernels, specialisation, count, generator, **how):
    packed, scales = stored(specialisation, count, generator)
    output = calls.dequantize(kernels, specialisation, packed, scales, count, **how)
    assert same_bytes(output, calls.core_dequantize(specialisation, packed, scales, count))


def sizes(specialisation):
    block, warp_tile = specialisation.block_size, calls.tile(specialisation) // 8
    return [1, 2, 3, 7, block - 1, block + 1, warp_tile, warp_tile + 1, 9 * warp_tile, 99 * 257]


def check_all_sizes(specialisations, generator):
    for specialisation, kernels in zip(
        specialisations, emulate.load("dequantize", specialisations), strict=True
    ):
        for turn, count in enumerate(sizes(specialisation)):
            how = {"order": turn % 5, "grid": 1 + turn % 2}
            assert_equals_core(kernels, specialisation, count, generator, **how)


@pytest.mark.parametrize("group", range(3))
def test_equal_bytes_for_every_dtype_block_size_and_tail(group, generator):
    check_all_sizes(specialisations_of(group), generator)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(24))
@pytest.mark.parametrize("double_quant", [False, True])
def test_equal_bytes_for_all_specialisations(group, double_quant, generator):
    chosen = by_library(calls.FULL_PRODUCT)[group]
    check_all_sizes([replace(s, double_quant=double_quant) for s in chosen], generator)


def test_equal_bytes_to_the_reference(generator):
    chosen = specialisations_of(2)
    for specialisation, kernels in zip(chosen, emulate.load("dequantize", chosen), strict=True):
        packed, scales = stored(specialisation, 5001, generator)
        output = calls.dequantize(kernels, specialisation, packed, scales, 5001)
        if specialisation.double_quant:
            scales = (reference.dequantize_absmax(scales[0], scales[1], scales[2].item()),)
        values = torch.tensor(specialisation.codebook.values)
        values = torch.cat([values, torch.full((256,), torch.nan)])
        bits = specialisation.codebook.code_bits
        expected = reference.dequantize(
            packed,
            scales[0],
            values[: 1 << bits],
            specialisation.block_size,
            (5001,),
            specialisation.dtype,
        )
        assert same_bytes(output, expected)


@pytest.mark.parametrize("group", range(3))
def test_misaligned_views(group, generator):
    chosen = specialisations_of(group)
    for specialisation, kernels in zip(chosen, emulate.load("dequantize", chosen), strict=True):
        assert_equals_core(kernels, specialisation, 4444, generator, misaligned=True)


@pytest.mark.parametrize("group", range(3))
def test_nothing_is_done_for_no_elements(group):
    chosen = specialisations_of(group)
    kernels = emulate.load("dequantize", chosen)[0]
    nothing = torch.empty(0, dtype=torch.uint8)
    output = calls.dequantize(kernels, chosen[0], nothing, (torch.empty(0),), 0)
    assert output.numel() == 0
