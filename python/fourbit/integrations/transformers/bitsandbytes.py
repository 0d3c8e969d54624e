"""Our quantizer, told what to do by a ``BitsAndBytesConfig``."""

from __future__ import annotations

import warnings
from copy import copy
from typing import Any

import torch

from fourbit.integrations.transformers.config import NF4Config
from fourbit.integrations.transformers.quantizer import FourbitQuantizer

_said: set[str] = set()


class BitsAndBytesQuantizer(FourbitQuantizer):
    """What loads models for a ``BitsAndBytesConfig`` after `fourbit.replace_bitsandbytes`."""

    def settings(self, quantization_config: Any) -> NF4Config:
        """The given config as an `NF4Config`; it stays the model's own."""
        self.given = quantization_config
        storage = getattr(quantization_config, "bnb_4bit_quant_storage", torch.uint8)
        if storage != torch.uint8 and not self.pre_quantized and "storage" not in _said:
            _said.add("storage")
            warnings.warn(
                f"bnb_4bit_quant_storage={storage} changes nothing: bytes are stored as bytes, "
                "which FSDP2 shards as they are",
                stacklevel=2,
            )
        return NF4Config.from_bitsandbytes(quantization_config)

    def describe(self, found: NF4Config) -> Any:
        """A ``BitsAndBytesConfig``, with which bitsandbytes reads what is saved.

        It cannot read a model whose experts are quantized, which keeps our config.
        """
        if found.experts:
            return found
        config = copy(self.given)
        config.bnb_4bit_quant_type = found.codebook
        config.bnb_4bit_use_double_quant = found.double_quant
        config.bnb_4bit_quant_storage = torch.uint8
        config.llm_int8_skip_modules = found.skip_modules
        return config

    def update_device_map(self, device_map: Any) -> Any:
        """Without a device map the model goes where that of bitsandbytes goes."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
