"""PEFT on 4-bit layers. Nothing has to be called: importing fourbit is enough.

===========  =====================================================================================
``hook``     what is changed in PEFT, and how it is taken back
``support``  what LoRA can be on 4-bit layers and experts; the rest is refused by name
``backend``  how methods other than LoRA read and write a weight
``layer``    `LoraLinear4bit`: LoRA, rsLoRA, PiSSA, OLoRA on a `Linear4bit`; merge, unmerge
``dora``     the same with learned row norms
``experts``  `ParamWrapper`: LoRA and rsLoRA on 4-bit weights of experts; merge, unmerge
``loftq``    adapters that start as the correction of the base's rounding
===========  =====================================================================================
"""

from fourbit.integrations.peft.hook import install, uninstall

__all__ = ["install", "uninstall"]
