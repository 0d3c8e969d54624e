"""The CUDA operators without a GPU: their own code, with launches run by the emulator.

What is shown: which kernels are called, with which arguments, and what becomes of their results.
"""

import pytest
import torch

import emulate
import emulated_program
import fourbit
from emulated_program import EmulatedProgram
from fourbit import _core, cuda_ops, ops
from fourbit.codebook import Codebook
from fourbit.operands import float_bytes
from tensors import product_bound

if emulate.unavailable():
    pytest.skip(emulate.unavailable(), allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulated_program.patch(monkeypatch)


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (64,), (7, 333), (3, 5, 700)])
def test_quantize_and_back_as_on_the_cpu(dtype, shape):
    x = numbers(*shape, dtype=dtype)
    packed, absmax = cuda_ops.quantize(x, "nf4", 64)
    expected = ops.quantize(x, "nf4", 64)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    scales = float_bytes(absmax), None, None
    restored = cuda_ops.dequantize(packed, *scales, "nf4", 64, list(shape), dtype)
    assert torch.equal(restored, ops.dequantize(packed, *scales, "nf4", 64, shape, dtype))


@pytest.mark.parametrize("count", [1, 255, 256, 1025, 5000])
def test_double_quantization_as_on_the_cpu(count):
    absmax = numbers(count).abs()
    parts = cuda_ops.quantize_absmax(absmax)
    expected = ops.quantize_absmax(absmax)
    for ours, theirs in zip(parts, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(cuda_ops.dequantize_absmax(*parts), ops.dequantize_absmax(*expected))


@pytest.mark.parametrize("name", ["fp4", "int4", "emulated-two-bit"])
def test_codebooks_with_quantized_scales(name):
    if name == "emulated-two-bit":
        Codebook({0: 1.0, 1: -1.0, 3: 0.25}, ties="upper", name=name)
    x = numbers(3, 1000, dtype=torch.bfloat16)
    packed, absmax = cuda_ops.quantize(x, name, 128)
    parts = cuda_ops.quantize_absmax(absmax)
    arguments = (packed, *parts, name, 128, [3, 1000], torch.float16)
    assert torch.equal(cuda_ops.dequantize(*arguments), ops.dequantize(*arguments))


def test_nothing_is_launched_for_nothing():
    empty = torch.empty(3, 0)
    packed, absmax = cuda_ops.quantize(empty, "nf4", 64)
    assert (packed.shape, absmax.shape) == ((0, 1), (0,))
    parts = cuda_ops.quantize_absmax(absmax)
    expected = ops.quantize_absmax(absmax)
    assert [part.tolist() for part in parts] == [part.tolist() for part in expected]
    assert cuda_ops.dequantize_absmax(*parts).shape == (0,)
    restored = cuda_ops.dequantize(packed, *parts, "nf4", 64, [3, 0], torch.float32)
    assert restored.shape == (3, 0)


def test_strided_input_and_misaligned_parts():
    x = numbers(40, 50)[:, ::2]
    packed, absmax = cuda_ops.quantize(x, "nf4", 32)
    expected = ops.quantize(x.contiguous(), "nf4", 32)
    assert torch.equal(packed, expected[0])
    moved = torch.empty(4 * absmax.numel() + 1, dtype=torch.uint8)[1:]
    moved.copy_(float_bytes(absmax))
    wide = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:]
    wide.copy_(packed.view(-1))
    for codes in (packed, wide, packed.view(-1).repeat_interleave(2)[::2]):
        restored = cuda_ops.dequantize(codes, moved, None, None, "nf4", 32, [1000], torch.float32)
        plain = float_bytes(absmax), None, None
        assert torch.equal(
            restored, ops.dequantize(packed, *plain, "nf4", 32, (1000,), torch.float32)
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_number_that_is_not_finite_is_named_as_on_the_cpu(bad):
    x = numbers(9000)
    x[[4321, 8999]] = bad
    with pytest.raises(fourbit.NonFiniteError) as ours:
        cuda_ops.quantize(x, "nf4", 64)
    with pytest.raises(fourbit.NonFiniteError) as theirs:
        ops.quantize(x, "nf4", 64)
    assert str(ours.value) == str(theirs.value)
    assert "element 4321" in str(ours.value)


def test_scales_that_cannot_be_quantized_are_refused_as_on_the_cpu():
    absmax = torch.full((100,), torch.finfo(torch.float32).max)
    absmax[:40] = 0
    for quantize_absmax in (cuda_ops.quantize_absmax, ops.quantize_absmax):
        with pytest.raises(ValueError, match="too large for its scale"):
            quantize_absmax(absmax)
    absmax[7] = float("inf")
    messages = []
    for quantize_absmax in (cuda_ops.quantize_absmax, ops.quantize_absmax):
        with pytest.raises(fourbit.NonFiniteError) as error:
            quantize_absmax(absmax)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def weight(out_features=48, in_features=200, dtype=torch.float32):
    dense = numbers(out_features, in_features)
    quantized = fourbit.quantize(dense, block_size=64)
    parts = (quantized.packed, quantized.absmax, quantized.nested_absmax, quantized.nested_offset)
    layout = ("nf4", 64, out_features, in_features)
    return quantized.dequantize(dtype), (*parts, *layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (3,), (2, 4), (2, 9), (64,), (70,), (0,)])
@pytest.mark.parametrize(("out_features", "in_features"), [(48, 200), (40, 576)])
def test_products(dtype, rows, out_features, in_features):
    """The second shape is one of tensor cores, whose sums are cut in two."""
    dense, packed = weight(out_features, in_features)
    x = numbers(*rows, in_features, dtype=dtype)
    y = numbers(*rows, out_features, dtype=dtype)
    bias = numbers(out_features).to(dtype)
    for ours, operand, matrix, added in (
        (cuda_ops.linear(x, bias, *packed), x, dense.T, bias),
        (cuda_ops.linear(x, None, *packed), x, dense.T, torch.zeros(out_features)),
        (cuda_ops.linear_transposed(y, *packed), y, dense, torch.zeros(in_features)),
    ):
        exact = operand.double() @ matrix.double() + added.double()
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        bound = product_bound(operand, matrix, added)
        assert bool(((ours.double() - exact).abs() <= bound).all())


@pytest.fixture
def launched(monkeypatch):
    names = []
    launch = EmulatedProgram.launch

    def watched(self, kernel, stream, arguments):
        names.append(kernel)
        launch(self, kernel, stream, arguments)

    monkeypatch.setattr(EmulatedProgram, "launch", watched)
    return names


@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [
        (1, torch.bfloat16, "matvec_tensor_1"),
        (2, torch.float16, "matvec_tensor_2"),
        (3, torch.bfloat16, "matvec_tensor_4"),
        (4, torch.float16, "matvec_tensor_4"),
        (1, torch.float32, "matvec_1"),
        (5, torch.bfloat16, "matmul_8"),
        (17, torch.bfloat16, "matmul_32"),
        (64, torch.bfloat16, "matmul_64"),
        (65, torch.bfloat16, "dequantize"),
        (8, torch.float32, "matvec_8"),
        (9, torch.float32, "dequantize"),
    ],
)
def test_which_kernel_multiplies(rows, dtype, expected, launched):
    _, packed = weight(40, 576)
    cuda_ops.linear(numbers(rows, 576, dtype=dtype), None, *packed)
    assert launched == [f"fourbit_{expected}"]
    launched.clear()
    cuda_ops.linear_transposed(numbers(rows, 40, dtype=dtype), *packed)
    at_once = next((number for number in (8, 16, 32, 64) if number >= rows), None)
    on_tensor_cores = dtype != torch.float32 and at_once
    name = f"matmul_transposed_{at_once}" if on_tensor_cores else "dequantize"
    assert launched == [f"fourbit_{name}"]


def test_few_rows_of_odd_widths_take_the_kernel_of_32(launched):
    """That of 8 takes 64 columns at a time with one scale."""
    for block_size, expected in ((64, "matmul_32"), (32, "matmul_8")):
        quantized = fourbit.quantize(numbers(40, 544), block_size=block_size)
        parts = (quantized.packed, quantized.absmax, quantized.nested_absmax)
        x = numbers(5, 544, dtype=torch.bfloat16)
        y = cuda_ops.linear(x, None, *parts, quantized.nested_offset, "nf4", block_size, 40, 544)
        assert launched.pop() == f"fourbit_{expected}"
        expected_y = x.double() @ quantized.dequantize(torch.float32).double().T
        assert torch.allclose(y.double(), expected_y, rtol=2**-6, atol=0.5)


def test_cards_before_sm80_have_fewer_kernels(launched, monkeypatch):
    monkeypatch.setattr(cuda_ops, "_capability", lambda device: 75)
    _, packed = weight(40, 576)
    for rows, dtype, expected in (
        (32, torch.float16, "matmul_32"),
        (33, torch.float16, "dequantize"),
        (8, torch.bfloat16, "matvec_8"),
        (9, torch.bfloat16, "dequantize"),
        (4, torch.float16, "matvec_4"),
    ):
        cuda_ops.linear(numbers(rows, 576, dtype=dtype), None, *packed)
        assert launched.pop() == f"fourbit_{expected}"


def test_what_few_rows_on_tensor_cores_need(launched):
    """Groups of 64 columns, and addresses that are multiples of 16."""
    x = numbers(1, 576, dtype=torch.bfloat16)
    cuda_ops.linear(x, None, *weight(40, 576)[1])
    assert launched.pop() == "fourbit_matvec_tensor_1"
    cuda_ops.linear(x[:, :544], None, *weight(40, 544)[1])
    assert launched.pop() == "fourbit_matvec_1"
    moved = torch.empty(577, dtype=torch.bfloat16)[1:].reshape(1, 576)
    moved.copy_(x)
    cuda_ops.linear(moved, None, *weight(40, 576)[1])
    assert launched.pop() == "fourbit_matvec_1"


@pytest.mark.parametrize(
    ("rows", "most"),
    [
        # Lines of 64 columns that fit besides table, nested codebook and sums, in windows of 512.
        (1, {75: 0, 80: 65536, 86: 32768, 89: 32768, 90: 98304, 100: 98304, 120: 32768}),
        (2, {75: 0, 80: 32256, 86: 15872, 89: 15872, 90: 48640, 100: 48640, 120: 15872}),
        (4, {75: 0, 80: 15360, 86: 7168, 89: 7168, 90: 23552, 100: 23552, 120: 7168}),
    ],
)
def test_how_many_columns_few_rows_on_tensor_cores_may_have(rows, most):
    for capability, depth in most.items():

        def takes(depth, block_size=64, columns=4096, capability=capability):
            return _core.matvec_tensor_takes(
                rows=rows,
                columns=columns,
                depth=depth,
                block_size=block_size,
                capability=capability,
            )

        assert takes(depth) == (depth > 0)
        assert not takes(depth + 64)
        assert not takes(0)
        if depth:
            assert not takes(96)
            assert takes(96, block_size=32)
            assert not takes(80, block_size=32)
            assert takes(128, columns=2**30 - 16)
            assert not takes(128, columns=2**30)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_few_rows_are_multiplied_from_packed_codes(rows, launched):
    _, packed = weight()
    cuda_ops.linear(numbers(rows, 200), None, *packed)
    at_once = {1: 1, 2: 2, 3: 4, 5: 8, 8: 8}[rows]
    assert launched == [f"fourbit_matvec_{at_once}"]
    # Codes that are not aligned as that kernel needs are decoded.
    moved = torch.empty(packed[0].numel() + 1, dtype=torch.uint8)[1:]
    moved.copy_(packed[0].view(-1))
    cuda_ops.linear(numbers(rows, 200), None, moved, *packed[1:])
    assert launched[1:] == ["fourbit_dequantize"]


def test_what_a_graph_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(cuda_ops, "_is_capturing", lambda device: True)
    for name, call in (
        ("quantize", lambda: cuda_ops.quantize(numbers(64), "nf4", 64)),
        ("quantize_absmax", lambda: cuda_ops.quantize_absmax(numbers(64).abs())),
    ):
        with pytest.raises(RuntimeError, match=f"^{name} looks at its result .* before the captu"):
            call()


@pytest.fixture
def counted(monkeypatch):
    """Of each product that is launched: the address of counters it was given, and its slot."""
    register = _core.kernel_register()
    of_kernel = {name: names for _, _, _, kernels in register for name, _, names in kernels}
    seen = []
    launch = EmulatedProgram.launch

    def watched(self, kernel, stream, arguments):
        given = dict(zip(of_kernel[kernel], arguments, strict=True))
        assert given["splits"] > 1
        seen.append((given["arrived"], given["slot"]))
        launch(self, kernel, stream, arguments)

    monkeypatch.setattr(EmulatedProgram, "launch", watched)
    return seen


def products():
    """Of a weight whose sums are cut."""
    _, packed = weight(40, 544)
    x = numbers(16, 544, dtype=torch.bfloat16)
    return [cuda_ops.linear(x, None, *packed), cuda_ops.linear(2 * x, None, *packed)]


def test_sums_that_are_cut_are_counted_in_a_slot_of_their_stream(counted, monkeypatch):
    slots = _core.COUNTER_SLOTS
    expected = products()
    assert counted == [(0, 0)] * 2
    for stream in (*range(100, 100 + slots), 0, 100):
        monkeypatch.setattr(cuda_ops, "stream_of", lambda device, stream=stream: stream)
        assert all(map(torch.equal, products(), expected))
    found = [(arrived != 0, slot) for arrived, slot in counted[2:]]
    # Stream 0 had the first slot, so for the last of the others none was left.
    by_stream = [(False, slot) for slot in range(1, slots)] + [(True, 0), (False, 0), (False, 1)]
    assert found == [pair for pair in by_stream for _ in range(2)]


def test_devices_have_slots_of_their_own(monkeypatch):
    monkeypatch.setattr(cuda_ops, "_ordinal", lambda device: device.index)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    found = [
        cuda_ops._counter_slot(device, stream, 1)
        for device, stream in ((first, 5), (second, 6), (first, 6), (second, 5), (second, 6))
    ]
    assert found == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("why", ["capturing", "stream", "tiles"])
def test_counters_are_a_tensor_of_zeros_where_no_slot_is_safe(why, counted, monkeypatch):
    """A graph may be replayed on any stream; handle 2 is another stream in each thread."""
    expected = products()
    counted.clear()
    if why == "capturing":
        monkeypatch.setattr(cuda_ops, "_is_capturing", lambda device: True)
    elif why == "stream":
        monkeypatch.setattr(cuda_ops, "stream_of", lambda device: 2)
    else:
        monkeypatch.setattr(cuda_ops._core, "SLOT_COUNTERS", 0)
    assert all(map(torch.equal, products(), expected))
    assert len(counted) == 2
    assert all(arrived for arrived, _ in counted)


def test_cuts_of_tiles_that_no_kernel_has_are_refused():
    with pytest.raises(ValueError, match=r"tile_rows is 12; use one of \[8, 16, 32, 64\]"):
        _core.product_cut(
            "matmul",
            rows=12,
            tile_rows=12,
            columns=64,
            depth=64,
            block_size=64,
            capability=90,
            processors=132,
        )


def test_parts_of_the_wrong_size_dtype_or_place_are_named():
    _, packed = weight()
    x = numbers(2, 200)

    def linear(**changes):
        names = ["packed", "absmax", "nested_absmax", "nested_offset"]
        parts = {**dict(zip(names, packed[:4], strict=True)), **changes}
        return cuda_ops.linear(x, None, *parts.values(), *packed[4:])

    linear()
    for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
        part = dict(
            zip(["packed", "absmax", "nested_absmax", "nested_offset"], packed, strict=False)
        )
        tensor = part[name].view(-1)
        for changed in (tensor[:-1], torch.cat([tensor, tensor[:1]])):
            with pytest.raises(ValueError, match=f"{name} has .* elements where the layout needs"):
                linear(**{name: changed})
        with pytest.raises(TypeError, match=f"{name} is torch.int8 where uint8"):
            linear(**{name: tensor.to(torch.int8)})
        with pytest.raises(RuntimeError, match="on meta"):
            linear(**{name: tensor.to("meta")})
    with pytest.raises(ValueError, match="without nested_offset"):
        linear(nested_offset=None)
    with pytest.raises(ValueError, match="block size 48"):
        cuda_ops.quantize(x, "nf4", 48)
    with pytest.raises(TypeError, match="float64"):
        cuda_ops.quantize(x.double(), "nf4", 64)
    with pytest.raises(TypeError, match="int32"):
        cuda_ops.dequantize(*packed[:6], [48, 200], torch.int32)
    with pytest.raises(ValueError, match="unknown codebook"):
        cuda_ops.quantize(x, "nf5", 64)
    with pytest.raises(ValueError, match="features in its last dimension"):
        cuda_ops.linear(x[:, 1:], None, *packed)
