"""fourbit: fine-tune large language models with the frozen base in 4 bits (QLoRA)."""

from fourbit._core import CheckpointError, NonFiniteError, __version__
from fourbit.codebook import Codebook
from fourbit.linear import Linear4bit
from fourbit.quantized import QuantizedTensor, dequantize, quantize

__all__ = [
    "CheckpointError",
    "Codebook",
    "Linear4bit",
    "NonFiniteError",
    "QuantizedTensor",
    "__version__",
    "dequantize",
    "quantize",
]
