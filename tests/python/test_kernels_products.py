"""The CUDA products, run on the CPU by the emulator, against float64."""

import ctypes
from functools import cache
from itertools import product

import pytest
import torch

import emulate
from emulate import Buffer, Specialisation
from fourbit import _core, reference
from fourbit.codebook import Codebook, by_name

reason = emulate.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

# Code 0, which is what memory of zeros holds, is undefined and so NaN.
LATE = Codebook({9 + i: (i - 3) / 3 for i in range(7)}, name="late")
CODEBOOKS = ("nf4", "fp4", "int4", LATE.name)
# The same of code 15, which is what memory behind a buffer's end holds.
EARLY = Codebook({i: (i - 3) / 3 for i in range(7)}, name="early")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SINGLE = 2.0**-24  # half a unit in the last place of float32
HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: SINGLE}


class Weight:
    """A random packed weight [n, k], its scales of both signs."""

    def __init__(self, n, k, generator, *, block_size=64, double_quant=False, codebook="nf4"):
        self.n, self.k, self.block_size = n, k, block_size
        self.double_quant, self.codebook = double_quant, codebook
        count = n * k
        blocks = -(-count // block_size)
        packed = torch.randint(256, (-(-count // 2),), generator=generator)
        self.packed = packed.to(torch.uint8)
        if double_quant:
            self.absmax = torch.randint(256, (blocks,), generator=generator).to(torch.uint8)
            self.nested_absmax = torch.rand(-(-blocks // 256), generator=generator) + 0.1
            self.nested_offset = torch.randn(1, generator=generator) * 0.2
            table = torch.tensor(_core.Codebook.by_name("dynamic-signed").values)
            nested = self.nested_absmax.repeat_interleave(256)[:blocks]
            scales = table[self.absmax.long()] * nested + self.nested_offset
        else:
            self.absmax = scales = torch.randn(blocks, generator=generator)
            self.nested_absmax = self.nested_offset = None
        values = torch.tensor(by_name(codebook).values).double()
        codes = reference.unpack(self.packed, 4, count)
        if codebook == LATE.name:  # without the codes that it does not have
            codes = codes.long().clamp(min=9).to(torch.uint8)
            self.packed = reference.pack(codes, 4, 9)
        if codebook == EARLY.name:
            codes = codes.long().clamp(max=6).to(torch.uint8)
            self.packed = reference.pack(codes, 4, 6)
        by_element = scales.double().repeat_interleave(block_size)[:count]
        self.exact = (values[codes.long()] * by_element).reshape(n, k)

    def kernels(self, file, dtype, capability=None):
        book = by_name(self.codebook)
        options = (dtype, self.block_size, book, self.double_quant, capability)
        return load(file, Specialisation(*options))

    def arguments(self):
        tensors = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return [None if tensor is None else Buffer(tensor) for tensor in tensors]


@cache
def load(file, specialisation):
    return emulate.load(file, [specialisation])[0]


def assert_close(y, x, weight, bias=None, *, weight_is_rounded):
    """Within what a dense product of this dtype may be off: it too rounds its weight to the dtype
    (which kernels that decode to float32 do not), adds up in float32, and rounds the result."""
    exact = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.T.abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    unit = HALF_UNIT[y.dtype]
    # A value, its scale and their product are rounded; then one rounding an addition.
    relative = (x.shape[1] + 4) * SINGLE + (unit if weight_is_rounded else 0)
    bound = relative * magnitude + unit * exact.abs() * 1.01 + torch.finfo(y.dtype).tiny
    error = (y.double() - exact).abs()
    assert not error.isnan().any()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound"


def geometry(file, kernel, dtype, *, m, n, k, processors=3):
    """As the register has it, for a kernel that takes ten arguments: seven pointers, m, n and k."""
    launch = _core.kernel_geometry(
        *(file, kernel, [256] * 7 + [m, n, k]),
        capability=80,
        processors=processors,
        dtype=str(dtype).removeprefix("torch."),
    )
    grid, block, dynamic_bytes = launch
    return {"grid": tuple(grid), "block": block, "dynamic_bytes": dynamic_bytes}


def matvec(x, weight, *, rows, bias=None, order=0):
    m, n = x.shape[0], weight.n
    y = Buffer.empty(m * n, x.dtype)
    weight.kernels("matvec", x.dtype).launch(
        f"fourbit_matvec_{rows}",
        *(Buffer(x), *weight.arguments(), None if bias is None else Buffer(bias), y),
        *(m, n, weight.k),
        **geometry("matvec", f"fourbit_matvec_{rows}", x.dtype, m=m, n=n, k=weight.k),
        order=order,
    )
    return y.tensor().reshape(m, n)


def numbers(*shape, dtype, generator):
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("m", range(1, 9))
def test_matvec_of_every_number_of_rows(m, double_quant, dtype, generator):
    rows = next(rows for rows in (1, 2, 4, 8) if rows >= m)
    for n, k in [(19, 96), (1, 33), (17, 67)]:
        weight = Weight(n, k, generator, double_quant=double_quant)
        x, bias = (numbers(*s, dtype=dtype, generator=generator) for s in [(m, k), (n,)])
        y = matvec(x, weight, rows=rows, bias=bias)
        assert_close(y, x, weight.exact, bias, weight_is_rounded=False)


@pytest.mark.parametrize(
    ("m", "rows", "n", "k", "dtype"),
    [
        (1, 1, 2, 16416, torch.bfloat16),  # one column chunk more than fits the shared memory
        (1, 1, 3, 16415, torch.bfloat16),
        (8, 8, 5, 2080, torch.float32),  # three chunks
        (5, 8, 3, 2051, torch.float32),
        (7, 4, 33, 160, torch.float16),  # two passes
        (3, 1, 1, 1, torch.float16),
        (2, 2, 40, 31, torch.bfloat16),
        (2, 2, 3, 4128, torch.float32),  # windows of which the last is one lane's
    ],
)
def test_matvec_of_odd_shapes(m, rows, n, k, dtype, generator):
    weight = Weight(n, k, generator)
    x = numbers(m, k, dtype=dtype, generator=generator)
    results = [matvec(x, weight, rows=rows, order=order) for order in (0, 1, 5)]
    assert_close(results[0], x, weight.exact, weight_is_rounded=False)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_matvec_of_every_block_size(block_size, codebook, generator):
    for n, k in [(9, 1312), (7, 700)]:
        options = {"block_size": block_size, "codebook": codebook}
        weight = Weight(n, k, generator, double_quant=True, **options)
        x = numbers(1, k, dtype=torch.bfloat16, generator=generator)
        y = matvec(x, weight, rows=1)
        assert_close(y, x, weight.exact, weight_is_rounded=False)


def test_matvec_of_misaligned_rows(generator):
    weight = Weight(6, 64, generator)
    x = numbers(2, 64, dtype=torch.bfloat16, generator=generator)
    y = Buffer.empty(12, torch.bfloat16)
    arguments = (Buffer(x, misaligned_by=2), *weight.arguments(), None, y, 2, 6, 64)
    kernels = weight.kernels("matvec", torch.bfloat16)
    launch = geometry("matvec", "fourbit_matvec_2", x.dtype, m=2, n=6, k=64)
    kernels.launch("fourbit_matvec_2", *arguments, **launch)
    assert_close(y.tensor().reshape(2, 6), x, weight.exact, weight_is_rounded=False)


def test_products_without_columns_are_the_bias(generator):
    bias = numbers(5, dtype=torch.float32, generator=generator)
    weight = Weight(5, 0, generator)
    assert torch.equal(matvec(torch.empty(2, 0), weight, rows=2, bias=bias), bias.expand(2, 5))


def most_in_a_bank(offsets, size):
    """Of lanes that access `size` bytes at these offsets in shared memory: how many words of one
    bank a pass takes at most. A pass is the lanes that make up 128 bytes."""
    passes = [offsets[i : i + 128 // size] for i in range(0, len(offsets), 128 // size)]
    worst = 0
    for lanes in passes:
        words = {offset // 4 + word for offset in lanes for word in range(size // 4)}
        worst = max(worst, max(sum(w % 32 == bank for w in words) for bank in range(32)))
    return worst


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_matvec_has_no_bank_conflicts(element_bytes):
    """Of the places that `Columns` gives to granules of four numbers, written and read."""
    size = 4 * element_bytes

    def offset(lane, j):
        return (j * 32 + (lane ^ 16 // size * j)) * size

    everywhere = {offset(lane, j) for lane in range(32) for j in range(8)}
    assert everywhere == set(range(0, 256 * size, size))
    for j in range(8):
        assert most_in_a_bank([offset(lane, j) for lane in range(32)], size) == 1
    for first in range(0, 256, 32):
        written = [offset(i // 8, i % 8) for i in range(first, first + 32)]
        assert most_in_a_bank(written, size) == 1


def matvec_tensor(x, weight, *, rows, bias=None, order=0, eager_copies=False, processors=3):
    m, n = x.shape[0], weight.n
    y = Buffer.empty(m * n, x.dtype)
    kernel = f"fourbit_matvec_tensor_{rows}"
    weight.kernels("matvec_tensor", x.dtype).launch(
        kernel,
        *(Buffer(x), *weight.arguments(), None if bias is None else Buffer(bias), y),
        *(m, n, weight.k),
        **geometry("matvec_tensor", kernel, x.dtype, m=m, n=n, k=weight.k, processors=processors),
        order=order,
        eager_copies=eager_copies,
    )
    return y.tensor().reshape(m, n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("m", "rows", "n", "k"),
    [
        (1, 1, 1, 64),
        (1, 1, 33, 1024 + 192),  # windows of which the last is a stretch and a half
        (2, 2, 19, 512),
        (1, 2, 17, 320),
        (4, 4, 16, 448),
        (3, 4, 49, 64),  # sixteen windows of a round are sixteen tiles
        (3, 1, 5, 128),  # three passes
    ],
)
def test_matvec_on_tensor_cores_of_odd_shapes(m, rows, n, k, double_quant, dtype, generator):
    weight = Weight(n, k, generator, double_quant=double_quant)
    x, bias = (numbers(*s, dtype=dtype, generator=generator) for s in [(m, k), (n,)])
    y = matvec_tensor(x, weight, rows=rows, bias=bias)
    assert_close(y, x, weight.exact, bias, weight_is_rounded=True)


@pytest.mark.parametrize(
    ("m", "rows", "n", "k"),
    [
        (1, 1, 190, 1536),  # rounds that end within a tile, three on a card of one processor
        (1, 1, 3, 9216),  # a tile of more windows than a round
        (1, 1, 2, 16448),  # more columns than there are places between the table's entries
        (4, 4, 2, 4160),
        (2, 2, 110, 1216),  # after a window of a stretch and a half, a whole one
        (4, 4, 37, 576),
    ],
)
def test_matvec_on_tensor_cores_is_the_same_in_every_order_and_on_every_card(
    m, rows, n, k, generator
):
    weight = Weight(n, k, generator, double_quant=True)
    x = numbers(m, k, dtype=torch.bfloat16, generator=generator)
    y = matvec_tensor(x, weight, rows=rows)
    assert_close(y, x, weight.exact, weight_is_rounded=True)
    for order, eager_copies, processors in [
        (1, True, 1),
        (2, False, 2),
        (3, True, 5),
        (3, False, 1),
        (6, False, 1),
    ]:
        options = {"order": order, "eager_copies": eager_copies, "processors": processors}
        assert torch.equal(matvec_tensor(x, weight, rows=rows, **options), y)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_matvec_on_tensor_cores_of_every_block_size(rows, block_size, codebook, generator):
    """Of blocks that begin within a row, and of groups that are not there."""
    options = {"block_size": block_size, "codebook": codebook}
    k = 608 if block_size == 32 else 704
    weight = Weight(21, k, generator, double_quant=True, **options)
    x = numbers(rows, k, dtype=torch.bfloat16, generator=generator)
    assert_close(matvec_tensor(x, weight, rows=rows), x, weight.exact, weight_is_rounded=True)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("block_size", "k"), [(32, 544), (64, 576)])
def test_matvec_on_tensor_cores_uses_nothing_behind_the_end(rows, block_size, k, generator):
    weight = Weight(16, k, generator, block_size=block_size, codebook=EARLY.name)
    x = numbers(rows, k, dtype=torch.bfloat16, generator=generator)
    assert_close(matvec_tensor(x, weight, rows=rows), x, weight.exact, weight_is_rounded=True)


def test_numbers_that_are_not_finite_stay_in_their_row(generator):
    weight = Weight(20, 704, generator)
    x = numbers(4, 704, dtype=torch.bfloat16, generator=generator)
    expected = matvec_tensor(x, weight, rows=4)
    x[1, 100], x[2, 700] = torch.nan, torch.inf
    y = matvec_tensor(x, weight, rows=4)
    assert not y[1].isfinite().any()
    assert not y[2].isfinite().any()
    assert torch.equal(y[::3], expected[::3])


def test_matvec_on_tensor_cores_has_no_bank_conflicts():
    """Of the places that look-ups, the table's fill, and pieces of x have, written and read."""

    def place(piece, row, line):
        return (line + min(line + 1, 256)) * 128 + (piece ^ (row ^ line) & 1) * 16

    lanes = range(32)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        bytes_ = torch.randint(256, (32,), generator=generator).tolist()
        assert most_in_a_bank([byte << 8 | lane * 4 for lane, byte in enumerate(bytes_)], 4) == 1
    for i in range(4):
        threads = range(96, 128)
        entries = [t // 2 * 256 + t % 2 * 64 + (i + t // 2) % 4 * 16 for t in threads]
        assert most_in_a_bank(entries, 16) == 1
    for row_lines in (8, 24, 300):
        written = [place(i % 8, 1, row_lines + i // 8) for i in range(32)]
        assert most_in_a_bank(written, 16) == 1
        for rows in (1, 2, 4):
            for groups in (2, 4):  # of a stretch: blocks of 64 and more, of 32
                at_once = min(rows, 8 // groups)
                for piece in range(4):
                    # Of each quarter of a warp, those that read.
                    for quarter in range(4):
                        read = []
                        for lane in lanes[quarter * 8 : quarter * 8 + 8]:
                            row, slot = lane // 4 % at_once, lane // 4 // at_once
                            t = lane % 4
                            if t * groups // 4 == slot % groups:
                                line = row * row_lines + slot // groups * 2 + t // 2
                                read.append(place(t % 2 * 4 + piece, row, line))
                        assert most_in_a_bank(read, 16) <= 1


def launch(weight, kernel, capability, *arguments, dtype, **options):
    """With the geometry of the register, for a card of that capability."""
    file, name = kernel.rpartition("_")[0], f"fourbit_{kernel}"
    grid, block, dynamic_bytes = _core.kernel_geometry(
        file,
        name,
        [
            argument.pointer
            if isinstance(argument, Buffer)
            else getattr(argument, "value", argument)
            for argument in (argument or 0 for argument in arguments)
        ],
        capability=capability or 80,
        processors=108,
        dtype=str(dtype).removeprefix("torch."),
        block_size=weight.block_size,
        double_quant=weight.double_quant,
    )
    kernels = weight.kernels(file, dtype, capability)
    shape = {"grid": tuple(grid), "block": block, "dynamic_bytes": dynamic_bytes}
    kernels.launch(name, *arguments, **shape, **options)


def matmul(x, weight, *, bias=None, **options):
    bias = None if bias is None else Buffer(bias)
    return tensor_product("matmul", x, weight, (bias,), weight.n, **options)


def matmul_transposed(dy, weight, **options):
    return tensor_product("matmul_transposed", dy, weight, (), weight.k, **options)


def tensor_product(
    file,
    operand,
    weight,
    bias,
    features,
    *,
    rows,
    splits=1,
    slot=None,
    order=0,
    eager_copies=False,
    capability=None,
):
    """Of so many features; with counters of its own, or with a slot of the kernel's."""
    m = operand.shape[0]
    tiles = (-(-features // 128), -(-m // rows))
    output = Buffer.empty(m * features, operand.dtype)
    partial = Buffer.empty(splits * tiles[0] * tiles[1] * rows * 128, torch.float32)
    arrived = Buffer(torch.zeros(tiles, dtype=torch.int32))
    launch(
        weight,
        f"{file}_{rows}",
        capability,
        *(Buffer(operand), *weight.arguments(), *bias, output),
        *((partial, arrived if slot is None else None) if splits > 1 else (None, None)),
        *(m, weight.n, weight.k, ctypes.c_uint32(splits), ctypes.c_uint32(slot or 0)),
        dtype=operand.dtype,
        order=order,
        eager_copies=eager_copies,
    )
    assert not arrived.tensor().any(), "the next launch needs zeros"
    return output.tensor().reshape(m, features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("m", "rows", "n", "k", "splits"),
    [
        (1, 8, 1, 64, 1),  # half of the warps have no columns
        (7, 8, 33, 192, 1),
        (9, 16, 130, 128, 2),
        (17, 32, 17, 224, 3),
        (33, 64, 5, 160, 1),
        (70, 64, 129, 32, 1),
        (19, 8, 40, 576, 7),  # three tiles of x, and splits with nothing to do
        (8, 16, 129, 1984, 1),
    ],
)
def test_matmul_of_odd_shapes(m, rows, n, k, splits, double_quant, dtype, generator):
    weight = Weight(n, k, generator, double_quant=double_quant)
    x, bias = (numbers(*s, dtype=dtype, generator=generator) for s in [(m, k), (n,)])
    y = matmul(x, weight, rows=rows, splits=splits, bias=bias)
    assert_close(y, x, weight.exact, bias, weight_is_rounded=True)


def test_matmul_is_the_same_in_every_order(generator):
    weight = Weight(20, 960, generator, double_quant=True)
    x = numbers(11, 960, dtype=torch.bfloat16, generator=generator)
    results = [
        matmul(x, weight, rows=16, splits=2, order=order, eager_copies=eager)
        for order in (0, 1, 2, 3, 6)
        for eager in (False, True)
    ]
    assert_close(results[0], x, weight.exact, weight_is_rounded=True)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_matmul_of_every_block_size(block_size, codebook, generator):
    """Of which some span rows."""
    options = {"block_size": block_size, "codebook": codebook}
    for rows, k in [(8, 416 if block_size == 32 else 448), (32, 416)]:
        weight = Weight(21, k, generator, double_quant=True, **options)
        x = numbers(3, k, dtype=torch.bfloat16, generator=generator)
        assert_close(matmul(x, weight, rows=rows), x, weight.exact, weight_is_rounded=True)


@pytest.mark.parametrize(
    ("capability", "rows"), [*product((75,), (8, 16, 32)), *product((80, 86, 90), (8, 16, 32, 64))]
)
@pytest.mark.parametrize("block_size", [32, 64])
def test_matmul_with_the_stages_of_every_architecture(rows, block_size, capability, generator):
    """As many as shared memory has room for, and not a byte more is written."""
    weight = Weight(9, 1088, generator, double_quant=True, block_size=block_size)
    x = numbers(rows, 1088, dtype=torch.float16, generator=generator)
    for splits in (1, 3):
        y = matmul(x, weight, rows=rows, splits=splits, capability=capability)
        assert_close(y, x, weight.exact, weight_is_rounded=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("m", "rows", "n", "k", "splits"),
    [
        (1, 8, 1, 32, 1),
        (7, 8, 33, 96, 1),
        (9, 16, 136, 160, 2),
        (17, 32, 67, 224, 3),  # a split with nothing to do
        (33, 64, 200, 64, 1),
        (70, 64, 8, 128, 1),
        (19, 8, 130, 32, 2),
    ],
)
def test_transposed_product_of_odd_shapes(m, rows, n, k, splits, double_quant, dtype, generator):
    weight = Weight(n, k, generator, double_quant=double_quant)
    dy = numbers(m, n, dtype=dtype, generator=generator)
    dx = matmul_transposed(dy, weight, rows=rows, splits=splits)
    assert_close(dx, dy, weight.exact.T, weight_is_rounded=True)


@pytest.mark.parametrize("n", [201, 200])
def test_transposed_product_is_the_same_in_every_order(n, generator):
    weight = Weight(n, 160, generator, double_quant=True)
    dy = numbers(11, n, dtype=torch.bfloat16, generator=generator)
    results = [
        matmul_transposed(dy, weight, rows=16, splits=2, order=order, eager_copies=eager)
        for order in (0, 1, 2, 3, 6)
        for eager in (False, True)
    ]
    assert_close(results[0], dy, weight.exact.T, weight_is_rounded=True)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_transposed_product_of_every_block_size(block_size, codebook, generator):
    options = {"block_size": block_size, "codebook": codebook}
    weight = Weight(21, 416, generator, double_quant=True, **options)
    dy = numbers(3, 21, dtype=torch.bfloat16, generator=generator)
    dx = matmul_transposed(dy, weight, rows=8)
    assert_close(dx, dy, weight.exact.T, weight_is_rounded=True)


@pytest.mark.parametrize("multiply", [matmul, matmul_transposed])
def test_own_counters_are_zero_after_every_launch(multiply, generator):
    """Else a later launch would take the wrong block for the last, which finds numbers missing."""
    weight = Weight(288, 288, generator)
    x = numbers(11, 288, dtype=torch.bfloat16, generator=generator)
    expected = multiply(x, weight, rows=8, splits=3)
    slots = _core.COUNTER_SLOTS
    for slot in (0, 0, slots - 1, 0, slots - 1):
        assert torch.equal(multiply(x, weight, rows=8, splits=3, slot=slot), expected)


@pytest.mark.parametrize("multiply", [matmul, matmul_transposed])
@pytest.mark.parametrize("eager_copies", [False, True])
@pytest.mark.parametrize(("rows", "splits"), [(8, 1), (16, 2), (32, 3)])
def test_tensor_core_products_with_the_constants_of_turing(
    multiply, rows, splits, eager_copies, generator
):
    """Stages and copies of a table as shared memory of sm_75 allows; its copies arrive at once."""
    weight = Weight(72, 320, generator, double_quant=True)
    transposed = multiply is matmul_transposed
    x = numbers(rows + 3, 72 if transposed else 320, dtype=torch.float16, generator=generator)
    options = {"rows": rows, "splits": splits, "eager_copies": eager_copies, "capability": 75}
    results = [multiply(x, weight, order=order, **options) for order in (0, 3, 6)]
    exact = weight.exact.T if transposed else weight.exact
    assert_close(results[0], x, exact, weight_is_rounded=True)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_turing_has_no_kernel_for_sixty_four_rows(generator):
    weight = Weight(8, 32, generator)
    x = numbers(64, 32, dtype=torch.float16, generator=generator)
    with pytest.raises(AttributeError):
        matmul(x, weight, rows=64, capability=75)
