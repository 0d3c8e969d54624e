"""Small models for the tests of adapters, and what is done to them again and again."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

from fourbit import Linear4bit
from fourbit.lora import lora_modules

VOCABULARY = 96


def llama(dtype: torch.dtype = torch.float32, *, seed: int = 0, **overrides: Any) -> Any:
    """A random Llama of two blocks in eval mode; biases in attention, as some models have."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "attention_bias": True,
        # The default of 0.02 would leave the residual stream to hide every difference.
        "initializer_range": 0.2,
        **overrides,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.to(dtype).eval()


def quantize_linears(model: nn.Module, **options: Any) -> None:
    """Every linear layer but the head in 4 bits, in place."""
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Linear4bit.from_linear(layer, **options))


def tokens(seed: int = 0) -> Tensor:
    """Input ids [2, 12]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (2, 12), generator=generator)


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(tokens() if ids is None else ids).logits
    return output


def shake(model: nn.Module, *, seed: int = 1, size: float = 0.05) -> None:
    """Random adapters: as added they would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_modules(model).values():
        for part in (layer.lora_A.weight, layer.lora_B.weight):
            with torch.no_grad():
                part.copy_(torch.randn(part.shape, generator=generator) * size)
        magnitude = layer.lora_magnitude_vector
        if magnitude is not None:
            with torch.no_grad():
                magnitude.mul_(1 + 0.2 * torch.rand(magnitude.shape, generator=generator))


def relative(found: Tensor, expected: Tensor) -> float:
    """``‖found - expected‖ / ‖expected‖``."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()
