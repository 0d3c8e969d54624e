"""Low-rank adapters on a frozen base, dense or in 4 bits (LoRA, rsLoRA, DoRA, LoftQ).

Data flows through the modules in this order:

==============  ==================================================================================
``config``      what an adapter is made of; ``adapter_config.json`` of PEFT, both ways
``layer``       `LoraLinear`: a frozen layer with an adapter
``experts``     `LoraExperts`: a frozen module of experts with adapters
``targets``     which layers of a model get an adapter
``loftq``       adapters that start as the correction of the base's rounding
``attach``      `add_lora`, `remove_lora` and what looks at a model with adapters
``files``       `save_adapter`, `load_adapter`; ``experts_files``: how files have experts' adapters
``merge``       `merge`, `unmerge`
==============  ==================================================================================
"""

from fourbit.lora.attach import (
    AdapterSize,
    LoraLayer,
    adapter_size,
    add_lora,
    lora_modules,
    remove_lora,
)
from fourbit.lora.config import AdapterConfig
from fourbit.lora.experts import ExpertsLora, LoraExperts, merged_experts
from fourbit.lora.files import load_adapter, save_adapter
from fourbit.lora.layer import LoraLinear, merged_weight
from fourbit.lora.merge import LayerMerge, MergeReport, merge, unmerge

__all__ = [
    "AdapterConfig",
    "AdapterSize",
    "ExpertsLora",
    "LayerMerge",
    "LoraExperts",
    "LoraLayer",
    "LoraLinear",
    "MergeReport",
    "adapter_size",
    "add_lora",
    "load_adapter",
    "lora_modules",
    "merge",
    "merged_experts",
    "merged_weight",
    "remove_lora",
    "save_adapter",
    "unmerge",
]
