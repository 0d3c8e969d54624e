"""More than 2^31 elements: only the last tiles of a grid run, in memory that is never touched."""

import ctypes

import pytest
import torch

import emulate
import kernel_calls as calls
from emulate import Specialisation
from fourbit import ops
from fourbit.codebook import by_name
from fourbit.operands import float_values
from kernel_calls import same_bytes

pytestmark = pytest.mark.skipif(
    emulate.unavailable() is not None, reason=str(emulate.unavailable())
)

SPECIALISATION = Specialisation(torch.bfloat16, 64, by_name("nf4"), double_quant=True)
SKIPPED = 2**31
COUNT = SKIPPED + 3 * calls.tile(SPECIALISATION) + 77


def shifted(first_block: int):
    """An edit that leaves out the blocks of a grid before `first_block`."""

    def edit(source: str) -> str:
        assert "i64(blockIdx.x)" in source
        return source.replace("i64(blockIdx.x)", f"(i64(blockIdx.x) + {first_block})")

    return edit


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def end(tensor: torch.Tensor, skipped: int) -> torch.Tensor:
    return tensor[skipped:].clone()


@pytest.fixture(scope="module")
def weights():
    """Uninitialised but for the end, so that almost none of it is ever in memory."""
    x = torch.empty(COUNT, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    x[SKIPPED:] = torch.randn(COUNT - SKIPPED, generator=generator).bfloat16()
    return x


def test_quantize(weights):
    skipped_tiles = SKIPPED // calls.tile(SPECIALISATION)
    (kernels,) = emulate.load("quantize", [SPECIALISATION], shifted(skipped_tiles))
    packed = torch.empty((COUNT + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty((COUNT + 63) // 64)
    first_bad = torch.tensor([-1])
    arguments = (pointer(weights), pointer(packed), pointer(absmax), COUNT, pointer(first_bad))
    kernels.launch("fourbit_quantize", *arguments, grid=2)
    expected = calls.core_quantize(SPECIALISATION, end(weights, SKIPPED))
    assert same_bytes(end(packed, SKIPPED // 2), expected[0])
    assert same_bytes(end(absmax, SKIPPED // 64), expected[1])
    assert first_bad.item() == -1

    weights[COUNT - 5] = float("inf")
    kernels.launch("fourbit_quantize", *arguments, grid=2)
    weights[COUNT - 5] = 0
    assert first_bad.item() == COUNT - 5


def test_dequantize(weights):
    (kernels,) = emulate.load(
        "dequantize", [SPECIALISATION], shifted(SKIPPED // calls.tile(SPECIALISATION))
    )
    packed_end, absmax_end = calls.core_quantize(SPECIALISATION, end(weights, SKIPPED))
    codes_end, nested_end, offset = ops.quantize_absmax(absmax_end)
    packed = torch.empty((COUNT + 1) // 2, dtype=torch.uint8)
    codes = torch.empty((COUNT + 63) // 64, dtype=torch.uint8)
    nested = torch.empty((len(codes) + 255) // 256)
    output = torch.empty(COUNT, dtype=torch.bfloat16)
    packed[SKIPPED // 2 :] = packed_end
    codes[SKIPPED // 64 :] = codes_end
    nested[SKIPPED // 64 // 256 :] = float_values(nested_end)
    offset = float_values(offset)
    tensors = (packed, codes, nested, offset, output)
    kernels.launch("fourbit_dequantize", *map(pointer, tensors), COUNT, grid=2)
    scales = (codes_end, float_values(nested_end), offset)
    expected = calls.core_dequantize(SPECIALISATION, packed_end, scales, COUNT - SKIPPED)
    assert same_bytes(end(output, SKIPPED), expected)
