"""The matrices that are measured: one in 16 bits, in ours, and in bitsandbytes' format."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fourbit
from fourbit_bench.timing import DEVICE, sets_for, why

# Bytes of a weight in NF4 with double quantization, in blocks of 64: codes, and codes of scales.
BYTES_A_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers on the card."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def weight(out_features: int, in_features: int) -> Tensor:
    """A matrix with the spread of trained weights: normal, each row with a scale of its own.

    It keeps the size of what it is multiplied with, so that stacks of layers stay finite.
    """
    scales = (0.5 + torch.rand(out_features, 1, device=DEVICE)) / in_features**0.5
    return (torch.randn(out_features, in_features, device=DEVICE) * scales).to(torch.bfloat16)


@cache
def bitsandbytes() -> ModuleType | str:
    """The library, or why it cannot be used."""
    try:
        import bitsandbytes
    except Exception as error:  # it may fail in many ways where its CUDA library does not fit
        return why(error)
    return bitsandbytes


class BitsandbytesLinear(nn.Module):
    """A frozen layer of bitsandbytes' functions, of the shape of ``nn.Linear``."""

    def __init__(self, dense: Tensor) -> None:
        super().__init__()
        library = bitsandbytes()
        if isinstance(library, str):
            raise ImportError(library)
        self.library = library
        self.out_features, self.in_features = dense.shape
        self.bias = None
        packed, self.state = library.functional.quantize_4bit(
            dense, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T``."""
        result: Tensor = self.library.matmul_4bit(x, self.weight, quant_state=self.state)
        return result

    def dequantize(self) -> Tensor:
        """``W``."""
        result: Tensor = self.library.functional.dequantize_4bit(self.weight, self.state)
        return result


def dense_linear(matrix: Tensor) -> nn.Linear:
    """The frozen layer in 16 bits."""
    out_features, in_features = matrix.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    return layer


class Matrices:
    """So many matrices of one shape that their codes alone are larger than the cache.

    Attributes:
        dense: layers in bf16.
        ours: `fourbit.Linear4bit`.
        theirs: layers of bitsandbytes, or why there are none.
    """

    def __init__(self, out_features: int, in_features: int, *, most: int = 64) -> None:
        self.shape = (out_features, in_features)
        self.elements = out_features * in_features
        self.sets = min(most, sets_for(self.elements // 2))
        matrices = [weight(out_features, in_features) for _ in range(self.sets)]
        self.dense = [dense_linear(matrix) for matrix in matrices]
        self.ours = [fourbit.Linear4bit.from_linear(layer) for layer in self.dense]
        self.theirs: list[BitsandbytesLinear] | str
        try:
            self.theirs = [BitsandbytesLinear(matrix) for matrix in matrices]
        except Exception as error:
            self.theirs = why(error)

    @property
    def nbytes(self) -> int:
        """Bytes of one packed matrix."""
        return self.ours[0].quantized().nbytes

    def with_theirs(self, make: Any) -> Any:
        """What `make` makes of bitsandbytes' layers, or why there are none."""
        return self.theirs if isinstance(self.theirs, str) else make(self.theirs)
