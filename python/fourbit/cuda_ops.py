"""The operators of `ops` for CUDA tensors: checks, memory from torch, and launches of the kernels.

Everything runs on torch's current stream of the tensors' own device, so that a stream of another
device can never be meant. Outputs and workspace come from torch's caching allocator, which keeps
what a stream frees for the same stream: one decoded weight's memory serves layer after layer. So
all of this may be captured in a CUDA graph, but for `quantize` and `quantize_absmax`, which must
look at the result to raise for numbers that are not finite.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from fourbit import _core, nvrtc
from fourbit.codebook import by_name
from fourbit.layout import NESTED_BLOCK_SIZE, block_count, packed_bytes
from fourbit.operands import (
    check_device,
    check_float,
    check_operand,
    dense_linear,
    float_bytes,
    float_values,
)

# Scales that `fourbit_absmax_sums` adds as a unit; part of the format, as src/double_quant.rs says.
_CHUNK = 1024


@cache
def _program(
    kernel: str, device: int, dtype: torch.dtype, block_size: int, codebook: str, double_quant: bool
) -> _core.CudaProgram:
    """A kernel file, compiled and loaded; later calls give the same one."""
    nvrtc.load()
    return _core.CudaProgram(
        kernel,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        codebook=by_name(codebook).core,
        double_quant=double_quant,
    )


def general_program(kernel: str, device: torch.device) -> _core.CudaProgram:
    """The program of a kernel file that has a single specialisation."""
    return _program(kernel, _ordinal(device), torch.float32, 64, "nf4", False)


def stream_of(device: torch.device) -> int:
    """Torch's current stream of a device, as the driver's handle."""
    return torch.cuda.current_stream(device).cuda_stream


def _ordinal(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _is_capturing(device: torch.device) -> bool:
    """Whether the stream that `stream_of` gives captures, be the device the current one or not."""
    if _ordinal(device) == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _check_not_capturing(what: str, device: torch.device) -> None:
    if _is_capturing(device):
        raise RuntimeError(
            f"{what} looks at its result to find numbers that are not finite, which a CUDA graph "
            "cannot; call it before the capture"
        )


def _check_length(what: str, tensor: Tensor, expected: int) -> None:
    if tensor.numel() != expected:
        raise ValueError(f"{what} has {tensor.numel()} elements where the layout needs {expected}")


def _check_bytes(what: str, tensor: Tensor, device: torch.device, expected: int) -> None:
    """A part of a quantized tensor: uint8, on the device, of the size that the layout needs."""
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{what} is {tensor.dtype} where uint8 is needed")
    if tensor.device != device:
        raise RuntimeError(f"{what} is on {tensor.device} and the codes are on {device}; move one")
    _check_length(what, tensor, expected)


def quantize(input: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: A002
    """`ops.quantize`."""
    check_float(input, "the input")
    book = by_name(codebook)
    blocks = block_count(input.numel(), block_size)
    count = input.numel()
    packed = input.new_empty((packed_bytes(count, book.code_bits), 1), dtype=torch.uint8)
    absmax = input.new_empty(blocks, dtype=torch.float32)
    if count == 0:
        return packed, absmax
    _check_not_capturing("quantize", input.device)
    source = input.detach().contiguous()
    # Above every index.
    first_bad = torch.full((1,), -1, dtype=torch.int64, device=input.device)
    program = _program("quantize", _ordinal(input.device), input.dtype, block_size, codebook, False)
    pointers = (source.data_ptr(), packed.data_ptr(), absmax.data_ptr())
    program.launch(
        "fourbit_quantize", stream_of(input.device), (*pointers, count, first_bad.data_ptr())
    )
    index = int(first_bad.item())
    if index >= 0:
        _core.raise_non_finite(index, float(source.view(-1)[index].item()))
    return packed, absmax


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """`ops.dequantize`."""
    output = torch.empty(shape, dtype=dtype, device=packed.device)
    check_float(output, "dtype")
    return _decode(packed, absmax, nested_absmax, nested_offset, codebook, block_size, output)


def _decode(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    output: Tensor,
) -> Tensor:
    """One launch: scales, decoded on the way where they are quantized too, times values."""
    count, device = output.numel(), packed.device
    codes, scales = _weight_pointers(
        packed, absmax, nested_absmax, nested_offset, codebook, block_size, count
    )
    if count == 0:
        return output
    program = _program(
        "dequantize",
        _ordinal(device),
        output.dtype,
        block_size,
        codebook,
        nested_absmax is not None,
    )
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (codes, *scales, output)]
    program.launch("fourbit_dequantize", stream_of(device), (*pointers, count))
    return output


def _weight_pointers(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    count: int,
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor | None]]:
    """Codes and scales as kernels take them: checked, contiguous, aligned."""
    device = packed.device
    blocks = block_count(count, block_size)
    _check_bytes("packed", packed, device, packed_bytes(count, by_name(codebook).code_bits))
    codes = packed.contiguous()
    if nested_absmax is None:
        _check_bytes("absmax", absmax, device, 4 * blocks)
        return codes, (float_values(absmax), None, None)
    if nested_offset is None:
        raise ValueError("nested_absmax is given without nested_offset")
    nested_blocks = block_count(blocks, NESTED_BLOCK_SIZE)
    _check_bytes("absmax", absmax, device, blocks)
    _check_bytes("nested_absmax", nested_absmax, device, 4 * nested_blocks)
    _check_bytes("nested_offset", nested_offset, device, 4)
    return codes, (absmax.contiguous(), float_values(nested_absmax), float_values(nested_offset))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize_absmax`."""
    if absmax.dtype != torch.float32:
        raise TypeError(f"absmax is {absmax.dtype} where torch.float32 is needed")
    count, device = absmax.numel(), absmax.device
    codes = absmax.new_empty(count, dtype=torch.uint8)
    nested = absmax.new_empty(block_count(count, NESTED_BLOCK_SIZE))
    offset = absmax.new_zeros(1)
    if count > 0:
        _check_not_capturing("quantize_absmax", device)
        source = absmax.contiguous()
        sums = absmax.new_empty(block_count(count, _CHUNK), dtype=torch.float64)
        # The first scale that is not finite, and the first that 8 bits round to infinity.
        first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)
        program, stream = general_program("double_quant", device), stream_of(device)
        program.launch("fourbit_absmax_sums", stream, (source.data_ptr(), count, sums.data_ptr()))
        outputs = [tensor.data_ptr() for tensor in (sums, codes, nested, offset, first_bad)]
        program.launch("fourbit_absmax_encode", stream, (source.data_ptr(), count, *outputs))
        index, overflow = first_bad.tolist()
        if index >= 0:
            shifted = source.view(-1)[index] - offset[0]
            _core.raise_non_finite(index, float(shifted.item()))
        if overflow >= 0:
            _core.raise_scale_overflow()
    return codes, float_bytes(nested), float_bytes(offset)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """`ops.dequantize_absmax`."""
    count, device = codes.numel(), codes.device
    _check_bytes("codes", codes, device, count)
    blocks = block_count(count, NESTED_BLOCK_SIZE)
    _check_bytes("nested_absmax", nested_absmax, device, 4 * blocks)
    _check_bytes("nested_offset", nested_offset, device, 4)
    absmax = codes.new_empty(count, dtype=torch.float32)
    if count > 0:
        parts = (codes.contiguous(), float_values(nested_absmax), float_values(nested_offset))
        pointers = [part.data_ptr() for part in parts]
        program = general_program("double_quant", device)
        arguments = (*pointers, count, absmax.data_ptr())
        program.launch("fourbit_absmax_decode", stream_of(device), arguments)
    return absmax


# --- products -----------------------------------------------------------------------------------

# Rows of the input that the kernels of matvec.cu, matvec_tensor.cu, and matmul.cu with
# matmul_transposed.cu take at once.
_MATVEC_ROWS = (1, 2, 4, 8)
_MATVEC_TENSOR_ROWS = (1, 2, 4)
_TENSOR_ROWS = (8, 16, 32, 64)
_TENSOR_ROWS_BEFORE_SM80 = _TENSOR_ROWS[:-1]
# Where tensor cores can, matmul.cu takes over after so many rows: bitsandbytes' rule on its own
# kernels, and more than matvec_tensor.cu has.
_MATVEC_BEFORE_TENSOR = 4
# Above so many rows decoding the weight once, for the vendor's GEMM, costs less than decoding it
# for each tile of rows: bitsandbytes' measured crossover on an H100.
_CROSSOVER = 64
_ALIGNMENT = 16
# A row of codes that the tensor-core kernels copy ends on 16 bytes.
_TENSOR_FEATURES = 32
# The kernels of `matmul` for fewer than 32 rows take this many columns at a time with one scale, or
# a block where that is less.
_FEW_ROWS_FEATURES = 64
_TENSOR_ROWS_OF_ANY = 32

_Parts: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
_Layout: TypeAlias = tuple[str, int, int, int]


def linear(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`ops.linear`: from packed codes for a few rows; for more, the weight is decoded first."""
    check_operand(x, in_features, "the input")
    check_device(x, packed)
    if bias is not None:
        if bias.device != x.device:
            raise RuntimeError(f"the bias is on {bias.device} and the input on {x.device}")
        _check_length("the bias", bias, out_features)
        bias = bias.to(x.dtype).contiguous()
    parts = (packed, absmax, nested_absmax, nested_offset)
    layout = (codebook, block_size, out_features, in_features)
    rows = x.numel() // max(1, in_features)
    if _from_codes(rows, packed, layout):
        inputs = x.contiguous()
        output = x.new_empty((*x.shape[:-1], out_features))
        if _on_tensor_cores(inputs, rows, in_features):
            _tensor_product("matmul", inputs, (bias,), parts, layout, output, rows)
            return output
        if rows <= _MATVEC_ROWS[-1]:
            _matvec(inputs, bias, parts, layout, output, rows)
            return output
    weight = torch.empty((out_features, in_features), dtype=x.dtype, device=x.device)
    _decode(*parts, codebook, block_size, weight)
    return dense_linear(x, weight, bias)


def linear_transposed(
    y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: str,
    block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`ops.linear_transposed`: as `linear`, on tensor cores or decoded first."""
    check_operand(y, out_features, "the gradient")
    check_device(y, packed)
    parts = (packed, absmax, nested_absmax, nested_offset)
    layout = (codebook, block_size, out_features, in_features)
    rows = y.numel() // max(1, out_features)
    if _from_codes(rows, packed, layout):
        gradient = y.contiguous()
        if _on_tensor_cores(gradient, rows, in_features, fewest=1):
            output = y.new_empty((*y.shape[:-1], in_features))
            _tensor_product("matmul_transposed", gradient, (), parts, layout, output, rows)
            return output
    weight = torch.empty((out_features, in_features), dtype=y.dtype, device=y.device)
    return y @ _decode(*parts, codebook, block_size, weight)


def _from_codes(rows: int, packed: Tensor, layout: _Layout) -> bool:
    """Whether there may be a kernel that multiplies without decoding the weight to memory."""
    codebook, _, out_features, in_features = layout
    return (
        0 < rows <= _CROSSOVER
        and out_features * in_features > 0
        and by_name(codebook).code_bits == 4
        and packed.is_contiguous()
        and packed.data_ptr() % _ALIGNMENT == 0
    )


def _on_tensor_cores(
    operand: Tensor, rows: int, in_features: int, fewest: int = _MATVEC_BEFORE_TENSOR + 1
) -> bool:
    if operand.dtype == torch.float32 or rows < fewest or in_features % _TENSOR_FEATURES:
        return False
    if operand.data_ptr() % _ALIGNMENT:
        return False
    before_sm80 = _capability(_ordinal(operand.device)) < 80
    if before_sm80 and operand.dtype == torch.bfloat16:
        return False
    return rows <= (_TENSOR_ROWS_BEFORE_SM80 if before_sm80 else _TENSOR_ROWS)[-1]


@cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _pointers(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _matvec(
    x: Tensor, bias: Tensor | None, parts: _Parts, layout: _Layout, output: Tensor, rows: int
) -> None:
    """Launch `matvec`, or `matvec_tensor` where it takes this product."""
    codebook, block_size, out_features, in_features = layout
    codes, scales = _weight_pointers(*parts, codebook, block_size, out_features * in_features)
    device, double_quant = _ordinal(x.device), parts[2] is not None
    at_once = next(number for number in _MATVEC_ROWS if number >= rows)
    on_tensor_cores = (
        at_once in _MATVEC_TENSOR_ROWS
        and x.dtype != torch.float32
        and x.data_ptr() % _ALIGNMENT == 0
        and _core.matvec_tensor_takes(
            rows=at_once,
            columns=out_features,
            depth=in_features,
            block_size=block_size,
            capability=_capability(device),
        )
    )
    kernel = "matvec_tensor" if on_tensor_cores else "matvec"
    program = _program(kernel, device, x.dtype, block_size, codebook, double_quant)
    pointers = _pointers((x, codes, *scales, bias, output))
    program.launch(
        f"fourbit_{kernel}_{at_once}",
        stream_of(x.device),
        (*pointers, rows, out_features, in_features),
    )


def _tensor_product(
    kernel: str,
    operand: Tensor,
    bias: tuple[Tensor | None, ...],
    parts: _Parts,
    layout: _Layout,
    output: Tensor,
    rows: int,
) -> None:
    """Launch `matmul` or `matmul_transposed`, whose sums may be cut to fill the card."""
    codebook, block_size, out_features, in_features = layout
    codes, scales = _weight_pointers(*parts, codebook, block_size, out_features * in_features)
    at_once = next(number for number in _TENSOR_ROWS if number >= rows)
    if kernel == "matmul" and in_features % min(block_size, _FEW_ROWS_FEATURES):
        at_once = max(at_once, _TENSOR_ROWS_OF_ANY)
    device, double_quant = operand.device, parts[2] is not None
    program = _program(kernel, _ordinal(device), operand.dtype, block_size, codebook, double_quant)
    splits, tiles, partial_count = _core.product_cut(
        kernel,
        rows=rows,
        tile_rows=at_once,
        columns=output.shape[-1],
        depth=operand.shape[-1],
        block_size=block_size,
        capability=_capability(_ordinal(device)),
        processors=program.processors,
    )
    stream, slot = stream_of(device), 0
    partial = arrived = None
    if splits > 1:
        partial = torch.empty(partial_count, dtype=torch.float32, device=device)
        kept = _counter_slot(device, stream, tiles)
        if kept is None:
            arrived = torch.zeros(tiles, dtype=torch.int32, device=device)
        else:
            slot = kept
    tensors = (operand, codes, *scales, *bias, output, partial, arrived)
    program.launch(
        f"fourbit_{kernel}_{at_once}",
        stream,
        (*_pointers(tensors), rows, out_features, in_features, splits, slot),
    )


# The handle of the stream that is another one in each thread.
_PER_THREAD_STREAM = 2
# The slot of each stream, by device.
_slots: dict[int, dict[int, int]] = {}
_slots_lock = threading.Lock()


def _counter_slot(device: torch.device, stream: int, tiles: int) -> int | None:
    """The row of a program's own counters for a launch; None where it must bring its own.

    The launches of a stream have a row to themselves: they follow each other, and each leaves
    zeros. The counters are memory of the program, not a tensor that is kept: torch would take that
    from the pool that is in use at the time, which may be a CUDA graph's.
    """
    if tiles > _core.SLOT_COUNTERS or stream == _PER_THREAD_STREAM or _is_capturing(device):
        # A graph may be replayed on any stream, and zeroes its own counters.
        return None
    with _slots_lock:
        taken = _slots.setdefault(_ordinal(device), {})
        if stream not in taken and len(taken) < _core.COUNTER_SLOTS:
            taken[stream] = len(taken)
        return taken.get(stream)
