"""The CUDA AdamW, run on the CPU by the emulator: the bytes of the core's step."""

import ctypes
import itertools
import struct
from functools import cache

import pytest
import torch

import emulate
from emulate import Buffer, Specialisation
from fourbit import _core

reason = emulate.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
FLOATS = tuple(TYPES)


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


def constants(step: int, lr, beta1, beta2, eps, weight_decay, maximize=False):
    """As the core: in double precision, rounded once."""
    return (
        1 - lr * weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        -1.0 if maximize else 1.0,
        lr / (1 - beta1**step),
        1 / (1 - beta2**step) ** 0.5,
        eps,
    )


class Held:
    """A parameter, its gradient and its state."""

    def __init__(self, param, grad, bits, step=1, misalign=0):
        blocks = -(-param.numel() // 256)
        self.param, self.grad = param, grad
        self.bits, self.step, self.misalign = bits, step, misalign
        if bits == 8:
            codes, scales = torch.zeros(param.numel(), dtype=torch.uint8), torch.zeros(blocks)
            self.state = [codes, scales, codes.clone(), scales.clone()]
        else:
            self.state = [torch.zeros(param.numel()), torch.zeros(param.numel())]

    def randomise(self, generator):
        """State as after many steps, over several decades."""
        for index, tensor in enumerate(self.state):
            if tensor.dtype == torch.uint8:
                random = torch.randint(256, tensor.shape, generator=generator).to(torch.uint8)
            else:
                random = torch.randn(tensor.shape, generator=generator)
                random = random * torch.randn(tensor.shape, generator=generator).mul(3).exp()
                random = random.abs() if self.bits == 8 or index == 1 else random
            self.state[index] = random
        return self

    def clone(self):
        other = Held(self.param.clone(), self.grad.clone(), self.bits, self.step, self.misalign)
        other.state = [tensor.clone() for tensor in self.state]
        return other

    def tensors(self):
        return [self.param, *self.state]


def step_core(held, **options):
    """The oracle; the indices of skipped parameters."""
    skipped = []
    for index, one in enumerate(held):
        function = {32: _core.adamw32_step, 8: _core.adamw8_step}[one.bits]
        state = [[tensor] for tensor in one.state]
        settings = {**OPTIONS, **options, "steps": [one.step], "threads": 1}
        if function([one.param], [one.grad], *state, **settings):
            skipped.append(index)
    return skipped


def step_kernel(held, *, grid=2, order=0, **options):
    """The kernels; the flags they set."""
    table, first_tile, memory = b"", 0, []
    for one in held:
        own = [Buffer(t, misaligned_by=one.misalign * t.itemsize) for t in (one.param, one.grad)]
        own += [Buffer(t) for t in one.state]
        memory.append(own)
        pointers = [tensor.pointer for tensor in own]
        if one.bits == 8:
            values, grad, m, m_scales, v, v_scales = pointers
        else:
            (values, grad, m, v), m_scales, v_scales = pointers, 0, 0
        table += struct.pack(
            "6Q2q9f3B9x",
            *(values, grad, m, v, m_scales, v_scales),
            *(one.param.numel(), first_tile),
            *constants(one.step, **{**OPTIONS, **options}),
            *(TYPES[one.param.dtype], TYPES[one.grad.dtype], one.bits),
        )
        first_tile += -(-one.param.numel() // 256)
    segments = Buffer(torch.frombuffer(bytearray(table), dtype=torch.uint8))
    flags = Buffer(torch.zeros(len(held) + 1, dtype=torch.int32))
    arguments = (segments, ctypes.c_uint32(len(held)), first_tile, flags)
    for kernel in ("fourbit_adamw_check", "fourbit_adamw"):
        adamw().launch(kernel, *arguments, grid=grid, order=order)
    assert not any(tensor.damaged() for own in memory for tensor in own)
    for one, (param, grad, *state) in zip(held, memory, strict=True):
        assert torch.equal(grad.tensor().view(torch.uint8), one.grad.view(torch.uint8))
        one.param = param.tensor()
        one.state = [tensor.tensor() for tensor in state]
    return flags.tensor().tolist()


def assert_same(ours, theirs):
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(our.tensors(), their.tensors(), strict=True):
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), (
                f"parameter {index}: {(a != b).sum()} elements differ"
            )


def numbers(count, dtype, generator):
    """Over several decades, some of them zero."""
    magnitudes = torch.randn(count, generator=generator).mul(2).exp()
    signs = torch.randn(count, generator=generator).mul(3).clamp(-1, 1)
    kept = torch.rand(count, generator=generator) < 0.9
    return (magnitudes * signs * kept * 1e-2).to(dtype)


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
        assert not any(step_kernel(held, order=order))
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
    assert not any(step_kernel(held, grid=3, maximize=maximize))
    assert_same(held, theirs)


@pytest.mark.parametrize("bits", [8, 32])
def test_any_state_steps_as_in_the_core(bits, generator):
    held = [
        Held(numbers(n, p, generator), numbers(n, p, generator), bits, 100).randomise(generator)
        for n, p in [(5000, torch.float32), (3001, torch.bfloat16)]
    ]
    theirs = [one.clone() for one in held]
    step_core(theirs)
    assert not any(step_kernel(held, grid=1))
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
        assert not any(step_kernel(held, eps=1e-30))
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
    flags = step_kernel(held)
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
    assert step_kernel(held) == [0, 0, 0, 1]
    assert_same(held, before)


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
