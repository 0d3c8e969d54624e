"""``model.save_pretrained()`` of models that fourbit quantized, and not transformers' loader.

A model of `fourbit.quantize_model`, `fourbit.load` or `fourbit.from_pretrained` has no quantizer
that transformers would ask what to write, and writes the bytes of its memory, which nothing loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fourbit.experts import experts_modules
from fourbit.integrations.transformers.config import NF4Config
from fourbit.integrations.transformers.models import described, quantized_layers
from fourbit.integrations.transformers.quantizer import FourbitQuantizer
from fourbit.lora.attach import has_adapter

_CONFIG = "quantization_config"


@contextmanager
def with_quantizer(model: Any) -> Iterator[None]:
    """Give a model, meanwhile, the quantizer that it would have if transformers had loaded it."""
    packed = quantized_layers(model) or experts_modules(model)
    # With adapters of ours inside, what a Trainer writes is a state dict to go on from.
    if not packed or getattr(model, "hf_quantizer", None) is not None or has_adapter(model):
        yield
        return
    config = described(NF4Config(), model)
    before = vars(model.config).get(_CONFIG)
    model.hf_quantizer = FourbitQuantizer(config, pre_quantized=True)
    setattr(model.config, _CONFIG, config)
    try:
        yield
    finally:
        del model.hf_quantizer
        delattr(model.config, _CONFIG)
        if before is not None:
            setattr(model.config, _CONFIG, before)
