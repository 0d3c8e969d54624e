"""Steps of AdamW by the emulated kernels, as the library launches them on a card, and by the core.

A parameter may be cut into parts, whose moments then stand in memory of their own, and the table of
segments into slices, each of which is a launch.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from emulate import Buffer, Kernels
from fourbit import _core

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOATS = tuple(TYPES)
OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
BLOCK = 256


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
    """A parameter, its gradient and its state.

    Args:
        param: one-dimensional, as all tensors.
        grad: of the same length.
        bits: of the state.
        step: counted from 1.
        misalign: elements by which parameter and gradient stand off a multiple of 256 bytes.
        cuts: elements before which a new segment begins, ascending; multiples of 256.
    """

    def __init__(self, param, grad, bits, step=1, misalign=0, cuts: Sequence[int] = ()):
        blocks = -(-param.numel() // BLOCK)
        self.param, self.grad = param, grad
        self.bits, self.step, self.misalign, self.cuts = bits, step, misalign, tuple(cuts)
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
        other = Held(
            self.param.clone(), self.grad.clone(), self.bits, self.step, self.misalign, self.cuts
        )
        other.state = [tensor.clone() for tensor in self.state]
        return other

    def tensors(self):
        return [self.param, *self.state]


def numbers(count, dtype, generator):
    """Over several decades, some of them zero."""
    magnitudes = torch.randn(count, generator=generator).mul(2).exp()
    signs = torch.randn(count, generator=generator).mul(3).clamp(-1, 1)
    kept = torch.rand(count, generator=generator) < 0.9
    return (magnitudes * signs * kept * 1e-2).to(dtype)


def assert_same(ours, theirs):
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(our.tensors(), their.tensors(), strict=True):
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), (
                f"parameter {index}: {(a != b).sum()} elements differ"
            )


def step_core(held, **options):
    """The oracle; the indices of skipped parameters."""
    skipped = []
    for index, one in enumerate(held):
        function = {32: _core.adamw32_step, 8: _core.adamw8_step}[one.bits]
        state = [[tensor] for tensor in one.state]
        settings = {**OPTIONS, **options, "steps": [torch.tensor(one.step - 1.0)], "threads": 1}
        if function([one.param], [one.grad], *state, **settings):
            skipped.append(index)
    return skipped


class OnCard:
    """A parameter in buffers: values, gradient and scales whole, moments in one for each part."""

    def __init__(self, held: Held) -> None:
        self.held = held
        edges = [0, *held.cuts, held.param.numel()]
        self.parts = list(pairwise(edges))
        self.values, self.grad = (
            Buffer(tensor, misaligned_by=held.misalign * tensor.itemsize)
            for tensor in (held.param, held.grad)
        )
        moments = held.state[:: 2 if held.bits == 8 else 1]
        self.moments = [[Buffer(m[start:end]) for start, end in self.parts] for m in moments]
        self.scales = [Buffer(tensor) for tensor in held.state[1::2]] if held.bits == 8 else []

    def described(self, part: int) -> tuple[list[int], int, tuple[str, str], int, int]:
        """As ``_core.adamw_segments`` takes it, without the parameter's index."""
        start, end = self.parts[part]
        one = self.held
        addresses = [
            self.values.pointer + start * one.param.itemsize,
            self.grad.pointer + start * one.grad.itemsize,
            *(moment[part].pointer for moment in self.moments),
            *(scales.pointer + start // BLOCK * 4 for scales in self.scales or ()),
        ]
        dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in (one.param, one.grad))
        return addresses + [0] * (6 - len(addresses)), end - start, dtypes, one.bits, one.step

    def read_back(self) -> None:
        one = self.held
        buffers = [self.values, self.grad, *self.scales, *(b for m in self.moments for b in m)]
        assert not any(buffer.damaged() for buffer in buffers)
        assert torch.equal(self.grad.tensor().view(torch.uint8), one.grad.view(torch.uint8))
        one.param = self.values.tensor()
        moments = [torch.cat([part.tensor() for part in moment]) for moment in self.moments]
        scales = [buffer.tensor() for buffer in self.scales]
        one.state = [moments[0], scales[0], moments[1], scales[1]] if scales else moments


def table(on_card: Sequence[OnCard], **options) -> tuple[bytes, list[int]]:
    """All segments as the kernel reads them, packed here; and the tiles before each, and of all."""
    packed, first_tiles = b"", [0]
    for index, one in enumerate(on_card):
        for part in range(len(one.parts)):
            addresses, elements, _, bits, step = one.described(part)
            types = [TYPES[tensor.dtype] for tensor in (one.held.param, one.held.grad)]
            packed += struct.pack(
                "6Q2q9fI3B5x",
                *(*addresses, elements, first_tiles[-1]),
                *(*constants(step, **{**OPTIONS, **options}), index),
                *(*types, bits),
            )
            first_tiles.append(first_tiles[-1] + -(-elements // BLOCK))
    return packed, first_tiles


def step_kernel(
    kernels: Kernels,
    held: Sequence[Held],
    *,
    grid: int = 2,
    order: int = 0,
    checks: Sequence[int] | None = None,
    updates: Sequence[int] | None = None,
    last_first: bool = False,
    **options,
) -> tuple[list[int], int]:
    """The kernels: the check of all slices, and then their updates.

    Args:
        kernels: of ``adamw.cu``.
        held: what is stepped, in place.
        grid: blocks of a launch.
        order: of threads, as the emulator takes it.
        checks: segments of each launch of the check; None for one launch of all.
        updates: likewise of the update.
        last_first: whether the last slice is launched first.
        options: of the step, in place of those in `OPTIONS`.

    Returns:
        The flags of parameters, and that of damage.
    """
    on_card = [OnCard(one) for one in held]
    packed, first_tiles = table(on_card, **options)
    segments = Buffer(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
    count = len(first_tiles) - 1
    flags = Buffer(torch.zeros(len(held), dtype=torch.int32))
    damaged = Buffer(torch.zeros(1, dtype=torch.int32))
    size = len(packed) // count
    for kernel, counts in (("fourbit_adamw_check", checks), ("fourbit_adamw", updates)):
        edges = [0, *accumulate(counts or [count])]
        assert edges[-1] == count
        slices = list(pairwise(edges))
        for first, end in reversed(slices) if last_first else slices:
            kernels.launch(
                kernel,
                ctypes.c_void_p(segments.pointer + first * size),
                ctypes.c_uint32(end - first),
                first_tiles[first],
                first_tiles[end] - first_tiles[first],
                flags,
                damaged,
                grid=grid,
                order=order,
            )
    assert not segments.damaged()
    assert segments.tensor().numpy().tobytes() == packed
    for one in on_card:
        one.read_back()
    return flags.tensor().tolist(), int(damaged.tensor().item())
