"""`cuda/quantize.cu` and `cuda/double_quant.cu` on the CPU: the bytes of the Rust core."""

import pytest
import torch

import emulate
import kernel_calls as calls
from emulate import Specialisation
from fourbit import ops, reference
from fourbit.operands import float_values
from kernel_calls import CODEBOOKS, by_library, rotation, same_bytes
from tensors import DTYPES, KINDS, make

pytestmark = pytest.mark.skipif(
    emulate.unavailable() is not None, reason=str(emulate.unavailable())
)


def numbers(count, dtype, codebook, generator):
    """Numbers of all kinds, and the codebook's midpoints with their neighbours."""
    parts = [make(kind, (count // 8 + 1,), dtype, generator) for kind in KINDS]
    ordered = torch.tensor(sorted({v + 0.0 for v in codebook.values if v == v}))
    middle = (ordered[1:] + ordered[:-1]) / 2
    toward = torch.tensor([float("-inf"), float("inf")])
    around = torch.cat([middle, *(torch.nextafter(middle, t) for t in toward), ordered])
    around = around[torch.randint(len(around), (count // 2 + 1,), generator=generator)]
    around[::32] = 1.0
    mixed = torch.cat([around.to(dtype), *parts])
    return mixed.roll(-int(torch.randint(100, (1,), generator=generator)))[:count]


def assert_equals_core(kernels, specialisation, x, **how):
    packed, absmax, bad = calls.quantize(kernels, specialisation, x, **how)
    expected_packed, expected_absmax = calls.core_quantize(specialisation, x)
    assert bad is None
    assert same_bytes(absmax, expected_absmax)
    assert same_bytes(packed, expected_packed)


def sizes(specialisation):
    """Tails of every kind: of a byte, a vector, a block, a tile; and more tiles than blocks."""
    block, tile = specialisation.block_size, calls.tile(specialisation)
    return [1, 2, 3, 7, 31, block - 1, block, block + 1, tile - 1, tile, tile + 5, 3 * tile + 77]


def check_all_sizes(specialisations, generator):
    for specialisation, kernels in zip(
        specialisations, emulate.load("quantize", specialisations), strict=True
    ):
        for turn, count in enumerate(sizes(specialisation)):
            x = numbers(count, specialisation.dtype, specialisation.codebook, generator)
            assert_equals_core(kernels, specialisation, x, order=turn % 5, grid=1 + turn % 2)


@pytest.mark.parametrize("group", range(3))
def test_equal_bytes_for_every_dtype_block_size_and_tail(group, generator):
    check_all_sizes(by_library(rotation())[group], generator)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(24))
def test_equal_bytes_for_all_specialisations(group, generator):
    check_all_sizes(by_library(calls.FULL_PRODUCT)[group], generator)


def test_equal_bytes_to_the_reference(generator):
    specialisations = by_library(rotation())[0]
    for specialisation, kernels in zip(
        specialisations, emulate.load("quantize", specialisations), strict=True
    ):
        book = specialisation.codebook
        x = numbers(9001, specialisation.dtype, book, generator)
        expected = reference.quantize(
            x, torch.tensor(book.values), specialisation.block_size, ties_upper=book.ties == "upper"
        )
        packed, absmax, _ = calls.quantize(kernels, specialisation, x)
        assert same_bytes(packed, expected[0])
        assert same_bytes(absmax, expected[1])


@pytest.mark.parametrize("group", range(3))
def test_misaligned_views(group, generator):
    specialisations = by_library(rotation())[group]
    for specialisation, kernels in zip(
        specialisations, emulate.load("quantize", specialisations), strict=True
    ):
        count = calls.tile(specialisation) + 333
        x = numbers(count, specialisation.dtype, specialisation.codebook, generator)
        assert_equals_core(kernels, specialisation, x, misaligned=True)


@pytest.mark.parametrize("group", range(3))
def test_nothing_is_done_for_no_elements(group):
    specialisations = by_library(rotation())[group]
    kernels = emulate.load("quantize", specialisations)[0]
    x = torch.empty(0, dtype=specialisations[0].dtype)
    packed, absmax, bad = calls.quantize(kernels, specialisations[0], x)
    assert (packed.numel(), absmax.numel(), bad) == (0, 0, None)


@pytest.mark.parametrize("group", range(3))
def test_the_first_element_that_is_not_finite_is_found(group, generator):
    specialisations = by_library(rotation())[group]
    for specialisation, kernels in zip(
        specialisations, emulate.load("quantize", specialisations), strict=True
    ):
        tile = calls.tile(specialisation)
        count = 2 * tile + 45
        clean = make("normal", (count,), specialisation.dtype, generator)
        for turn, places in enumerate(([0], [tile - 1, 5], [tile + 7, tile + 6], [count - 1])):
            x = clean.clone()
            for value, place in zip((float("nan"), float("-inf")), places, strict=False):
                x[place] = value
            for misaligned in (False, True):
                found = calls.quantize(
                    kernels, specialisation, x, order=turn, grid=3, misaligned=misaligned
                )
                assert found[2] == min(places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_whose_reciprocal_overflows(dtype, generator):
    specialisations = by_library(rotation())[DTYPES.index(dtype)]
    for specialisation, kernels in zip(
        specialisations, emulate.load("quantize", specialisations), strict=True
    ):
        count = calls.tile(specialisation) + 100
        # From half of the smallest normal number down, a block of each: 2^-127 ... 2^-140.
        exponent = -127 - torch.arange(count) // specialisation.block_size % 14
        x = torch.rand(count, generator=generator) * 2 - 1
        x = torch.ldexp(x, exponent.float()).to(dtype)
        x[: specialisation.block_size] = 0.5
        assert_equals_core(kernels, specialisation, x)


# --- double quantization ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double_quant():
    return emulate.load("double_quant", [Specialisation()])[0]


def assert_double_quantization_equals_core(kernels, absmax, **how):
    codes, nested_absmax, offset, bad = calls.quantize_absmax(kernels, absmax, **how)
    expected = ops.quantize_absmax(absmax)
    assert bad == [None, None]
    assert same_bytes(offset.view(torch.uint8), expected[2])
    assert same_bytes(nested_absmax, float_values(expected[1]))
    assert same_bytes(codes, expected[0])
    decoded = calls.dequantize_absmax(kernels, codes, nested_absmax, offset)
    assert same_bytes(decoded, ops.dequantize_absmax(*expected))


COUNTS = [0, 1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 5000, 33333]


@pytest.mark.parametrize("count", COUNTS)
def test_double_quantization_of_any_number_of_scales(count, double_quant, generator):
    normal = torch.randn(count, generator=generator)
    for order, absmax in enumerate(
        (
            normal.abs() * 0.02,
            normal.bfloat16().float(),  # of both signs, sums exact in every order
            normal * 1e-39,  # scales whose reciprocal overflows
            torch.zeros(count),
        )
    ):
        assert_double_quantization_equals_core(double_quant, absmax, order=order, grid=1 + order)


def test_double_quantization_where_the_order_of_sums_matters(double_quant):
    # Chunks add up to 2^60, 1, 1, ... and -2^60: the ones are lost one by one, not together.
    absmax = torch.zeros(1024 * 700)
    absmax[::1024] = 1.0
    absmax[0], absmax[-1] = 2.0**60, -(2.0**60)
    assert reference.mean(absmax) == 0
    assert absmax.double().sort().values[1:-1].sum() > 0
    assert_double_quantization_equals_core(double_quant, absmax, grid=4)


def test_double_quantization_of_scales_of_all_magnitudes(double_quant, generator):
    for _ in range(3):
        exponents = torch.randint(-120, 90, (9999,), generator=generator)
        absmax = torch.ldexp(torch.rand(9999, generator=generator), exponents.float())
        assert_double_quantization_equals_core(double_quant, absmax)


def test_bad_scales_are_found(double_quant):
    absmax = torch.ones(2000)
    absmax[700], absmax[1500] = float("inf"), float("nan")
    # The mean is no number then, so no scale less the mean is one.
    assert calls.quantize_absmax(double_quant, absmax)[3][0] == 0
    largest = torch.finfo(torch.float32).max
    absmax = torch.full((600,), -largest)
    absmax[77] = largest
    assert calls.quantize_absmax(double_quant, absmax)[3][0] == 77
    with pytest.raises(ValueError, match="77"):
        ops.quantize_absmax(absmax)


def test_a_scale_that_rounds_to_infinity_is_found(double_quant):
    largest = torch.finfo(torch.float32).max
    absmax = torch.full((100,), largest)
    assert_double_quantization_equals_core(double_quant, absmax)
    # The mean is 0.6 of the largest; the other 0.4 are 0.667 of a scale, rounded to 0.670.
    absmax[:40] = 0
    assert calls.quantize_absmax(double_quant, absmax)[3] == [None, 40]
    with pytest.raises(ValueError, match="too large"):
        ops.quantize_absmax(absmax)


def test_codebooks_take_all_ways_through_the_kernel():
    texts = [emulate.definitions(Specialisation(codebook=book)) for book in CODEBOOKS.values()]
    assert {text["CODE_BITS"] for text in texts} == {"2", "4", "8"}
    assert {text["TIES_UPPER"] for text in texts} == {"0", "1"}
