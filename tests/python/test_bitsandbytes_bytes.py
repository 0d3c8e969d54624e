"""Bytes equal to bitsandbytes' CPU quantizer, where that is right."""

import itertools

import pytest
import torch

import fourbit
from fourbit import ops, reference
from fourbit.operands import float_bytes
from tensors import BLOCK_SIZES, DTYPES, KINDS, SHAPES, make

functional = pytest.importorskip("bitsandbytes.functional")

CASES = list(
    itertools.islice(
        zip(
            itertools.cycle(SHAPES),
            itertools.cycle(BLOCK_SIZES),
            itertools.cycle(DTYPES),
            itertools.cycle(KINDS * 2 + ("normal",)),
        ),
        200,
    )
)


def assert_codes_agree(ours, theirs, x, absmax, block_size):
    """Equal codes, but for numbers within one ulp of a decision boundary.

    bitsandbytes divides by the scale in a last, partial block where it multiplies by the
    reciprocal elsewhere, so there a number next to a boundary may take the neighbouring code.
    """
    differ = (ours != theirs).nonzero().view(-1)
    if not len(differ):
        return
    flat, scale = x.reshape(-1)[differ].double(), absmax[differ // block_size].double()
    values = torch.tensor(reference.NF4)
    lower = torch.minimum(ours[differ], theirs[differ]).long()
    assert torch.equal(torch.maximum(ours[differ], theirs[differ]).long(), lower + 1)
    boundary = (values[lower] + values[lower + 1]) / 2
    ulp = torch.nextafter(boundary.abs(), torch.tensor(2.0)) - boundary.abs()
    assert ((flat / scale - boundary.double()).abs() <= ulp.double()).all()
    assert (differ >= x.numel() // block_size * block_size).all(), "only in the partial block"


def without_floor(absmax, x, block_size):
    """bitsandbytes' scales, less the 1e-38 that it gives a partial block of zeros.

    A full block of zeros has scale 0 there too; the decoded numbers are zeros either way.
    """
    if x.numel() % block_size and not x.reshape(-1)[x.numel() // block_size * block_size :].any():
        assert absmax[-1] == torch.tensor(1e-38)
        return torch.cat([absmax[:-1], torch.zeros(1)])
    return absmax


def test_two_hundred_tensors(generator):
    assert len(CASES) == 200
    assert {case[1] for case in CASES} == set(BLOCK_SIZES)
    for shape, block_size, dtype, kind in CASES:
        x = make(kind, shape, dtype, generator)
        theirs, state = functional.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
        ours = fourbit.quantize(x, block_size=block_size, double_quant=False)
        expected = without_floor(state.absmax, x, block_size)
        assert torch.equal(ours.scales(), expected), (shape, block_size, dtype, kind)
        assert ours.packed.shape == theirs.shape
        count = x.numel()
        assert_codes_agree(
            reference.unpack(ours.packed.view(-1), 4, count),
            reference.unpack(theirs.view(-1), 4, count),
            x,
            state.absmax,
            block_size,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_matrix_that_bitsandbytes_decodes_wrongly(dtype, generator):
    """1152 x 4304: equal bytes in, but its AVX-512 decoder loses the block boundaries."""
    x = torch.randn(1152, 4304, generator=generator).to(dtype)
    theirs, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    ours = fourbit.quantize(x, double_quant=False)
    assert torch.equal(ours.packed, theirs)
    assert torch.equal(ours.scales(), state.absmax)
    expected = reference.dequantize(
        theirs.view(-1), state.absmax, torch.tensor(reference.NF4), 64, x.shape, torch.float32
    )
    got = ours.dequantize(torch.float32)
    assert torch.equal(
        got, expected
    )  # the goal is 1e-6; the arithmetic is the same, so the bits are


def test_fp4_differs_in_the_sign_of_zero_alone(generator):
    """bitsandbytes gives some small positive numbers the code of -0; we have one zero."""
    x = torch.randn(1 << 16, generator=generator)
    theirs, state = functional.quantize_4bit(x, blocksize=64, quant_type="fp4")
    ours = fourbit.quantize(x, codebook="fp4", double_quant=False)
    assert torch.equal(ours.scales(), state.absmax)
    their_codes = reference.unpack(theirs.view(-1), 4, x.numel())
    our_codes = reference.unpack(ours.packed.view(-1), 4, x.numel())
    assert torch.equal(torch.where(their_codes == 8, 0, their_codes), our_codes)


def test_the_dynamic_maps_are_the_ones_in_existing_files():
    for signed, name in ((True, "dynamic-signed"), (False, "dynamic-unsigned")):
        theirs = functional.create_dynamic_map(signed=signed)
        ours = torch.tensor(fourbit._core.Codebook.by_name(name).values)
        assert torch.equal(ours, theirs)
        assert torch.equal(reference.dynamic_map(signed=signed), theirs)


def test_their_double_quantization_decodes_to_their_scales(generator):
    """We read what they wrote, although we would have written 0.2% of the codes better."""
    x = torch.randn(513, 640, generator=generator) * 0.05
    _, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours = ops.dequantize_absmax(
        state.absmax, float_bytes(state.state2.absmax), float_bytes(state.offset.view(1))
    )
    assert torch.equal(ours, theirs)
