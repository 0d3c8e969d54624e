"""`FourbitBackend`: how PEFT's methods other than LoRA read and write the weight of a layer."""

from __future__ import annotations

from typing import Any

from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor

from fourbit.linear import Linear4bit
from fourbit.lora.loftq import requantize


class FourbitBackend(QuantizationBackend):  # type: ignore[misc]
    """What BOFT, MiSS, OFT, SHiRA and VeRA need of a `Linear4bit`.

    Their layers multiply with the dequantized weight where the method asks for it, and `merge`
    requantizes in the layer's own format. `unmerge` is theirs: it computes back from the merged
    weight, and is as exact as 4 bits are. LoRA has a layer of its own, which keeps the bytes.
    """

    layer_type = "linear"
    supports_merge = True
    backend_name = "fourbit"

    def get_base_weight(self, base_layer: Linear4bit) -> Tensor:
        """The weight, in the dtype that it had before: a new tensor [out_features, in_features]."""
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantize a weight [out_features, in_features] in the format that the layer has.

        Raises:
            NonFiniteError: for NaN and infinity; the layer is as it was.
        """
        base: Linear4bit = peft_layer.get_base_layer()
        before = base.quantized()
        base.set_quantized(requantize(weight_data.to(base.weight.device), before))
