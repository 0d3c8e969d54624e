"""Small mixtures of experts, as transformers makes them."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
SETTINGS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        # The second layer is a plain one.
        "mlp_only_layers": [1],
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
}
"""What each family needs beside the sizes that they share."""


def moe(family: str, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, **own: Any) -> Any:
    """A random model of two blocks in eval mode."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        **SETTINGS[family],
        **own,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def tokens(seed: int = 0) -> Tensor:
    """Input ids [2, 12]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (2, 12), generator=generator)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(tokens()).logits
    return output
