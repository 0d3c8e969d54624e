"""`PagedAdamW` for the optimizers of bitsandbytes that Trainer's ``optim=`` names."""

from __future__ import annotations

from typing import Any

from fourbit.integrations.patching import Patches
from fourbit.optim import PagedAdamW

# Options of `PagedAdamW` beside those that every AdamW has. What is not paged stays on the card.
_OURS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"state_bits": 8, "pager": "resident"},
    "adamw_bnb_8bit": {"state_bits": 8, "pager": "resident"},
    "paged_adamw_8bit": {"state_bits": 8, "pager": "auto"},
    "paged_adamw_32bit": {"state_bits": 32, "pager": "auto"},
}
_BITSANDBYTES_ONLY = ("ademamix", "lion", "rmsprop_bnb")


def optimizer_for(args: Any) -> tuple[type[PagedAdamW], dict[str, Any]] | None:
    """The optimizer that ``optim=`` names, and its options; None if it is not bitsandbytes'.

    Args:
        args: ``transformers.TrainingArguments``.

    Raises:
        ValueError: for an optimizer that only bitsandbytes has.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name.removeprefix("paged_").startswith(_BITSANDBYTES_ONLY):
        raise ValueError(
            f'optim="{name}" is an optimizer of bitsandbytes that fourbit has not; use '
            f"{', '.join(_OURS)}, or call fourbit.restore_bitsandbytes() and install bitsandbytes"
        )
    if name not in _OURS:
        return None
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **_OURS[name],
    }
    return PagedAdamW, options


def replace_optimizers(patches: Patches) -> None:
    """Let ``Trainer`` and all that derive from it take our optimizers for bitsandbytes'.

    Raises:
        ImportError: for a version of transformers whose Trainer does this in another way.
    """
    import transformers

    trainer, name = transformers.Trainer, "get_optimizer_cls_and_kwargs"
    if not isinstance(vars(trainer).get(name), staticmethod):
        raise ImportError(
            f"transformers {transformers.__version__} has no Trainer.{name}; "
            "use a version that fourbit supports"
        )
    original = getattr(trainer, name)

    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        return optimizer_for(args) or original(args, model)

    patches.attribute(trainer, name, staticmethod(get_optimizer_cls_and_kwargs))
