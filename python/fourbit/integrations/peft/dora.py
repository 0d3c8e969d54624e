"""DoRA (arXiv 2402.09353) as a variant of PEFT's LoRA on a `Linear4bit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from fourbit.lora.dora import add_dora, row_norms
from fourbit.lora.layer import base_product

if TYPE_CHECKING:
    from fourbit.integrations.peft.layer import LoraLinear4bit


class DoraVariant(LoraVariant):  # type: ignore[misc]
    """DoRA by our own means: nothing is deep-copied, and norms are float32."""

    @staticmethod
    def init(module: LoraLinear4bit, adapter_name: str, **kwargs: Any) -> None:
        """Magnitudes are the present row norms, so that DoRA starts as plain LoRA."""
        names = module.adapter_layer_names
        if "lora_magnitude_vector" not in names:
            module.adapter_layer_names = (*names, "lora_magnitude_vector")
        holder = DoraLinearLayer(fan_in_fan_out=False)
        holder.weight = nn.Parameter(torch.empty(module.out_features, device="meta"))
        module.lora_magnitude_vector[adapter_name] = holder
        reset_magnitude(module, adapter_name)

    @staticmethod
    def forward(
        module: LoraLinear4bit, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The output with DoRA, in the widest dtype of all."""
        dropout = module.lora_dropout[active_adapter]
        dropped = dropout(x)
        base = module.get_base_layer()
        # Dropout acts on the whole input of the direction, that of the frozen weight included.
        if module.training and isinstance(dropout, nn.Dropout):
            direction = base_product(base, dropped)
        else:
            direction = result if base.bias is None else result - base.bias
        down = module.lora_A[active_adapter](dropped)
        side = module.lora_B[active_adapter](down) * module.scaling[active_adapter]
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude / module.weight_norm(active_adapter)
        return add_dora(result, direction, side, factor)

    @staticmethod
    def merge_safe(module: LoraLinear4bit, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the adapter, float32, in the memory of `orig_weight`."""
        norms = row_norms(module.add_delta(module.unmerged_weight(), active_adapter))
        magnitude = module.lora_magnitude_vector[active_adapter].weight.detach().float()
        weight = module.add_delta(orig_weight, active_adapter)
        return weight.mul_((magnitude / norms)[:, None])


def reset_magnitude(module: LoraLinear4bit, adapter_name: str) -> None:
    """Set DoRA's magnitudes to the present row norms, where the adapter has any."""
    if adapter_name not in module.lora_magnitude_vector:
        return
    holder = module.lora_magnitude_vector[adapter_name]
    if module.lora_A[adapter_name].weight.is_meta:
        return
    with torch.no_grad():
        norms = row_norms(module.add_delta(module.unmerged_weight(), adapter_name))
    holder.weight = nn.Parameter(norms, requires_grad=holder.weight.requires_grad)
