"""fourbit: fine-tune large language models with the frozen base in 4 bits (QLoRA).

The modules, in the order in which data flows through them:

==================  ==============================================================================
``codebook``        the maps from codes to values
``layout``          sizes of quantized tensors
``ops``             the torch operators, and the calls into the Rust core
``cuda_ops``        the same on a GPU
``quantized``       `quantize`, `QuantizedTensor`
``checkpoint``      `convert`, `verify`, `inspect`: folders, without a model
``linear``          `Linear4bit`
``dense``           dense layers whose place it can take
``expert_ops``      the operators of mixtures of experts
``experts``         3-D weights of experts in few bits
``lora``            adapters: `add_lora`, `save_adapter`, `load_adapter`, `merge`, `unmerge`
``targets``         which weights of a model are quantized
``model``           `quantize_model`
``model_io``        `save`, `load`: models and folders
``stored_experts``  which tensors of a folder make up a 3-D weight of experts
``names_in_files``  what a checkpoint of a model calls its tensors
``file_groups``     what is written together, and how
``loading``         what kind a folder is, and the model and tokenizer in it
``distributed``     models that are sharded over processes
``integrations``    `from_pretrained`, `NF4Config`; PEFT on 4-bit layers
``training``        `prepare_for_training`
``optim``           `PagedAdamW`, `save_optimizer`, `load_optimizer`
``data``            training data, checked before a run
``finetuning``      `finetune`: a training run on TRL
``generation``      `generate`: text from a model
``export``          `export_merged`: back to 16 bits
``files``           files that are there whole or not at all
``tensor_file``     one safetensors file, written as a stream and read strictly
``nvrtc``           where the compiler of the CUDA kernels is
``diagnosis``       `doctor`: what of all this works on this machine
``cli``             the ``fourbit`` command
``reference``       the slow twin of every operator, for tests
==================  ==============================================================================

Names are imported when they are first used: torch takes seconds to load, which ``fourbit --help``
and a script that only converts need not wait for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fourbit._core import CheckpointError, CudaError, NonFiniteError, __version__
from fourbit.integrations import on_import

if TYPE_CHECKING:
    from fourbit.checkpoint import convert, inspect, verify
    from fourbit.codebook import Codebook
    from fourbit.data import DataError
    from fourbit.diagnosis import doctor
    from fourbit.export import export_merged
    from fourbit.finetuning import FinetuneOptions, finetune
    from fourbit.generation import generate
    from fourbit.integrations.bitsandbytes import replace_bitsandbytes, restore_bitsandbytes
    from fourbit.integrations.transformers.config import NF4Config
    from fourbit.integrations.transformers.folders import from_pretrained
    from fourbit.linear import Linear4bit
    from fourbit.lora import add_lora, load_adapter, remove_lora, save_adapter
    from fourbit.lora.merge import merge, unmerge
    from fourbit.model import quantize_model
    from fourbit.model_io import load, save
    from fourbit.optim import PagedAdamW, load_optimizer, save_optimizer
    from fourbit.quantized import QuantizedTensor, dequantize, quantize
    from fourbit.training import prepare_for_training

__all__ = [
    "CheckpointError",
    "Codebook",
    "CudaError",
    "DataError",
    "FinetuneOptions",
    "Linear4bit",
    "NF4Config",
    "NonFiniteError",
    "PagedAdamW",
    "QuantizedTensor",
    "__version__",
    "add_lora",
    "convert",
    "dequantize",
    "doctor",
    "export_merged",
    "finetune",
    "from_pretrained",
    "generate",
    "inspect",
    "load",
    "load_adapter",
    "load_optimizer",
    "merge",
    "prepare_for_training",
    "quantize",
    "quantize_model",
    "remove_lora",
    "replace_bitsandbytes",
    "restore_bitsandbytes",
    "save",
    "save_adapter",
    "save_optimizer",
    "unmerge",
    "verify",
]

# Where the names above are at home; tests/python/test_public.py holds it against the imports.
_HOMES = {
    "checkpoint": ("convert", "inspect", "verify"),
    "codebook": ("Codebook",),
    "data": ("DataError",),
    "diagnosis": ("doctor",),
    "export": ("export_merged",),
    "finetuning": ("FinetuneOptions", "finetune"),
    "generation": ("generate",),
    "integrations.bitsandbytes": ("replace_bitsandbytes", "restore_bitsandbytes"),
    "integrations.transformers.config": ("NF4Config",),
    "integrations.transformers.folders": ("from_pretrained",),
    "linear": ("Linear4bit",),
    "lora": ("add_lora", "load_adapter", "merge", "remove_lora", "save_adapter", "unmerge"),
    "model": ("quantize_model",),
    "model_io": ("load", "save"),
    "optim": ("PagedAdamW", "load_optimizer", "save_optimizer"),
    "quantized": ("QuantizedTensor", "dequantize", "quantize"),
    "training": ("prepare_for_training",),
}
_MODULE_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = {home.partition(".")[0] for home in _HOMES} | {
    "distributed",
    "expert_ops",
    "experts",
    "layout",
    "loading",
    "nvrtc",
    "ops",
    "reference",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module, when it is first asked for."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"fourbit.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return import_module(f"fourbit.{name}")
    raise AttributeError(f"module 'fourbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names and modules, loaded or not."""
    return sorted({*globals(), *__all__, *_SUBMODULES})


on_import.install()
