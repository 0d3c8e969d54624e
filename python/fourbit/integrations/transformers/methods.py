"""Methods of transformers' models that have to know of packed weights.

===================  ==============================================================================
``num_parameters``   counts numbers, also where a byte holds two
``save_pretrained``  writes what can be loaded, also of models that fourbit itself has quantized
===================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fourbit.integrations.patching import Patches
from fourbit.lora.attach import has_adapter
from fourbit.model import hidden_numbers

_patches = Patches()


def register() -> None:
    """What the import of transformers' models calls; once is enough.

    Raises:
        RuntimeError: for a version of transformers whose models lack one of the methods.
    """
    import transformers
    from transformers import modeling_utils

    if _patches:
        return
    changes = []
    for name, changed in (("num_parameters", _counting), ("save_pretrained", _saving)):
        kinds = modeling_utils.PreTrainedModel.__mro__
        owner = next((kind for kind in kinds if name in vars(kind)), None)
        if owner is None:
            raise RuntimeError(
                f"transformers {transformers.__version__} has no PreTrainedModel.{name}; "
                "use a version that fourbit supports"
            )
        changes.append((owner, name, changed(vars(owner)[name])))
    for change in changes:
        _patches.attribute(*change)


def unregister() -> None:
    """Leave the methods as they were."""
    _patches.undo()


def _counting(original: Callable[..., int]) -> Callable[..., int]:
    @wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, *args: Any, **kwargs: Any) -> int:
        count = original(self, only_trainable, *args, **kwargs)
        return count if only_trainable else count + hidden_numbers(self)

    return num_parameters


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        from fourbit.integrations.transformers.saving import with_quantizer

        if has_adapter(self):
            # What a Trainer writes to go on from: it is read back by the names in the model, and
            # under those of checkpoints adapters of experts would not be found.
            kwargs.setdefault("save_original_format", False)
        with with_quantizer(self):
            return original(self, *args, **kwargs)

    return save_pretrained
