"""The model of 0.5 billion parameters that is trained and asked on a CPU, in every format."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fourbit

KINDS = ("fourbit", "bf16", "bitsandbytes")
SHAPE = {"hidden": 1280, "inner": 3456, "layers": 20, "heads": 20, "vocabulary": 32000}
SMALL = {"hidden": 128, "inner": 192, "layers": 2, "heads": 4, "vocabulary": 512}


def llama(*, small: bool) -> Any:
    """Random bf16 weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SMALL if small else SHAPE
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        eos_token_id=None,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def in_format(model: Any, kind: str) -> Any:
    """The same model with its linear layers (not its head) in that format, in place."""
    if kind == "fourbit":
        return fourbit.quantize_model(model)
    if kind == "bitsandbytes":
        return _in_bitsandbytes(model)
    return model


def linear_elements(model: Any) -> int:
    """Numbers in the weights that are quantized."""
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return sum(layer.in_features * layer.out_features for layer in layers)


def _in_bitsandbytes(model: Any) -> Any:
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is head:
                continue
            layer = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            layer.weight = bnb.nn.Params4bit(
                child.weight.data, requires_grad=False, quant_type="nf4", blocksize=64
            )
            setattr(parent, name, layer.to("cpu").train(child.training))
    return model
