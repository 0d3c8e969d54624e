"""fourbit: fine-tune large language models with the frozen base in 4 bits (QLoRA).

The modules, in the order in which data flows through them:

==================  ==============================================================================
``codebook``        the maps from codes to values
``ops``             the torch operators, and the calls into the Rust core
``quantized``       `quantize`, `QuantizedTensor`
``checkpoint``      `convert`, `verify`, `inspect`: folders, without a model
``linear``          `Linear4bit`
``lora``            adapters: `add_lora`, `save_adapter`, `load_adapter`, `merge`, `unmerge`
``model``           `quantize_model`
``model_io``        `save`, `load`: models and folders
``integrations``    `from_pretrained`
``training``        `prepare_for_training`
``optim``           `PagedAdamW`
``finetune``        a training run on TRL
``export``          `export_merged`: back to 16 bits
``reference``       the slow twin of every operator, for tests
==================  ==============================================================================
"""

from fourbit._core import CheckpointError, NonFiniteError, __version__
from fourbit.checkpoint import convert, inspect, verify
from fourbit.codebook import Codebook
from fourbit.export import export_merged
from fourbit.integrations.transformers import from_pretrained
from fourbit.linear import Linear4bit
from fourbit.lora import (
    add_lora,
    load_adapter,
    merge,
    remove_lora,
    save_adapter,
    unmerge,
)
from fourbit.model import quantize_model
from fourbit.model_io import load, save
from fourbit.optim import PagedAdamW
from fourbit.quantized import QuantizedTensor, dequantize, quantize
from fourbit.training import prepare_for_training

__all__ = [
    "CheckpointError",
    "Codebook",
    "Linear4bit",
    "NonFiniteError",
    "PagedAdamW",
    "QuantizedTensor",
    "__version__",
    "add_lora",
    "convert",
    "dequantize",
    "export_merged",
    "from_pretrained",
    "inspect",
    "load",
    "load_adapter",
    "merge",
    "prepare_for_training",
    "quantize",
    "quantize_model",
    "remove_lora",
    "save",
    "save_adapter",
    "unmerge",
    "verify",
]
