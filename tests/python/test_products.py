"""Products straight from the codes, on every instruction set of this machine, in float64's eyes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fourbit
from fourbit import _core, ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the sum of the magnitudes of a number's terms: sums in single precision, and one rounding of
# the output, for bfloat16 also one of the weight's numbers.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def decoded(quantized):
    """The weight in float64, by the reference alone."""
    absmax = quantized.absmax
    if quantized.nested_absmax is None:
        scales = absmax.view(torch.float32)
    else:
        nested, offset = quantized.nested_absmax, quantized.nested_offset
        scales = reference.dequantize_absmax(
            absmax, nested.view(torch.float32), offset.view(torch.float32).item()
        )
    values = torch.tensor(quantized.codebook.values)
    parts = (quantized.packed, scales, values, quantized.block_size)
    return reference.dequantize(*parts, quantized.shape, torch.float32).double()


def products(backend, quantized, x, y, bias, threads=2):
    """``x W^T + b`` and ``y W``."""
    parts = (quantized.packed, quantized.absmax, quantized.nested_absmax, quantized.nested_offset)
    weight = (*parts, quantized.codebook.core, quantized.block_size, tuple(quantized.shape))
    out_features, in_features = quantized.shape
    forward = x.new_full((len(x), out_features), float("nan"))
    backward = y.new_full((len(y), in_features), float("nan"))
    _core.linear(x, *weight, bias, forward, threads=threads, backend=backend)
    _core.linear_transposed(y, *weight, backward, threads=threads, backend=backend)
    return forward, backward


@settings(max_examples=60, deadline=None)
@given(
    out_features=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 192, 320, 640])),
    rows=st.one_of(st.integers(0, 20), st.sampled_from([31, 40, 70])),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    codebook=st.sampled_from(["nf4", "fp4", "int4"]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_products_of_any_shape_on_any_backend(
    out_features, in_features, rows, block_size, codebook, double_quant, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(out_features, in_features, generator=generator)
    quantized = fourbit.quantize(
        dense, codebook=codebook, block_size=block_size, double_quant=double_quant
    )
    x, y, bias = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, in_features), (rows, out_features), (out_features,))
    )
    weight = decoded(quantized)
    pairs = (
        (reference.linear(x, weight, bias), x.double().abs() @ weight.abs().T + bias.abs()),
        (y.double() @ weight, y.double().abs() @ weight.abs()),
    )
    for backend in _core.simd_backends():
        found = products(backend, quantized, x, y, bias)
        for output, (expected, size) in zip(found, pairs, strict=True):
            error = (output.double() - expected).abs()
            # Below 6e-5 float16 rounds to a fixed step.
            assert (error <= TOLERANCE[dtype] * size + 6e-8).all(), backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads(dtype):
    quantized = fourbit.quantize(torch.randn(300, 640))
    for rows in (1, 3, 17, 70):
        x, y = torch.randn(rows, 640).to(dtype), torch.randn(rows, 300).to(dtype)
        for backend in _core.simd_backends():
            alone, together = (
                products(backend, quantized, x, y, None, threads=count) for count in (1, 3)
            )
            for one, other in zip(alone, together, strict=True):
                assert torch.equal(one, other), backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_operators_take_views_and_constants_that_are_not_aligned(dtype, double_quant):
    quantized = fourbit.quantize(torch.randn(48, 128), double_quant=double_quant)
    layout = (quantized.codebook.name, quantized.block_size, 48, 128)
    parts = (quantized.absmax, quantized.nested_absmax, quantized.nested_offset)

    def odd(part):
        if part is None:
            return None
        memory = torch.empty(part.numel() + 1, dtype=torch.uint8)
        return memory[1:].copy_(part.view(-1))

    wide = torch.randn(5, 256).to(dtype)
    x = wide[:, ::2]
    expected = ops.linear(x.contiguous(), None, quantized.packed, *parts, *layout)
    found = ops.linear(x, None, quantized.packed, *map(odd, parts), *layout)
    assert torch.equal(found, expected)
    tall = torch.randn(48, 5).to(dtype).T
    transposed = torch.ops.fourbit.linear_transposed.default
    expected = transposed(tall.contiguous(), quantized.packed, *parts, *layout)
    assert torch.equal(transposed(tall, quantized.packed, *map(odd, parts), *layout), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_nothing_times_nothing_is_zero(dtype, rows):
    parts = (torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8), None, None)
    core = fourbit.codebook.by_name("nf4").core
    for backend in _core.simd_backends():
        options = {"threads": 2, "backend": backend}
        found = torch.full((rows, 5), float("nan"), dtype=dtype)
        operand, bias = torch.empty(rows, 0, dtype=dtype), torch.arange(5).to(dtype)
        _core.linear(operand, *parts, core, 64, (5, 0), bias, found, **options)
        assert torch.equal(found, bias.expand(rows, 5)), backend
        found = torch.full((rows, 64), float("nan"), dtype=dtype)
        _core.linear_transposed(operand, *parts, core, 64, (0, 64), found, **options)
        assert torch.equal(found, torch.zeros_like(found)), backend


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"packed": lambda part: part[1:]}, "packed"),
        ({"absmax": lambda part: part[1:]}, "absmax"),
        ({"nested_absmax": lambda part: part[1:]}, "multiple of four"),
        ({"nested_offset": lambda part: None}, "without nested_offset"),
        ({"nested_offset": lambda part: part[:0]}, "nested_offset is empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_agree_are_refused(change, said):
    quantized = fourbit.quantize(torch.randn(48, 128))
    names = ("packed", "absmax", "nested_absmax", "nested_offset")
    parts = (change.get(name, lambda part: part)(getattr(quantized, name)) for name in names)
    weight = (*parts, quantized.codebook.core, 64, (48, 128))
    with pytest.raises(ValueError, match=said):
        _core.linear(torch.randn(2, 128), *weight, None, torch.empty(2, 48), threads=1)
