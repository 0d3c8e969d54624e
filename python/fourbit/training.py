"""`prepare_for_training`: what a model needs before its adapters are trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from fourbit.lora.attach import has_adapter, has_peft_adapter

Model = TypeVar("Model", bound=nn.Module)


def prepare_for_training(
    model: Model,
    *,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """Make a model ready for the training of adapters, in place; before or after `add_lora`.

    The base is frozen, the outputs of its input embeddings ask for gradients (without that, blocks
    under reentrant checkpointing, whose weights are all frozen, would have none), the key-value
    cache is off, and blocks are computed again in the backward pass instead of kept. No parameter
    is cast: a 4-bit base computes in the dtype of its input, and casting embeddings and the output
    head to float32 would cost more memory than the adapters.

    Args:
        model: of transformers, or any module.
        gradient_checkpointing: whether blocks are computed again in the backward pass. A module
            that cannot turn this on itself (it has no ``gradient_checkpointing_enable``) is left
            without it, with a warning.
        gradient_checkpointing_kwargs: for ``torch.utils.checkpoint``; ``use_reentrant`` is False
            unless given.

    Returns:
        The model.
    """
    _freeze_base(model)
    _ask_for_input_gradients(model)
    _turn_off_cache(model)
    if gradient_checkpointing:
        _turn_on_checkpointing(model, gradient_checkpointing_kwargs or {})
    return model


def _freeze_base(model: nn.Module) -> None:
    if has_peft_adapter(model) or has_adapter(model):
        # Adding an adapter has frozen the rest; what still asks for gradients is to be trained.
        return
    model.requires_grad_(False)


def _ask_for_input_gradients(model: nn.Module) -> None:
    own: Any = getattr(model, "enable_input_require_grads", None)
    if callable(own):
        own()
        return
    get: Any = getattr(model, "get_input_embeddings", None)
    embeddings = (
        get()
        if callable(get)
        else next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    )
    if embeddings is not None and _require_grad not in embeddings._forward_hooks.values():
        embeddings.register_forward_hook(_require_grad)


def _require_grad(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _turn_on_checkpointing(model: nn.Module, options: Mapping[str, Any]) -> None:
    kwargs = {"use_reentrant": False, **options}
    # The first name is that of newer versions of transformers, which warn about the second.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable: Any = getattr(model, name, None)
        if callable(enable):
            enable(kwargs)
            return
    warnings.warn(
        f"{type(model).__name__} has no gradient_checkpointing_enable; wrap its blocks in "
        "torch.utils.checkpoint, or pass gradient_checkpointing=False",
        stacklevel=3,
    )


def _turn_off_cache(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    get_text: Any = getattr(config, "get_text_config", None)
    parts: list[Any] = [config, get_text() if callable(get_text) else None]
    for part in parts:
        if hasattr(part, "use_cache"):
            part.use_cache = False
