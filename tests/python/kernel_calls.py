"""Calls of the emulated kernels as the library makes them on a card, and codebooks to call with."""

from itertools import product

import torch
from torch import Tensor

from emulate import Buffer, Kernels, Specialisation
from fourbit import ops
from fourbit.codebook import Codebook, by_name
from fourbit.layout import NESTED_BLOCK_SIZE, block_count, packed_bytes
from fourbit.operands import float_bytes
from tensors import BLOCK_SIZES, DTYPES

# Each takes another way through the kernels.
CODEBOOKS = {
    "nf4": by_name("nf4"),
    "fp4": by_name("fp4"),  # codes are no ranks
    "int4": by_name("int4"),  # two codes share a value
    "upper": Codebook(dict(enumerate(by_name("nf4").values)), ties="upper", name="nf4-upper"),
    "close": Codebook(  # two midpoints in a bin, codes that do not exist, a midpoint of -0
        {0: 0.5, 2: -1.0, 3: 0.51, 5: 0.52, 6: 1.0, 9: 0.0, 11: -1e-45}, name="close"
    ),
    "two-bit": Codebook({0: 1.0, 1: -1.0, 3: 0.25}, ties="upper", name="two-bit"),
    "byte": Codebook({i: (i - 100) / 155 for i in range(0, 256, 3)}, name="byte"),
    "whole-byte": Codebook({255 - i: i / 127.5 - 1 for i in range(256)}, name="whole-byte"),
}
FULL_PRODUCT = [
    Specialisation(dtype, block_size, codebook)
    for dtype, block_size, codebook in product(DTYPES, BLOCK_SIZES, CODEBOOKS.values())
]


def rotation(shift: int = 0) -> list[Specialisation]:
    """Every dtype with every block size and with every codebook, and most of the other pairs."""
    books = list(CODEBOOKS.values())
    return [
        Specialisation(dtype, size, books[(row + 3 * column + shift) % len(books)])
        for column, dtype in enumerate(DTYPES)
        for row, size in enumerate(BLOCK_SIZES)
    ]


def by_library(specialisations: list[Specialisation]) -> list[list[Specialisation]]:
    """Those that are best compiled together."""
    return [specialisations[i : i + 8] for i in range(0, len(specialisations), 8)]


def tile(specialisation: Specialisation) -> int:
    """Elements that a block of `fourbit_quantize` or `fourbit_dequantize` takes at a time."""
    return 256 * 4 * 16 // specialisation.dtype.itemsize


def quantize(
    kernels: Kernels,
    specialisation: Specialisation,
    x: Tensor,
    *,
    grid: int = 2,
    order: int = 0,
    misaligned: bool = False,
) -> tuple[Tensor, Tensor, int | None]:
    """Packed codes, scales, and the index of the first element that is not finite."""
    count, book = x.numel(), specialisation.codebook
    x_buffer = Buffer(x, misaligned_by=x.itemsize if misaligned else 0)
    packed = Buffer.empty(
        packed_bytes(count, book.code_bits), torch.uint8, misaligned_by=int(misaligned)
    )
    absmax = Buffer.empty(block_count(count, specialisation.block_size), torch.float32)
    first_bad = Buffer(torch.tensor([-1]))
    arguments = (x_buffer, packed, absmax, count, first_bad)
    kernels.launch("fourbit_quantize", *arguments, grid=grid, order=order)
    bad = first_bad.tensor().item()
    return packed.tensor(), absmax.tensor(), None if bad == -1 else int(bad)


def dequantize(
    kernels: Kernels,
    specialisation: Specialisation,
    packed: Tensor,
    scales: tuple[Tensor, ...],
    count: int,
    *,
    grid: int = 2,
    order: int = 0,
    misaligned: bool = False,
) -> Tensor:
    """Numbers; `scales` are float32, or codes, their scales and their offset."""
    dtype = specialisation.dtype
    output = Buffer.empty(count, dtype, misaligned_by=dtype.itemsize if misaligned else 0)
    pointers = [Buffer(part) for part in scales] + [None] * (3 - len(scales))
    packed_buffer = Buffer(packed, misaligned_by=int(misaligned))
    kernels.launch(
        "fourbit_dequantize", packed_buffer, *pointers, output, count, grid=grid, order=order
    )
    return output.tensor()


def quantize_absmax(
    kernels: Kernels, absmax: Tensor, *, grid: int = 2, order: int = 0
) -> tuple[Tensor, Tensor, Tensor, list[int | None]]:
    """Codes, their scales, their offset [1], and the first scales that are bad, in both ways."""
    count = absmax.numel()
    chunks = (count + 1023) // 1024
    sums = Buffer.empty(chunks, torch.float64)
    source = Buffer(absmax)
    kernels.launch("fourbit_absmax_sums", source, count, sums, grid=grid, order=order)
    codes = Buffer.empty(count, torch.uint8)
    nested_absmax = Buffer.empty(block_count(count, NESTED_BLOCK_SIZE), torch.float32)
    nested_offset = Buffer.empty(1, torch.float32)
    bad = Buffer(torch.tensor([-1, -1]))
    outputs = (codes, nested_absmax, nested_offset, bad)
    kernels.launch("fourbit_absmax_encode", source, count, sums, *outputs, grid=grid, order=order)
    found = [None if index == -1 else index for index in bad.tensor().tolist()]
    return codes.tensor(), nested_absmax.tensor(), nested_offset.tensor(), found


def dequantize_absmax(
    kernels: Kernels, codes: Tensor, nested_absmax: Tensor, offset: Tensor, *, grid: int = 2
) -> Tensor:
    """Scales, float32."""
    absmax = Buffer.empty(codes.numel(), torch.float32)
    buffers = Buffer(codes), Buffer(nested_absmax), Buffer(offset)
    kernels.launch("fourbit_absmax_decode", *buffers, codes.numel(), absmax, grid=grid)
    return absmax.tensor()


def core_quantize(specialisation: Specialisation, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the Rust core."""
    packed, absmax = ops.quantize(x, specialisation.codebook.name, specialisation.block_size)
    return packed.view(-1), absmax


def core_dequantize(
    specialisation: Specialisation, packed: Tensor, scales: tuple[Tensor, ...], count: int
) -> Tensor:
    """The same by the Rust core."""
    absmax = scales[0] if len(scales) == 3 else float_bytes(scales[0])
    nested = [float_bytes(part) for part in scales[1:]] or [None, None]
    return ops.dequantize(
        packed,
        absmax,
        *nested,
        specialisation.codebook.name,
        specialisation.block_size,
        (count,),
        specialisation.dtype,
    )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal bytes; but any NaN equals any other."""
    if a.is_floating_point():
        a, b = a.masked_fill(a.isnan(), 7), b.masked_fill(b.isnan(), 7)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
