"""`quantize` and `QuantizedTensor`: arrays of torch, NumPy or any DLPack library in few bits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from fourbit import ops
from fourbit.codebook import Codebook, as_codebook
from fourbit.operands import float_bytes, float_values


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in few bits: packed codes, scales, and what is needed to decode them.

    Attributes:
        packed: uint8 [bytes, 1]: the codes, row-major, high bits first.
        absmax: uint8: the bytes of the float32 scales [4 * blocks], or their codes [blocks] with
            double quantization.
        nested_absmax: uint8 [4 * ceil(blocks / 256)]: the bytes of the scales' own float32 scales;
            None without double quantization.
        nested_offset: uint8 [4]: the bytes of the scales' float32 mean; None without double
            quantization.
        codebook: the map from codes to values.
        block_size: elements that share a scale.
        shape: of the tensor before quantization.
        dtype: of the tensor before quantization.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    codebook: Codebook
    block_size: int
    shape: torch.Size
    dtype: torch.dtype
    _library: str = "torch"

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.numel() for part in self._parts() if part is not None)

    @property
    def bits_per_element(self) -> float:
        """Bits an element in all: 4.127 for NF4 in blocks of 64 with double quantization."""
        return 8 * self.nbytes / max(1, self.shape.numel())

    def scales(self) -> Tensor:
        """The block scales, float32 [blocks]."""
        if self.nested_absmax is None or self.nested_offset is None:
            return float_values(self.absmax)
        return ops.dequantize_absmax(self.absmax, self.nested_absmax, self.nested_offset)

    def dequantize(self, dtype: Any = None) -> Any:
        """Numbers again, in `shape`.

        Args:
            dtype: float32, float16 or bfloat16 of torch, or NumPy's; by default the dtype before
                quantization.

        Returns:
            An array of the library that the input was of (NumPy, CuPy, and others that can take one
            by DLPack), on the device of the codes; a torch tensor if that was torch, or if `dtype`
            is torch's.

        Raises:
            TypeError: for another dtype.
        """
        target = self.dtype if dtype is None else _torch_dtype(dtype)
        output = ops.dequantize(
            *self._parts(), self.codebook.name, self.block_size, self.shape, target
        )
        give_back = None if isinstance(dtype, torch.dtype) else _maker(self._library)
        return output if give_back is None else give_back(output)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device; bytes are not touched.

        On another kind of device it is torch's: `dequantize` gives a torch tensor there.
        """
        packed, absmax, nested_absmax, nested_offset = (
            None if part is None else part.to(device) for part in self._parts()
        )
        assert packed is not None
        assert absmax is not None
        return replace(
            self,
            packed=packed,
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
            _library=self._library if packed.device.type == self.device.type else "torch",
        )

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    def __repr__(self) -> str:
        """Shape, codebook and cost; not the data."""
        return (
            f"QuantizedTensor({tuple(self.shape)}, {self.codebook.name}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, "
            f"{self.bits_per_element:.3f} bits an element, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )


def quantize(
    array: Any,
    *,
    codebook: str | Mapping[int, float] | Codebook = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> QuantizedTensor:
    """Quantize an array blockwise (paper, section 2).

    Args:
        array: a torch tensor, a NumPy array, or any array with ``__dlpack__`` (CuPy's are), on the
            CPU or a GPU; float32, float16 or bfloat16; any shape, empty included. A contiguous one
            is not copied.
        codebook: "nf4", "fp4", "int4", an ``{index: value}`` map, or a `Codebook`.
        block_size: elements that share a scale: 32, 64, ... 4096.
        double_quant: whether to quantize the scales to 8 bits (paper, section 3).

    Raises:
        NonFiniteError: naming the first element that is NaN or infinite.
        ValueError: for an unknown codebook or block size.
        TypeError: for another dtype or object.
    """
    tensor = _as_tensor(array)
    book = as_codebook(codebook)
    packed, scales = ops.quantize(tensor, book.name, block_size)
    absmax, nested_absmax, nested_offset = float_bytes(scales), None, None
    if double_quant:
        absmax, nested_absmax, nested_offset = ops.quantize_absmax(scales)
    return QuantizedTensor(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        book,
        block_size,
        tensor.shape,
        tensor.dtype,
        _library=_library_of(array),
    )


def dequantize(quantized: QuantizedTensor, dtype: Any = None) -> Any:
    """`QuantizedTensor.dequantize` as a function."""
    return quantized.dequantize(dtype)


def _as_tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        # Arrays of another byte order or without write access are copied; torch takes neither.
        native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
        if array.ndim == 0:
            native = native.reshape(())
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    if hasattr(array, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(array)
    raise TypeError(f"cannot quantize a {type(array).__name__}; give a tensor or an array")


def _library_of(array: Any) -> str:
    """The top-level package that an array's type comes from."""
    if isinstance(array, Tensor):
        return "torch"
    if isinstance(array, np.ndarray):
        return "numpy"
    return type(array).__module__.partition(".")[0]


def _maker(library: str) -> Callable[[Tensor], Any] | None:
    """What makes a tensor an array of that library, in the same memory; None for what stays one."""
    if library == "torch":
        return None
    if library == "numpy":
        return Tensor.numpy
    return getattr(sys.modules.get(library), "from_dlpack", None)


def _torch_dtype(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
