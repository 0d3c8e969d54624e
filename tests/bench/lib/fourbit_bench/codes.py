"""Quantize and dequantize, against the card's copy and bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fourbit
from fourbit import cuda_ops, ops
from fourbit_bench.report import BNB, OURS, Row, faster, share
from fourbit_bench.timing import DEVICE, Call, compare
from fourbit_bench.weights import BYTES_A_WEIGHT, Matrices, bitsandbytes

SHAPE = (14336, 4096)
SMALL_SHAPE = (512, 1024)
CHUNK = 1024
NESTED_BLOCK = 256


@torch.no_grad()
def rows(*, small: bool) -> Iterator[Row]:
    """Dequantize to every dtype, then quantize: as it is called, and its kernels alone."""
    matrices = Matrices(*(SMALL_SHAPE if small else SHAPE))
    yield from _dequantize(matrices)
    yield from _quantize(matrices)


def _name(work: str, matrices: Matrices) -> str:
    return f"{work}, {matrices.shape[0]} x {matrices.shape[1]}"


def _dequantize(matrices: Matrices) -> Iterator[Row]:
    elements = matrices.elements
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        goals = [share(0.9, "copy")]
        calls: dict[str, Call | str] = {
            OURS: lambda i, dtype=dtype: matrices.ours[i].dequantize(dtype)
        }
        if dtype == torch.bfloat16:  # the one in which theirs were quantized
            calls[BNB] = matrices.with_theirs(lambda layers: lambda i: layers[i].dequantize())
            goals.append(faster(BNB, 1.5))
        yield Row(
            _name(f"dequantize nf4 + double to {str(dtype).removeprefix('torch.')}", matrices),
            compare(calls, matrices.sets),
            "copy",
            (BYTES_A_WEIGHT + dtype.itemsize) * elements,
            goals,
        )
    plain = [fourbit.quantize(layer.weight, double_quant=False) for layer in matrices.dense]
    yield Row(
        _name("dequantize nf4, plain scales, to bfloat16", matrices),
        compare({OURS: lambda i: plain[i].dequantize()}, matrices.sets),
        "copy",
        (0.5 + 4 / 64 + 2) * elements,
    )


def _quantize(matrices: Matrices) -> Iterator[Row]:
    elements = matrices.elements
    inputs = [layer.weight.detach() for layer in matrices.dense]
    library = bitsandbytes()

    def theirs(*, double: bool) -> Call | str:
        if isinstance(library, str):
            return library
        quantize_4bit = library.functional.quantize_4bit
        return lambda i: quantize_4bit(
            inputs[i], blocksize=64, quant_type="nf4", compress_statistics=double
        )

    for double in (False, True):
        scales = BYTES_A_WEIGHT - 0.5 if double else 4 / 64
        moved = (2 + 0.5 + scales) * elements
        what = "quantize nf4 + double" if double else "quantize nf4"
        calls: dict[str, Call | str] = {
            OURS: lambda i, double=double: fourbit.quantize(inputs[i], double_quant=double),
            BNB: theirs(double=double),
        }
        # Ours waits for the card, to raise for numbers that are not finite; theirs does not look.
        yield Row(
            _name(f"{what}, as called", matrices),
            compare(calls, matrices.sets, eager={OURS, BNB}),
            "copy",
            moved,
        )
        kernels = _Kernels(inputs, double=double)
        calls = {OURS: kernels, BNB: theirs(double=double)}
        yield Row(
            _name(f"{what}, kernels alone", matrices),
            compare(calls, matrices.sets, eager={BNB}),
            "copy",
            moved,
            [share(0.85, "copy")] if double else [],
        )
        kernels.check()


class _Kernels:
    """The launches of `fourbit.quantize` without the look at their result; outputs are reused."""

    def __init__(self, inputs: list[torch.Tensor], *, double: bool) -> None:
        self.inputs, self.double = inputs, double
        count = inputs[0].numel()
        blocks = -(-count // 64)

        def empty(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
            return [torch.empty(size, dtype=dtype, device=DEVICE) for _ in inputs]

        self.packed, self.absmax = empty(count // 2, torch.uint8), empty(blocks, torch.float32)
        self.codes = empty(blocks, torch.uint8)
        self.nested = empty(-(-blocks // NESTED_BLOCK), torch.float32)
        self.offset, self.sums = (
            empty(1, torch.float32),
            empty(-(-blocks // CHUNK), torch.float64),
        )
        self.bad = torch.full((3,), -1, dtype=torch.int64, device=DEVICE)
        dtype, number = inputs[0].dtype, DEVICE.index
        self.program = cuda_ops._program("quantize", number, dtype, 64, "nf4", False)
        self.double_program = cuda_ops.general_program("double_quant", DEVICE)

    def __call__(self, i: int) -> None:
        stream = cuda_ops.stream_of(DEVICE)
        source, packed, absmax = self.inputs[i], self.packed[i], self.absmax[i]
        pointers = [tensor.data_ptr() for tensor in (source, packed, absmax)]
        arguments = (*pointers, source.numel(), self.bad.data_ptr())
        self.program.launch("fourbit_quantize", stream, arguments)
        if self.double:
            count, scales, sums = absmax.numel(), absmax.data_ptr(), self.sums[i]
            arguments = (scales, count, sums.data_ptr())
            self.double_program.launch("fourbit_absmax_sums", stream, arguments)
            outputs = (sums, self.codes[i], self.nested[i], self.offset[i], self.bad[1:])
            pointers = [tensor.data_ptr() for tensor in outputs]
            arguments = (scales, count, *pointers)
            self.double_program.launch("fourbit_absmax_encode", stream, arguments)

    def check(self) -> None:
        """That what was timed is what `fourbit.quantize` does."""
        packed, absmax = ops.quantize(self.inputs[0], "nf4", 64)
        assert torch.equal(self.packed[0], packed.view(-1))
        assert torch.equal(self.absmax[0], absmax)
        if self.double:
            assert torch.equal(self.codes[0], ops.quantize_absmax(absmax)[0])
