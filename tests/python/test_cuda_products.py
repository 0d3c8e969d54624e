"""Products on a GPU against float64. How to run, with compute-sanitizer too: see ``on_card.py``."""

import pytest
import torch

import fourbit
from fourbit import _core, ops
from fourbit.codebook import Codebook
from on_card import (
    CARD,
    assert_product,
    assert_same_bytes,
    layer,
    linear,
    linear_transposed,
    numbers,
    parts_of,
)
from tensors import DTYPES

pytestmark = pytest.mark.cuda

# On both sides of every number of rows that some kernel takes at once.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 32, 63, 64, 65, 200)
# Aligned for every kernel; in part; not at all; more tiles of 16 than multiprocessors; and sums
# that are long enough to be cut into parts.
SHAPES = [(384, 1088), (40, 544), (129, 333), (4099, 576), (48, 8192)]


def weight(out_features, in_features, **options):
    """A quantized weight on the card, and its numbers on the CPU, in every dtype."""
    quantized = fourbit.quantize(numbers(out_features, in_features), **options)
    return quantized.to(CARD), {dtype: quantized.dequantize(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_products(out_features, in_features, dtype, double_quant):
    packed, dense = weight(out_features, in_features, double_quant=double_quant)
    bias = numbers(out_features, seed=8).to(dtype)
    for rows in ROWS:
        x = numbers(rows, in_features, dtype=dtype)
        y = numbers(rows, out_features, dtype=dtype)
        x_card, y_card = x.to(CARD), y.to(CARD)
        for added in (None, bias):
            added_card = None if added is None else added.to(CARD)
            product = linear(x_card, added_card, packed)
            assert_product(product, x, dense[dtype].T, added)
            assert torch.equal(linear(x_card, added_card, packed), product), f"{rows} rows, again"
        product = linear_transposed(y_card, packed)
        assert_product(product, y, dense[dtype], None)
        assert torch.equal(linear_transposed(y_card, packed), product), f"{rows} rows, again"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sums_that_are_cut_into_parts(dtype):
    """Few columns and a long sum; without the parts, most of the card would have nothing to do."""
    processors = torch.cuda.get_device_properties(CARD).multi_processor_count
    for rows in (5, 16, 64):
        at_once = next(number for number in (8, 16, 32, 64) if number >= rows)
        splits = _core.product_splits(
            rows=rows, tile_rows=at_once, columns=48, depth=8192, processors=processors
        )[1]
        assert splits > 1
        packed, dense = weight(48, 8192)
        x = numbers(rows, 8192, dtype=dtype)
        products = [linear(x.to(CARD), None, packed) for _ in range(10)]
        packed_t, dense_t = weight(8192, 64)
        y = numbers(rows, 8192, dtype=dtype)
        transposed = [linear_transposed(y.to(CARD), packed_t) for _ in range(10)]
        assert_product(products[0], x, dense[dtype].T, None)
        assert_product(transposed[0], y, dense_t[dtype], None)
        for results in (products, transposed):
            assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "options",
    [
        {"codebook": "fp4", "block_size": 32},
        {"codebook": "int4", "block_size": 4096},
        {"codebook": "nf4", "block_size": 512, "double_quant": False},
        {"codebook": Codebook({0: 1.0, 1: -1.0, 3: 0.25}, ties="upper", name="card-two-bit")},
        {"codebook": Codebook({i: i / 127.5 - 1 for i in range(256)}, name="card-byte")},
    ],
    ids=str,
)
def test_codebooks_and_block_sizes(options):
    """Blocks that cross the ends of rows, and codes of other widths, which are decoded first."""
    for out_features, in_features in ((65, 96), (31, 95)):
        packed, dense = weight(out_features, in_features, **options)
        for dtype in DTYPES:
            for rows in (1, 3, 12, 90):
                x = numbers(rows, in_features, dtype=dtype)
                y = numbers(rows, out_features, dtype=dtype)
                assert_product(linear(x.to(CARD), None, packed), x, dense[dtype].T, None)
                assert_product(linear_transposed(y.to(CARD), packed), y, dense[dtype], None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(), (0,), (3,), (2, 5), (2, 3, 4), (0, 7), (90,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_layer_forward_and_backward(rows, dtype, bias):
    on_card, on_cpu = layer(96, 160, dtype=dtype, bias=bias)
    x = numbers(*rows, 160, dtype=dtype)
    gradient = numbers(*rows, 96, dtype=dtype, seed=9)
    x_card = x.to(CARD).requires_grad_()
    output = on_card(x_card)
    output.backward(gradient.to(CARD))
    dense = on_cpu.dequantize(dtype)
    assert_product(output, x, dense.T, on_cpu.bias)
    assert_product(x_card.grad, gradient, dense, None)
    if bias:
        exact = gradient.double().reshape(-1, 96).sum(0)
        # Sums of at most 90 numbers, rounded once, in whatever order.
        size = gradient.double().abs().reshape(-1, 96).sum(0)
        error = (on_card.bias.grad.cpu().double() - exact).abs()
        assert bool((error <= torch.finfo(dtype).eps * size).all())


def test_views_are_taken_as_they_are():
    """Strides and misaligned rows of inputs and gradients, codes at odd addresses."""
    on_card, on_cpu = layer(96, 160)
    dense = on_cpu.dequantize(torch.bfloat16)
    whole = numbers(400, 400, dtype=torch.bfloat16)
    moved = whole.to(CARD)
    for rows in (1, 6, 40, 100):
        for view in (
            lambda t, rows=rows: t[1 : rows + 1, 1:161],
            lambda t, rows=rows: t[:rows, :320:2],
            lambda t, rows=rows: t.T[:rows, 7:167],
            lambda t, rows=rows: t[:1, :160].expand(rows, 160),
            lambda t, rows=rows: t.view(-1)[1 : rows * 160 + 1].view(rows, 160),
        ):
            assert_product(on_card(view(moved)), view(whole), dense.T, on_cpu.bias)
        quantized = on_card.quantized()
        gradient = numbers(rows * 96 + 1, dtype=torch.bfloat16)
        y = gradient[1:].view(rows, 96)
        y_card = gradient.to(CARD)[1:].view(rows, 96)
        assert_product(linear_transposed(y_card, quantized), y, dense, None)
        ones = torch.ones((), dtype=torch.bfloat16).expand(rows, 96)
        assert_product(linear_transposed(ones.to(CARD), quantized), ones, dense, None)
        packed, *rest = parts_of(quantized)
        shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=CARD)
        shifted[1:].copy_(packed.view(-1))
        x = numbers(rows, 160, dtype=torch.bfloat16)
        assert_product(ops.linear(x.to(CARD), None, shifted[1:], *rest), x, dense.T, None)


def test_autocast_and_bias_of_another_dtype():
    on_card, on_cpu = layer(96, 160, dtype=torch.float32)
    x = numbers(5, 160)
    with torch.autocast("cuda", torch.bfloat16):
        output = on_card(x.to(CARD))
    half = x.bfloat16()
    # A bias is rounded to the dtype of the product, as autocast does with a dense layer's.
    assert_product(output, half, on_cpu.dequantize(torch.bfloat16).T, on_cpu.bias.bfloat16())


def test_the_card_and_the_cpu_agree_on_schemas():
    packed = fourbit.quantize(numbers(48, 96)).to(CARD)
    checks = ("test_schema", "test_faketensor")
    for rows in (3, 20, 70):
        x, y = numbers(rows, 96).to(CARD), numbers(rows, 48).to(CARD)
        for operator, arguments in (
            (torch.ops.fourbit.linear.default, (x, None, *parts_of(packed))),
            (torch.ops.fourbit.linear_transposed.default, (y, *parts_of(packed))),
            (torch.ops.fourbit.quantize.default, (x, "nf4", 64)),
            (torch.ops.fourbit.quantize_absmax.default, (packed.scales(),)),
        ):
            torch.library.opcheck(operator, arguments, test_utils=checks)


def test_operands_elsewhere_are_refused_by_name():
    on_card, on_cpu = layer(48, 96)
    x = numbers(2, 96, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"input is on cpu and the layer on {CARD}"):
        on_card(x)
    with pytest.raises(RuntimeError, match=f"input is on {CARD} and the layer on cpu"):
        on_cpu(x.to(CARD))
    packed, *rest = parts_of(on_card.quantized())
    with pytest.raises(RuntimeError, match=f"bias is on cpu and the input on {CARD}"):
        ops.linear(x.to(CARD), on_cpu.bias.detach(), packed, *rest)
    with pytest.raises(RuntimeError, match=f"absmax is on cpu and the codes are on {CARD}"):
        ops.linear(x.to(CARD), None, packed, rest[0].cpu(), *rest[1:])
    y = numbers(2, 48, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="is on cpu"):
        torch.ops.fourbit.linear_transposed.default(y, packed, *rest)


def test_operands_that_do_not_fit_are_refused_by_name():
    on_card, _ = layer(48, 96)
    packed, absmax, *rest = parts_of(on_card.quantized())
    x = numbers(2, 96, dtype=torch.bfloat16).to(CARD)
    for rows in (1, 2, 20, 90):
        operand = x[:1].expand(rows, 96)
        with pytest.raises(ValueError, match=r"absmax has .* where the layout needs"):
            ops.linear(operand, None, packed, absmax[:-1], *rest)
        with pytest.raises(ValueError, match=r"packed has .* where the layout needs"):
            ops.linear(operand, None, packed[:-1], absmax, *rest)
    with pytest.raises(TypeError, match=r"absmax is torch.int8 where uint8"):
        ops.linear(x, None, packed, absmax.to(torch.int8), *rest)
    with pytest.raises(ValueError, match="the bias has 47 elements"):
        ops.linear(x, torch.ones(47, device=CARD), packed, absmax, *rest)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
            on_card(x.to(dtype))
    with pytest.raises(ValueError, match="95 features in its last dimension"):
        on_card(x[:, 1:])
    with pytest.raises(ValueError, match="single number"):
        on_card(x[0, 0])


def test_a_rows_place_among_others_changes_no_bit():
    on_card, _ = layer(384, 1056)
    x = numbers(64, 1056, dtype=torch.bfloat16).to(CARD)
    together = on_card(x)
    assert_same_bytes(on_card(x.flip(0)).flip(0), together.cpu())
