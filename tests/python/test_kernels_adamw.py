"""The CUDA AdamW, run on the CPU by the emulator: the bytes of the core's step."""

import ctypes
import itertools
from functools import cache

import pytest
import torch

import adamw_calls
import emulate
from adamw_calls import FLOATS, OPTIONS, Held, OnCard, assert_same, numbers, step_core, table
from emulate import Buffer, Specialisation
from fourbit import _core

reason = emulate.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

ENCODE = """
extern "C" __global__ void test_encode(const float* x, u8* first, u8* second, u32 count) {
    static Tables tables;
    for (u32 i = 0; i < 256; ++i) {
        tables.first[i] = SIGNED_TABLE[i];
        tables.second[i] = UNSIGNED_TABLE[i];
        tables.first_midpoints[i] = SIGNED_MIDPOINTS[min(i, 254u)];
        tables.second_midpoints[i] = UNSIGNED_TABLE_MIDPOINTS[min(i, 254u)];
    }
    for (u32 i = 0; i < count; ++i) {
        first[i] = u8(encode_signed(tables, x[i]));
        second[i] = u8(encode_unsigned(tables, x[i]));
    }
}
FOURBIT_EMULATE(test_encode)
"""


@cache
def adamw():
    return emulate.load("adamw", [Specialisation()], lambda text: text + ENCODE)[0]


def step_kernel(held, **options):
    """The flags of parameters, and that of damage."""
    return adamw_calls.step_kernel(adamw(), held, **options)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("bits", [8, 32])
def test_every_type_and_length_gives_the_bytes_of_the_core(bits, order, generator):
    held = [
        Held(numbers(n, p, generator), numbers(n, g, generator), bits, step, misalign)
        for (p, g), n, step, misalign in zip(
            itertools.product(FLOATS, FLOATS),
            (1, 255, 256, 257, 1000, 3, 511, 2048, 77),
            itertools.count(1),
            (0, 0, 1, 0, 2, 0, 3, 0, 1),
            strict=False,
        )
    ]
    theirs = [one.clone() for one in held]
    for _ in range(3):
        for one in (*held, *theirs):
            one.step += 1
        assert step_core(theirs) == []
        assert step_kernel(held, order=order) == ([0] * len(held), 0)
        assert_same(held, theirs)


@pytest.mark.parametrize("maximize", [False, True])
def test_both_states_of_many_parameters_step_in_one_launch(maximize, generator):
    # More than 32 x 32 segments, so that the search takes three rounds; some are empty.
    counts = [n % 5 * (n % 3) for n in range(1100)] + [700, 0, 300]
    held = [
        Held(
            numbers(n, FLOATS[i % 3], generator),
            numbers(n, FLOATS[i // 3 % 3], generator),
            8 if n > 290 or i % 2 else 32,
            step=i + 1,
        )
        for i, n in enumerate(counts)
    ]
    theirs = [one.clone() for one in held]
    step_core(theirs, maximize=maximize)
    assert step_kernel(held, grid=3, maximize=maximize) == ([0] * len(held), 0)
    assert_same(held, theirs)


@pytest.mark.parametrize("bits", [8, 32])
def test_any_state_steps_as_in_the_core(bits, generator):
    held = [
        Held(numbers(n, p, generator), numbers(n, p, generator), bits, 100).randomise(generator)
        for n, p in [(5000, torch.float32), (3001, torch.bfloat16)]
    ]
    theirs = [one.clone() for one in held]
    step_core(theirs)
    assert step_kernel(held, grid=1) == ([0, 0], 0)
    assert_same(held, theirs)


@pytest.mark.parametrize("factor", [1e-38, 1e-42, 0.0, 1e15])
def test_tiny_and_huge_gradients(factor, generator):
    held = [
        Held(numbers(900, torch.float32, generator), numbers(900, torch.float32, generator), bits)
        for bits in (8, 32)
    ]
    for one in held:
        one.grad *= factor
    theirs = [one.clone() for one in held]
    for _ in range(2):
        assert step_core(theirs, eps=1e-30) == []
        assert step_kernel(held, eps=1e-30) == ([0, 0], 0)
        assert_same(held, theirs)


def test_gradients_that_are_not_finite_leave_their_parameter_alone(generator):
    bad = [float("nan"), float("inf"), -float("inf"), 2.0**63, -(2.0**63), 2.0**62]
    held = [
        Held(numbers(n, torch.bfloat16, generator), numbers(n, torch.float32, generator), bits)
        for n, bits in zip([600] * 6 + [300] * 2, [8, 32] * 4, strict=True)
    ]
    for one, number in zip(held, bad, strict=False):
        one.grad[599] = number
    theirs = [one.clone() for one in held]
    skipped = step_core(theirs)
    assert skipped == [0, 1, 2, 3, 4]
    flags, damaged = step_kernel(held)
    assert not damaged
    assert [index for index, flag in enumerate(flags) if flag] == skipped
    assert_same(held, theirs)


@pytest.mark.parametrize("which", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_damaged_scales_leave_everything_alone(which, bad, generator):
    held = [
        Held(numbers(600, torch.float32, generator), numbers(600, torch.float32, generator), 8)
        for _ in range(3)
    ]
    held[1].state[which][2] = bad
    before = [one.clone() for one in held]
    assert step_kernel(held) == ([0, 0, 0], 1)
    assert_same(held, before)


# --- slices of the table, parameters in several parts ---------------------------------------------


def in_parts(bits, generator, step=7):
    """Eight segments: whole parameters around two that are cut in three, with tails."""
    made = [
        Held(numbers(n, p, generator), numbers(n, g, generator), bits, step, misalign, cuts)
        for n, p, g, misalign, cuts in [
            (700, torch.float32, torch.bfloat16, 0, ()),
            (256 * 9 + 77, torch.bfloat16, torch.float32, 0, (256, 256 * 6)),
            (256 * 4 + 1, torch.float16, torch.float16, 1, (512, 1024)),
            (90, torch.bfloat16, torch.bfloat16, 3, ()),
        ]
    ]
    for one in made:
        one.randomise(generator)
    return made


SLICES = [(8,), (1, 7), (3, 5), (2, 3, 3), (1,) * 8]


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("bits", [8, 32])
def test_parts_in_slices_give_the_bytes_of_whole_parameters(bits, order, generator):
    held = in_parts(bits, generator)
    theirs = [one.clone() for one in held]
    for checks, updates in zip(SLICES, reversed(SLICES), strict=True):
        assert step_core(theirs) == []
        slices = {"checks": checks, "updates": updates, "last_first": order % 2 == 1}
        assert step_kernel(held, grid=1, order=order, **slices) == ([0] * 4, 0)
        assert_same(held, theirs)


def test_a_parameter_over_more_segments_than_the_search_takes_at_once(generator):
    cuts = range(256, 256 * 40, 256)
    first = Held(numbers(10, torch.float32, generator), numbers(10, torch.float32, generator), 8)
    held = [
        first,
        Held(
            numbers(256 * 40 + 3, torch.bfloat16, generator),
            numbers(256 * 40 + 3, torch.bfloat16, generator),
            8,
            cuts=[*cuts, 256 * 40],
        ),
    ]
    theirs = [one.clone() for one in held]
    step_core(theirs)
    assert step_kernel(held, updates=(4, 35, 3)) == ([0, 0], 0)
    assert_same(held, theirs)


@pytest.mark.parametrize("place", [0, 256 * 5, -1])
@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_gradient_not_finite_in_one_part_leaves_all_parts_alone(
    bits, last_first, place, generator
):
    held = in_parts(bits, generator)
    held[1].grad[place] = float("nan")
    theirs = [one.clone() for one in held]
    assert step_core(theirs) == [1]
    slices = {"checks": (3, 5), "updates": (2, 1, 1, 4), "last_first": last_first}
    assert step_kernel(held, **slices) == ([0, 1, 0, 0], 0)
    assert_same(held, theirs)


@pytest.mark.parametrize(("which", "block"), [(0, 0), (1, 5), (1, 9), (2, 4), (3, 0)])
@pytest.mark.parametrize("checks", SLICES)
def test_damage_in_any_part_stops_every_launch(checks, which, block, generator):
    held = in_parts(8, generator)
    held[which].state[1 if block % 2 else 3][block] = float("inf")
    before = [one.clone() for one in held]
    assert step_kernel(held, checks=checks, updates=(1, 2, 2, 3)) == ([0] * 4, 1)
    assert_same(held, before)


def core_segments(segments, first_tile=0, **options):
    return _core.adamw_segments(
        segments, first_tile=first_tile, **{**OPTIONS, "maximize": False, **options}
    )


@pytest.mark.parametrize("maximize", [False, True])
def test_the_core_writes_segments_as_the_kernel_reads_them(maximize, generator):
    on_card = [OnCard(one) for bits in (8, 32) for one in in_parts(bits, generator)]
    packed, first_tiles = table(on_card, maximize=maximize)
    described = [
        (*one.described(part), index)
        for index, one in enumerate(on_card)
        for part in range(len(one.parts))
    ]
    assert core_segments(described, maximize=maximize) == (packed, first_tiles[-1])
    # As groups come: one after the other.
    first, tiles = core_segments(described[:5], maximize=maximize)
    assert tiles == first_tiles[5]
    rest, tiles = core_segments(described[5:], tiles, maximize=maximize)
    assert (first + rest, tiles) == (packed, first_tiles[-1])


@pytest.mark.parametrize("index", [-1, 2**32])
def test_indices_that_do_not_fit_are_refused(index):
    segment = ([16] * 6, 5, ("float32", "bfloat16"), 8, 1)
    assert core_segments([(*segment, 2**32 - 1)])[1] == 1
    with pytest.raises(OverflowError):
        core_segments([(*segment, index)])
    with pytest.raises(TypeError):
        core_segments([(*segment, 0.5)])
    with pytest.raises(ValueError, match="tuple of length 5"):
        core_segments([segment])


def test_the_short_way_to_a_code_is_exact_at_every_midpoint():
    signed = torch.tensor(_core.Codebook.by_name("dynamic-signed").values)
    unsigned = torch.tensor(_core.Codebook.by_name("dynamic-unsigned").values)
    midpoints = [(values[1:] + values[:-1]) / 2 for values in (signed, unsigned)]
    infinity = torch.tensor(float("inf"))
    # The guess grows with the number, so what is right on both sides of every midpoint is right
    # in between.
    around = torch.cat([*midpoints, signed, unsigned, 10.0 ** torch.arange(-45, 1)])
    up, down = torch.nextafter(around, infinity), torch.nextafter(around, -infinity)
    outside = torch.tensor([-0.0, 1.0000001, -1.0, -1.0000001, 3.0, 1e30, -1e30])
    x = torch.cat([around, up, down, outside])
    first = torch.empty(len(x), dtype=torch.uint8)
    arguments = (Buffer(x), Buffer(first), Buffer(first.clone()), ctypes.c_uint32(len(x)))
    emulate.Kernels(adamw().library, "").launch("test_encode", *arguments, block=1)
    expected = [(mids[None, :] < x[:, None]).sum(1).to(torch.uint8) for mids in midpoints]
    assert torch.equal(arguments[1].tensor(), expected[0])
    assert torch.equal(arguments[2].tensor(), expected[1])
