"""`quantize` and `QuantizedTensor` against the plain-torch reference: equal bytes."""

import copy
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fourbit
from fourbit import _core, ops, reference
from fourbit.operands import float_bytes, float_values
from tensors import BLOCK_SIZES, DTYPES, KINDS, SHAPES, make

CODEBOOKS = {
    **reference.CODEBOOKS,
    "three-bit": (-1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.6, 1.0),
    "two-bit": (-1.0, 0.3, 0.5, 1.0),
    "six-bit": tuple(torch.linspace(-1, 1, 50).tolist()),
}


def codebook(name: str):
    return name if name in reference.CODEBOOKS else dict(enumerate(CODEBOOKS[name]))


def assert_equals_reference(x, name, block_size, *, double_quant):
    q = fourbit.quantize(
        x, codebook=codebook(name), block_size=block_size, double_quant=double_quant
    )
    values = torch.tensor(CODEBOOKS[name])
    packed, absmax = reference.quantize(x, values, block_size)
    assert torch.equal(q.packed.view(-1), packed)
    if double_quant:
        codes, nested_absmax, offset = reference.quantize_absmax(absmax)
        assert torch.equal(q.absmax, codes)
        assert torch.equal(float_values(q.nested_absmax), nested_absmax)
        assert float_values(q.nested_offset).item() == offset
        absmax = reference.dequantize_absmax(codes, nested_absmax, offset)
    assert torch.equal(q.scales(), absmax)
    for dtype in DTYPES:
        expected = reference.dequantize(packed, absmax, values, block_size, x.shape, dtype)
        assert torch.equal(q.dequantize(dtype), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bytes_for_every_shape_and_block_size(kind, dtype, generator):
    for index, shape in enumerate(SHAPES):
        x = make(kind, shape, dtype, generator)
        # Every block size meets every kind and dtype; names rotate with the shape.
        block_size = BLOCK_SIZES[index % len(BLOCK_SIZES)]
        name = list(CODEBOOKS)[index % len(CODEBOOKS)]
        # Scales next to the largest number may round to infinity, which is refused: see below.
        double_quant = index % 2 == 0 and kind != "huge"
        assert_equals_reference(x, name, block_size, double_quant=double_quant)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
        max_size=200,
    ),
    repeat=st.integers(1, 40),
    block_size=st.sampled_from(BLOCK_SIZES),
    name=st.sampled_from(list(CODEBOOKS)),
)
def test_equal_bytes_for_any_finite_floats(values, repeat, block_size, name):
    x = torch.tensor(values, dtype=torch.float32).repeat(repeat)
    assert_equals_reference(x, name, block_size, double_quant=False)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1023, 1024, 1025, 5000])
def test_double_quantization_for_any_number_of_scales(count, generator):
    absmax = torch.rand(count, generator=generator) * 0.1
    codes, nested, offset = ops.quantize_absmax(absmax)
    expected_codes, expected_nested, expected_offset = reference.quantize_absmax(absmax)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(float_values(nested), expected_nested)
    assert float_values(offset).item() == expected_offset


@pytest.mark.parametrize("name", ["nf4", "int4"])
def test_every_backend_and_thread_count_gives_the_same_bytes(name, generator):
    x = make("heavy", (517, 1031), torch.bfloat16, generator)
    book = fourbit.codebook.by_name(name).core
    results = []
    for backend in _core.simd_backends():
        for threads in (1, 2, 7):
            packed = torch.empty(-(-x.numel() // 2), dtype=torch.uint8)
            absmax = torch.empty(-(-x.numel() // 64))
            _core.quantize(x, book, 64, packed, absmax, threads=threads, backend=backend)
            output = torch.empty_like(x)
            _core.dequantize(packed, absmax, book, 64, output, threads=threads, backend=backend)
            results.append((packed, absmax, output))
    assert all(
        torch.equal(got, first)
        for result in results
        for got, first in zip(result, results[0], strict=True)
    )


@pytest.mark.parametrize("backend", _core.simd_backends())
def test_large_outputs_hold_the_same_numbers(backend, generator):
    """They are written past the cache once their memory is there, small ones never."""
    x = torch.randn(17 * 2**20 + 5, generator=generator).bfloat16()
    assert x.nbytes > 32 * 2**20
    q = fourbit.quantize(x, double_quant=False)
    scales, book = q.scales(), q.codebook.core
    part = 2**16
    parts = []
    for start in range(0, x.numel(), part):
        output = torch.empty(min(part, x.numel() - start), dtype=x.dtype)
        packed = q.packed[start // 2 : (start + part) // 2].contiguous()
        absmax = scales[start // 64 : (start + part) // 64]
        _core.dequantize(packed, absmax, book, 64, output, threads=1, backend="scalar")
        parts.append(output)
    expected = torch.cat(parts)
    output = torch.empty_like(x)
    for _ in range(2):  # into memory that is new, and into memory that is there
        _core.dequantize(q.packed, scales, book, 64, output, threads=2, backend=backend)
        assert torch.equal(output, expected)
        output.fill_(7)
    # At an address that such writes do not allow.
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    _core.dequantize(q.packed, scales, book, 64, odd, threads=2, backend=backend)
    assert torch.equal(odd, expected)


def test_scales_that_would_become_infinite_are_refused():
    x = torch.full((100, 64), torch.finfo(torch.float32).max)
    x[:40] = 0  # so that the mean is 0.6 of the largest, and the rest of it rounds up
    with pytest.raises(ValueError, match="double_quant=False"):
        fourbit.quantize(x)
    assert fourbit.quantize(x, double_quant=False).dequantize().isfinite().all()


def test_the_published_example():
    q = fourbit.quantize(
        torch.tensor([10.0, -3, 5, 4]),
        codebook=fourbit.Codebook({0: -1.0, 1: 0.3, 2: 0.5, 3: 1.0}, ties="upper"),
        double_quant=False,
    )
    assert reference.unpack(q.packed.view(-1), 2, 4).tolist() == [3, 1, 2, 2]
    assert q.dequantize().tolist() == [10, 3, 5, 5]


def test_golden_pairs():
    assert fourbit.quantize(torch.tensor([1.0, -1.0])).packed.tolist() == [[0xF0]]
    zeros = fourbit.quantize(torch.zeros(3), double_quant=False)
    assert zeros.packed.tolist() == [[0x77], [0x77]]
    assert zeros.scales().tolist() == [0]


# Mean |error| and mean relative error of a million standard normal numbers, as bitsandbytes
# publishes them for its own tests, with the standard deviation of each over seeds (measured on 12).
@pytest.mark.parametrize(
    ("block_size", "name", "absolute", "relative"),
    [
        (32, "nf4", (0.067746, 8e-5), (0.189726, 2e-4)),
        (64, "nf4", (0.072798, 1e-4), (0.203339, 3e-4)),
        (256, "nf4", (0.080337, 1e-4), (0.226105, 4e-4)),
        (64, "fp4", (0.096543, 1e-4), (0.260125, 4e-4)),
        (1024, "fp4", (0.119333, 4e-4), (0.315000, 9e-4)),
    ],
)
def test_errors_are_those_of_the_published_table(block_size, name, absolute, relative, generator):
    x = torch.randn(1024, 1024, generator=generator)
    back = fourbit.quantize(
        x, codebook=name, block_size=block_size, double_quant=False
    ).dequantize()
    error = (x - back).abs()
    # Seven standard deviations: bitsandbytes' own margin.
    assert abs(error.mean() - absolute[0]) <= 7 * absolute[1]
    assert abs((error / (x.abs() + 1e-8)).mean() - relative[0]) <= 7 * relative[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [0, 63, 64, 70_000, 131_073])
def test_the_first_non_finite_element_is_named(bad, dtype, index):
    x = torch.ones(131_074, dtype=dtype)
    x[index:] = bad
    with pytest.raises(fourbit.NonFiniteError, match=f"^element {index} is "):
        fourbit.quantize(x)


def test_numpy_in_numpy_out(generator):
    x = torch.randn(5, 33, generator=generator)
    q = fourbit.quantize(x.numpy())
    back = q.dequantize()
    assert isinstance(back, np.ndarray)
    assert back.dtype == np.float32
    assert np.array_equal(back, fourbit.quantize(x).dequantize().numpy())
    assert q.dequantize(np.float16).dtype == np.float16
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert fourbit.quantize(np.array(3.0, np.float32)).dequantize().shape == ()
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    assert np.array_equal(fourbit.quantize(read_only).dequantize(), back)
    assert np.array_equal(fourbit.quantize(x.numpy().astype(">f4")).dequantize(), back)
    transposed = fourbit.quantize(np.asfortranarray(x.numpy()))
    assert np.array_equal(transposed.dequantize(), back)


class Array:
    """A foreign array: nothing but the protocol."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_any_dlpack_array(generator):
    x = torch.randn(9, 7, generator=generator)
    q = fourbit.quantize(Array(x))
    assert torch.equal(q.packed, fourbit.quantize(x).packed)
    assert type(q.dequantize()) is torch.Tensor, "nothing is known that would make an Array"


def test_dlpack_arrays_are_given_back_without_copies(generator, monkeypatch):
    """As CuPy's are: the library is found by the type's module, and has ``from_dlpack``."""
    library = types.ModuleType("arrays")
    monkeypatch.setitem(sys.modules, "arrays", library)
    library.Array = type("Array", (Array,), {"__module__": "arrays.core"})
    library.from_dlpack = lambda other: library.Array(torch.from_dlpack(other))
    x = torch.randn(9, 64, generator=generator)
    seen = []
    quantize = ops.quantize
    monkeypatch.setattr(
        ops, "quantize", lambda tensor, *rest: seen.append(tensor) or quantize(tensor, *rest)
    )
    q = fourbit.quantize(library.Array(x))
    assert seen[0].data_ptr() == x.data_ptr()
    back = q.dequantize()
    assert type(back) is library.Array
    assert torch.equal(back.tensor, fourbit.quantize(x).dequantize())
    assert type(q.dequantize(torch.float16)) is torch.Tensor
    assert type(q.to("cpu").dequantize()) is library.Array
    assert type(q.to("meta").dequantize()) is torch.Tensor
    assert type(fourbit.quantize(x.numpy()).to("meta").dequantize()) is torch.Tensor


def test_views_and_empty_tensors(generator):
    x = torch.randn(64, 96, generator=generator)
    for view in (x.T, x[::2], x[:, 1:], x.expand(2, 64, 96)):
        q = fourbit.quantize(view)
        assert torch.equal(q.packed, fourbit.quantize(view.contiguous()).packed)
        assert q.dequantize().shape == view.shape
    for shape in [(0,), (3, 0, 5)]:
        empty = fourbit.quantize(torch.empty(shape))
        assert empty.nbytes <= 4
        assert empty.dequantize().shape == shape


def test_it_is_a_value(generator):
    x = torch.randn(40, 40, generator=generator)
    custom = {0: -1.0, 5: 0.25, 9: 1.0}
    for q in (fourbit.quantize(x), fourbit.quantize(x, codebook=custom, double_quant=False)):
        for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu")):
            assert torch.equal(twin.dequantize(), q.dequantize())
            assert twin.codebook == q.codebook
    assert "nf4" in repr(fourbit.quantize(x))
    assert fourbit.quantize(torch.randn(64 * 256 * 16)).bits_per_element == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256), abs=1e-3
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fourbit.quantize([1.0]), TypeError, "list"),
        (lambda: fourbit.quantize(torch.ones(4, dtype=torch.float64)), TypeError, "float64"),
        (lambda: fourbit.quantize(torch.ones(4), block_size=48), ValueError, "48"),
        (lambda: fourbit.quantize(torch.ones(4), codebook="nf5"), ValueError, "nf5"),
        (lambda: fourbit.quantize(torch.ones(4), codebook={0: 1.0}), ValueError, "1 entries"),
        (lambda: fourbit.Codebook({0: -2.0, 1: 1.0}), ValueError, "-2"),
        (lambda: fourbit.Codebook({0: -1.0, 1: 1.0}, name="nf4"), ValueError, "nf4"),
        (lambda: fourbit.Codebook({0: -1.0, 300: 1.0}), ValueError, "300"),
        (lambda: fourbit.Codebook({0: -1.0, 1: 1.0}, ties="up"), ValueError, "ties"),
        (lambda: fourbit.quantize(torch.ones(4)).dequantize(torch.int8), TypeError, "int8"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_damaged_sizes_are_refused(generator):
    q = fourbit.quantize(torch.randn(100, generator=generator), double_quant=False)
    with pytest.raises(ValueError, match="packed has 49 elements where the layout needs 50"):
        ops.dequantize(q.packed[:-1], q.absmax, None, None, "nf4", 64, q.shape, torch.float32)
    with pytest.raises(ValueError, match="absmax"):
        ops.dequantize(q.packed, q.absmax[:-4], None, None, "nf4", 64, q.shape, torch.float32)


def test_negative_scales_decode(generator):
    """An encoder may choose a scale of either sign; every reader takes it."""
    q = fourbit.quantize(torch.randn(300, generator=generator), double_quant=False)
    scales = q.scales() * torch.tensor([1.0, -1.0, 0.7, -0.3, 1.0])
    for dtype in DTYPES:
        got = ops.dequantize(q.packed, float_bytes(scales), None, None, "nf4", 64, q.shape, dtype)
        values = torch.tensor(reference.NF4)
        assert torch.equal(
            got, reference.dequantize(q.packed.view(-1), scales, values, 64, q.shape, dtype)
        )
