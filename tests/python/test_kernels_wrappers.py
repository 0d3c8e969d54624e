"""The emulated twins of the PTX wrappers, against what the PTX ISA says of the instructions."""

import pytest
import torch

import emulate
from emulate import Buffer, Specialisation

pytestmark = pytest.mark.skipif(
    emulate.unavailable() is not None, reason=str(emulate.unavailable())
)

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def wrappers(request):
    (kernels,) = emulate.load("wrappers", [Specialisation(request.param)])
    return kernels, request.param


def test_mma_has_the_fragments_of_the_isa(wrappers, generator):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    kernels, dtype = wrappers
    left, right, sums = (torch.randn(s, generator=generator) for s in [(16, 16), (16, 8), (16, 8)])
    left, right = left.to(dtype), right.to(dtype)
    a, b = torch.empty(32, 8, dtype=dtype), torch.empty(32, 4, dtype=dtype)
    d = torch.empty(32, 4)
    of_sums = {}
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = in_group * 2 + (i & 1) + (0 if i < 4 else 8)
            a[lane, i] = left[row, column]
        for i in range(4):
            b[lane, i] = right[in_group * 2 + (i & 1) + (0 if i < 2 else 8), group]
        for i in range(4):
            place = (group if i < 2 else group + 8, in_group * 2 + (i & 1))
            d[lane, i], of_sums[lane, i] = sums[place], place
    buffer = Buffer(d)
    kernels.launch("fourbit_try_mma", Buffer(a), Buffer(b), buffer, block=32)
    exact = left.double() @ right.double() + sums.double()
    for (lane, i), place in of_sums.items():
        assert buffer.tensor()[lane, i] == exact[place].float()


def test_ldmatrix_gives_what_the_isa_says(wrappers):
    """PTX ISA, "ldmatrix": lane l gets row l / 4 of each matrix, elements 2 (l % 4) and the next;
    with .trans, of the transposed matrix."""
    kernels, _ = wrappers
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).reshape(4, 8, 8)
    fragments = Buffer.empty(2 * 32 * 8, torch.int16)
    kernels.launch("fourbit_try_load_matrix", Buffer(matrices), fragments, block=32)
    straight, transposed = fragments.tensor().reshape(2, 32, 4, 2)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        assert torch.equal(straight[lane], matrices[:, row, column : column + 2])
        assert torch.equal(transposed[lane], matrices[:, column : column + 2, row])


@pytest.mark.parametrize("eager_copies", [False, True])
def test_background_copies_fill_with_zeros_and_arrive_by_groups(wrappers, eager_copies, generator):
    """PTX ISA, "cp.async" with src-size, and "cp.async.wait_group"."""
    kernels, _ = wrappers
    source = torch.randint(1, 256, (32, 16), generator=generator).to(torch.uint8)
    target, seen = Buffer.empty(32 * 16, torch.uint8), Buffer.empty(32, torch.int32)
    arguments = (Buffer(source), target, seen)
    kernels.launch("fourbit_try_copy", *arguments, block=32, eager_copies=eager_copies)
    expected = source.clone()
    for lane in range(32):
        expected[lane, lane % 17 :] = 0
    assert torch.equal(target.tensor().reshape(32, 16), expected)
    assert seen.tensor().all()


def test_conversions_round_to_the_nearest_even(wrappers, generator):
    """PTX ISA, "cvt.rn"; "max.NaN" of magnitudes."""
    kernels, dtype = wrappers
    numbers = torch.randn(32, 2, generator=generator)
    special = [0.0, -0.0, 65519.9, 65520.0, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12, 2.0**-25, 1e-45]
    numbers[: len(special), 0] = torch.tensor([*special])
    numbers[9:12, 1] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    pairs, larger = Buffer.empty(32, torch.int32), Buffer.empty(32, torch.int32)
    halves, back = Buffer.empty(32, torch.float16), Buffer.empty(32, torch.float32)
    arguments = (Buffer(numbers), pairs, larger, halves, back)
    kernels.launch("fourbit_try_conversions", *arguments, block=32)
    rounded = numbers.to(dtype)
    found = pairs.tensor().view(dtype).reshape(32, 2)
    assert torch.equal(found.isnan(), rounded.isnan())
    known = ~rounded.isnan()
    assert torch.equal(found.view(torch.int16)[known], rounded.view(torch.int16)[known])
    magnitudes = found.abs()
    expected = torch.maximum(magnitudes, magnitudes.roll(-1, 0))  # a NaN wins, as with max.NaN
    assert torch.equal(
        larger.tensor().view(dtype).reshape(32, 2).nan_to_num(-1), expected.nan_to_num(-1)
    )
    assert torch.equal(halves.tensor().view(torch.int16), numbers[:, 0].half().view(torch.int16))
    assert torch.equal(back.tensor(), numbers[:, 0].half().float())
