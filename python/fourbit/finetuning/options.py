"""`FinetuneOptions`: how to train, and which values make sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
InitLora = Literal["default", "gaussian"]
# As `fourbit.optim.paging.PagerName`, whose import takes seconds.
Pager = Literal["auto", "unified", "pinned", "resident"]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """How to train.

    r, alpha, dropout, learning rate and gradient norm are by default those of the QLoRA paper
    (arXiv 2305.14314, appendix B.2).

    Attributes:
        r: rank of the adapters.
        lora_alpha: the adapter's output is multiplied by ``lora_alpha / r``.
        lora_dropout: dropout on the adapter's input.
        target_modules: "all-linear", or names of layers.
        target_parameters: names of 3-D weights of experts; None for all of them with "all-linear",
            else for none. See `add_lora`.
        use_dora: learn the norm of each row apart from its direction.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead.
        init_lora_weights: "default" or "gaussian".
        epochs: passes over the data.
        max_steps: optimizer steps, in place of `epochs`.
        batch_size: sequences a forward pass.
        gradient_accumulation: forward passes an optimizer step.
        lr: the highest learning rate.
        lr_schedule: "linear" and "cosine" go down to 0; "constant" has no warm-up.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        weight_decay: of the adapters.
        max_grad_norm: gradients are scaled down to this norm.
        optimizer_bits: bits of the optimizer's state, 8 or 32.
        pager: where the optimizer's state lives: "resident" beside the parameters, "unified" in
            memory that moves between GPU and host, "pinned" in the host's; "auto" chooses. The
            results are the same bits. See `PagedAdamW`.
        max_length: tokens at which a sequence is cut.
        packing: put several examples into one sequence of `max_length`.
        assistant_only: of messages, learn the assistant's turns only; None does so where they can
            be told apart: the chat template marks them, or is one that TRL can mark.
        completion_only: of prompts, learn the completion only; None means yes.
        chat_template: a Jinja file to use in place of the tokenizer's template.
        gradient_checkpointing: compute blocks again in the backward pass: slower, far less memory.
        dtype: of the computation; "auto" is bfloat16 on a GPU that has it, float16 on one that has
            not, float32 on a CPU.
        seed: of adapters, dropout and the order of the data.
        logging_steps: optimizer steps between entries of the loss log.
        eval_steps: optimizer steps between measurements on the held-out data, if there is any;
            None for those of `save_steps`.
        save_steps: optimizer steps between checkpoints.
        save_limit: checkpoints kept.
    """

    r: int = 64
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    target_modules: str | Sequence[str] = "all-linear"
    target_parameters: Sequence[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: InitLora = "default"
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 1
    gradient_accumulation: int = 16
    lr: float = 2e-4
    lr_schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    optimizer_bits: Literal[8, 32] = 8
    pager: Pager = "auto"
    max_length: int = 1024
    packing: bool = False
    assistant_only: bool | None = None
    completion_only: bool | None = None
    chat_template: str | None = None
    gradient_checkpointing: bool = True
    dtype: Dtype = "auto"
    seed: int = 42
    logging_steps: int = 1
    eval_steps: int | None = None
    save_steps: int = 100
    save_limit: int = 2

    def __post_init__(self) -> None:
        """Refuse what makes no sense, by the option's name."""
        if not isinstance(self.target_modules, str):
            # JSON has lists only, and options are compared.
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.target_parameters is not None:
            object.__setattr__(self, "target_parameters", tuple(self.target_parameters))
        for name, choices in (
            ("dtype", Dtype),
            ("lr_schedule", Schedule),
            ("init_lora_weights", InitLora),
            ("pager", Pager),
        ):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {known}")
        if self.optimizer_bits not in (8, 32):
            raise ValueError(f"optimizer_bits is {self.optimizer_bits!r}; use 8 or 32")
        for name in (
            "r",
            "batch_size",
            "gradient_accumulation",
            "max_length",
            "logging_steps",
            "save_steps",
            "save_limit",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_steps", "eval_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("epochs", "lr", "max_grad_norm", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
