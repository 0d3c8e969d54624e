"""Other libraries: all that touches them is here, and loaded only when they are.

========================  =========================================================================
``versions``              which versions of them are supported
``on_import``             what is done to a library as soon as it is imported
``patching``              changes to a library that can be taken back
``transformers``          `from_pretrained`, `NF4Config`, the quantizer behind it, experts
``conversions``           transformers' table of what checkpoints call its tensors
``peft``                  PEFT's adapters on `Linear4bit`
``trainer``               `PagedAdamW` for bitsandbytes' optimizers of Trainer
``bitsandbytes``          `replace_bitsandbytes`, `restore_bitsandbytes`
========================  =========================================================================
"""

from __future__ import annotations


def is_conv1d(module: object) -> bool:
    """Whether a module is transformers' `Conv1D`, which is not imported to find out.

    It is a linear layer whose weight is [in_features, out_features]: those of GPT-2 are of it.
    """
    cls = type(module)
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_of_transformers(model: object) -> bool:
    """Whether a model is one of transformers, which is not imported to find out."""
    return any(
        (cls.__module__, cls.__name__) == ("transformers.modeling_utils", "PreTrainedModel")
        for cls in type(model).__mro__
    )
