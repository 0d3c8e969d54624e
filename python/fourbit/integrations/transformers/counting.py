"""``model.num_parameters()`` of transformers counts numbers, also where a byte holds two."""

from __future__ import annotations

from functools import wraps
from typing import Any

from fourbit.integrations.patching import Patches
from fourbit.model import hidden_numbers

_patches = Patches()
_NAME = "num_parameters"


def register() -> None:
    """What the import of transformers' models calls; once is enough.

    Raises:
        RuntimeError: for a version of transformers whose models do not count.
    """
    import transformers
    from transformers import modeling_utils

    if _patches:
        return
    owner = next(
        (kind for kind in modeling_utils.PreTrainedModel.__mro__ if _NAME in vars(kind)), None
    )
    if owner is None:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no PreTrainedModel.{_NAME}; "
            "use a version that fourbit supports"
        )
    original = vars(owner)[_NAME]

    @wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, *args: Any, **kwargs: Any) -> int:
        count: int = original(self, only_trainable, *args, **kwargs)
        return count if only_trainable else count + hidden_numbers(self)

    _patches.attribute(owner, _NAME, num_parameters)


def unregister() -> None:
    """Let models count as they did."""
    _patches.undo()
