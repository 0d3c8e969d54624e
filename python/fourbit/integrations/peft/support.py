"""What PEFT's LoRA can be on a `Linear4bit`; the rest is refused by name."""

from __future__ import annotations

import re
from typing import Any

LOSSY_MERGE = (
    "merging into 4 bits rounds the weights again, which loses part of a small change; "
    "fourbit.export_merged(model, folder) writes the merged model in 16 bits"
)
"""What a merge warns of."""

_VARIANTS = ("use_dora", "alora_invocation_tokens", "arrow_config")
# PEFT marks most of its variants as such, and these in some versions not.
_OTHERS = ("use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "olora", "pissa", "loftq")


def check_supported(config: Any, path: str) -> None:
    """Refuse what a `Linear4bit` cannot have, rather than give it plain LoRA.

    Args:
        config: a ``peft.LoraConfig``.
        path: of the layer.

    Raises:
        ValueError: naming the layer and the option.
    """
    fields = getattr(config, "__dataclass_fields__", {})
    marked = {name for name in fields if fields[name].metadata.get("is_lora_variant")}
    for name in sorted(marked.union(_OTHERS).difference(_VARIANTS)):
        if getattr(config, name, None):
            raise ValueError(
                f"{path} is in 4 bits, where LoRA has no {name}; "
                f"use {', '.join(_VARIANTS)} or plain LoRA, or leave the layer unquantized"
            )
    start = config.init_lora_weights
    known = start in _STARTS or (isinstance(start, str) and re.fullmatch(r"pissa_niter_\d+", start))
    if not known:
        raise ValueError(
            f"{path} is in 4 bits, where init_lora_weights={start!r} is not possible; use True, "
            f"False, {', '.join(repr(name) for name in _STARTS[2:])} or 'pissa_niter_N', or "
            "initialise the adapter on the 16-bit model"
        )


def check_experts(config: Any, path: str) -> None:
    """Refuse a start of adapters that 4-bit weights of experts cannot have.

    Of all else PEFT itself says what weights of experts cannot have: DoRA, dropout and others.

    Args:
        config: a ``peft.LoraConfig``.
        path: of the weight.

    Raises:
        ValueError: naming the weight and the option.
    """
    start = config.init_lora_weights
    if start not in (True, False, "gaussian"):
        raise ValueError(
            f"{path} is in 4 bits, where init_lora_weights={start!r} is not possible for experts; "
            "use True, False or 'gaussian', or leave target_parameters out"
        )
