"""Quantize and dequantize on a GPU: the bytes of the CPU. How to run: see ``on_card.py``."""

import pytest
import torch

import fourbit
from fourbit import ops, reference
from fourbit.operands import float_bytes
from kernel_calls import rotation
from on_card import (
    CARD,
    assert_product,
    assert_same_bytes,
    assert_same_parts,
    linear,
    linear_transposed,
    need_memory,
    numbers,
)
from tensors import DTYPES, KINDS, SHAPES, make

pytestmark = pytest.mark.cuda

# Beside those that all quantizers are tried with: nothing, and more than a grid takes at once.
CARD_SHAPES = [*SHAPES, (0,), (3, 0), (2001, 1003)]
# Kinds whose scales, too, can be quantized in every dtype.
DOUBLE_KINDS = ("normal", "heavy", "zeros", "sparse", "constant")


def name_of(specialisation):
    dtype = str(specialisation.dtype).removeprefix("torch.")
    return f"{specialisation.codebook.name}-{specialisation.block_size}-{dtype}"


@pytest.mark.parametrize("chosen", [*rotation(), *rotation(3)], ids=name_of)
def test_the_bytes_of_the_cpu(chosen, generator):
    book, block_size, dtype = chosen.codebook.name, chosen.block_size, chosen.dtype
    for index, shape in enumerate(CARD_SHAPES):
        kind = KINDS[index % len(KINDS)]
        x = make(kind, shape, dtype, generator)
        packed, absmax = ops.quantize(x, book, block_size)
        on_card = ops.quantize(x.to(CARD), book, block_size)
        assert_same_bytes(on_card[0], packed)
        assert_same_bytes(on_card[1], absmax)
        plain = (float_bytes(absmax), None, None)
        layouts = [plain]
        if kind in DOUBLE_KINDS:
            layouts.append(ops.quantize_absmax(absmax))
            for ours, expected in zip(ops.quantize_absmax(on_card[1]), layouts[1], strict=True):
                assert_same_bytes(ours, expected)
        for scales in layouts:
            moved = [None if part is None else part.to(CARD) for part in scales]
            for target in (dtype, torch.bfloat16):
                layout = (book, block_size, shape, target)
                decoded = ops.dequantize(on_card[0], *moved, *layout)
                assert_same_bytes(decoded, ops.dequantize(packed, *scales, *layout))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_of_the_reference(name, dtype, generator):
    """The oracle in plain torch, of which the Rust core knows nothing."""
    values = torch.tensor(reference.CODEBOOKS[name])
    for kind in KINDS:
        x = make(kind, (37, 111), dtype, generator)
        packed, absmax = reference.quantize(x, values, 64)
        on_card = ops.quantize(x.to(CARD), name, 64)
        assert_same_bytes(on_card[0].view(-1), packed)
        assert_same_bytes(on_card[1], absmax)
        scales = (float_bytes(on_card[1]), None, None)
        restored = ops.dequantize(on_card[0], *scales, name, 64, x.shape, dtype)
        expected = reference.dequantize(packed, absmax, values, 64, x.shape, dtype)
        assert_same_bytes(restored, expected)


@pytest.mark.parametrize("count", [0, 1, 31, 255, 256, 257, 1023, 1025, 5000, 1_000_003])
def test_double_quantization(count):
    absmax = numbers(count).abs()
    expected = ops.quantize_absmax(absmax)
    parts = ops.quantize_absmax(absmax.to(CARD))
    for ours, part in zip(parts, expected, strict=True):
        assert_same_bytes(ours, part)
    assert_same_bytes(ops.dequantize_absmax(*parts), ops.dequantize_absmax(*expected))


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"codebook": "fp4"}], ids=str)
def test_quantize_of_the_library(options):
    x = numbers(300, 301, dtype=torch.bfloat16)
    on_cpu, on_card = fourbit.quantize(x, **options), fourbit.quantize(x.to(CARD), **options)
    assert on_card.device.type == CARD.type
    assert_same_parts(on_card, on_cpu)
    assert_same_bytes(on_card.scales(), on_cpu.scales())
    for dtype in DTYPES:
        assert_same_bytes(on_card.dequantize(dtype), on_cpu.dequantize(dtype))
    assert_same_parts(on_cpu.to(CARD), on_card.to("cpu"))


def test_views_are_taken_as_they_are():
    """Strides, repeated elements, and offsets that break every alignment."""
    flat = numbers(3 * 5000 + 7, dtype=torch.bfloat16)
    whole = flat.to(CARD)
    for view in (
        lambda t: t[1:],
        lambda t: t[3:4999],
        lambda t: t[: 3 * 5000].view(100, 150)[:, ::2],
        lambda t: t[: 3 * 5000].view(100, 150).t(),
        lambda t: t[5 : 5 + 64].expand(10, 64),
        lambda t: t[1].expand(1000),
    ):
        x, on_card = view(flat), view(whole)
        expected = ops.quantize(x.contiguous(), "nf4", 32)
        for ours, part in zip(ops.quantize(on_card, "nf4", 32), expected, strict=True):
            assert_same_bytes(ours, part)


def test_parts_at_any_address():
    x = numbers(40, 50)
    packed, absmax = ops.quantize(x, "nf4", 32)
    nested = ops.quantize_absmax(absmax)
    for scales in ((float_bytes(absmax), None, None), nested):
        layout = ("nf4", 32, x.shape, torch.float16)
        expected = ops.dequantize(packed, *scales, *layout)
        for offset in (1, 2, 4, 7):
            moved = []
            for part in (packed.view(-1), *scales):
                if part is None:
                    moved.append(None)
                    continue
                shifted = torch.empty(part.numel() + offset, dtype=torch.uint8, device=CARD)
                moved.append(shifted[offset:].copy_(part))
            assert_same_bytes(ops.dequantize(*moved, *layout), expected)
        strided = packed.view(-1).repeat_interleave(2).to(CARD)[::2]
        on_card = [None if part is None else part.to(CARD) for part in scales]
        assert_same_bytes(ops.dequantize(strided, *on_card, *layout), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_number_that_is_not_finite_is_named(bad, dtype):
    for first in (0, 4321, 199_999):
        x = numbers(200_000, dtype=dtype)
        x[[first, 199_999]] = bad
        messages = []
        for tensor in (x, x.to(CARD)):
            with pytest.raises(fourbit.NonFiniteError, match=f"element {first}") as error:
                fourbit.quantize(tensor)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_scales_that_cannot_be_quantized_are_refused():
    absmax = torch.full((100,), torch.finfo(torch.float32).max)
    absmax[:40] = 0
    with pytest.raises(ValueError, match="too large for its scale"):
        ops.quantize_absmax(absmax.to(CARD))
    absmax[7] = float("inf")
    messages = []
    for tensor in (absmax, absmax.to(CARD)):
        with pytest.raises(fourbit.NonFiniteError) as error:
            ops.quantize_absmax(tensor)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_wrong_dtypes_and_sizes_are_refused_by_name():
    on_card = fourbit.quantize(numbers(48, 200).to(CARD))
    names = ("packed", "absmax", "nested_absmax", "nested_offset")
    parts = dict(zip(names, on_card._parts(), strict=True))
    layout = ("nf4", 64, (48, 200), torch.bfloat16)
    for name, part in parts.items():
        tensor = part.view(-1)
        for changed in (tensor[:-1], torch.cat([tensor, tensor[:1]])):
            with pytest.raises(ValueError, match=f"{name} has .* elements where the layout needs"):
                ops.dequantize(**{**parts, name: changed}, **_named(layout))
        with pytest.raises(TypeError, match=f"{name} is torch.int8 where uint8"):
            ops.dequantize(**{**parts, name: tensor.to(torch.int8)}, **_named(layout))
    for dtype in (torch.float64, torch.int32, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
            fourbit.quantize(torch.ones(64, dtype=dtype, device=CARD))
    with pytest.raises(TypeError, match="float64"):
        ops.quantize_absmax(torch.ones(64, dtype=torch.float64, device=CARD))
    with pytest.raises(ValueError, match="block size 48"):
        ops.quantize(torch.ones(64, device=CARD), "nf4", 48)


def test_parts_on_two_devices_are_refused_by_name():
    on_cpu = fourbit.quantize(numbers(48, 200))
    names = ("packed", "absmax", "nested_absmax", "nested_offset")
    layout = ("nf4", 64, (48, 200), torch.bfloat16)
    on_card = dict(zip(names, on_cpu.to(CARD)._parts(), strict=True))
    for name, part in zip(names, on_cpu._parts(), strict=True):
        with pytest.raises(RuntimeError, match=r"is on .* and the codes are on") as error:
            ops.dequantize(**{**on_card, name: part}, **_named(layout))
        assert "cpu" in str(error.value)
        assert str(CARD) in str(error.value)


def _named(layout):
    return dict(zip(("codebook", "block_size", "shape", "dtype"), layout, strict=True))


def test_more_than_2_31_elements():
    """And as a weight: products whose codes lie on both sides of element 2^31."""
    rows, columns = (1 << 16) + 48, 1 << 15
    count = rows * columns
    # The matrix, its numbers again, codes, scales, and what torch needs to make them.
    need_memory(2 * 2 * count + count + (2 << 30))
    boundary = (1 << 31) // columns
    w = torch.empty(rows, columns, dtype=torch.bfloat16, device=CARD)
    for start in range(0, rows, 4096):
        w[start : start + 4096].normal_()
    quantized = fourbit.quantize(w)
    windows = [slice(0, 24), slice(boundary - 8, boundary + 16), slice(rows - 24, rows)]
    restored = quantized.dequantize()
    on_cpu = []
    absmax = quantized.scales().cpu()
    for window in windows:
        first, last = window.start * columns, window.stop * columns
        packed, scales = ops.quantize(w[window].cpu(), "nf4", 64)
        assert_same_bytes(quantized.packed[first // 2 : last // 2], packed)
        plain = ops.quantize(w[window].contiguous(), "nf4", 64)[1]
        assert_same_bytes(plain, scales)
        blocks = (float_bytes(absmax[first // 64 : last // 64]), None, None)
        decoded = ops.dequantize(packed, *blocks, "nf4", 64, (24, columns), torch.bfloat16)
        assert_same_bytes(restored[window], decoded)
        on_cpu.append(decoded)
    scales = ops.quantize(w, "nf4", 64)[1]
    del w, restored
    # All scales together, whose mean is the offset, as the CPU quantizes them.
    parts = (quantized.absmax, quantized.nested_absmax, quantized.nested_offset)
    for ours, expected in zip(parts, ops.quantize_absmax(scales.cpu()), strict=True):
        assert_same_bytes(ours, expected)

    seen = torch.cat(on_cpu)
    chosen = torch.cat([torch.arange(window.start, window.stop) for window in windows])
    for m in (1, 16):
        x = numbers(m, columns, dtype=torch.bfloat16)
        y = linear(x.to(CARD), None, quantized)
        found = torch.cat([y[:, window] for window in windows], dim=1)
        assert_product(found, x, seen.T, None)
        gradient = torch.zeros(m, rows, dtype=torch.bfloat16)
        gradient[:, chosen] = numbers(m, len(chosen), dtype=torch.bfloat16)
        found = linear_transposed(gradient.to(CARD), quantized)
        assert_product(found, gradient[:, chosen], seen, None)


def test_as_bitsandbytes_decodes(generator):
    functional = pytest.importorskip("bitsandbytes.functional")
    try:
        functional.quantize_4bit(torch.ones(64, device=CARD))
    except RuntimeError as error:
        pytest.skip(f"bitsandbytes does not work on this card: {error}")
    for dtype in DTYPES:
        w = make("normal", (128, 512), dtype, generator).to(CARD)
        for name in ("nf4", "fp4"):
            for double in (False, True):
                packed, state = functional.quantize_4bit(
                    w, blocksize=64, quant_type=name, compress_statistics=double
                )
                scales = (float_bytes(state.absmax), None, None)
                if double:
                    nested = float_bytes(state.state2.absmax)
                    scales = (state.absmax, nested, float_bytes(state.offset.view(1)))
                ours = ops.dequantize(packed, *scales, name, 64, w.shape, dtype)
                theirs = functional.dequantize_4bit(packed, state)
                # The same values times the same scales; their table and result may be rounded once
                # more than ours.
                torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_arrays_of_cupy():
    cupy = pytest.importorskip("cupy")
    array = cupy.asarray(numbers(100, 65).numpy())
    on_card, on_cpu = fourbit.quantize(array), fourbit.quantize(numbers(100, 65))
    assert_same_parts(on_card, on_cpu)
    restored = on_card.dequantize()
    assert isinstance(restored, cupy.ndarray)
    assert_same_bytes(torch.from_dlpack(restored), on_cpu.dequantize())
