"""How transformers comes to know of fourbit: its tables of configs and quantizers.

Which of the two reads a folder in bitsandbytes' 4-bit layout: fourbit, if fourbit wrote it
(``fourbit.convert``, ``fourbit.save``, ``save_pretrained``), if the user passes an `NF4Config`, or
if bitsandbytes is not installed; else bitsandbytes, and always with a ``BitsAndBytesConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from importlib.util import find_spec
from typing import Any

from fourbit.integrations.transformers.config import METHOD, NF4Config, wrote

_MERGE = "merge_quantization_configs"


def register() -> None:
    """Add fourbit to the tables; once is enough.

    Raises:
        RuntimeError: naming what this version of transformers does not have.
    """
    import transformers
    from transformers.quantizers import auto

    from fourbit.integrations.transformers.quantizer import FourbitQuantizer

    missing = [
        name
        for owner, name in (
            (auto, "AUTO_QUANTIZER_MAPPING"),
            (auto, "AUTO_QUANTIZATION_CONFIG_MAPPING"),
            (getattr(auto, "AutoHfQuantizer", None), _MERGE),
        )
        if not hasattr(owner, name)
    ]
    if missing:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no {missing[0]} in its quantizers; "
            "use a version that fourbit supports"
        )
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = NF4Config
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = FourbitQuantizer
    if not hasattr(getattr(auto.AutoHfQuantizer, _MERGE), "_fourbit_original"):
        _wrap_merge(auto.AutoHfQuantizer)


def unregister() -> None:
    """Take fourbit out of the tables again."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    original = getattr(getattr(auto.AutoHfQuantizer, _MERGE), "_fourbit_original", None)
    if original is not None:
        setattr(auto.AutoHfQuantizer, _MERGE, original)


def _wrap_merge(owner: Any) -> None:
    """Before a folder's config and the user's meet: say which folders are ours."""
    original = owner.__dict__[_MERGE]

    @wraps(original.__func__)
    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if isinstance(quantization_config, Mapping):
            if _is_ours(quantization_config, given):
                quantization_config = NF4Config.from_dict(quantization_config)
            elif isinstance(given, NF4Config):
                method = quantization_config.get("quant_method")
                if quantization_config.get("load_in_8bit"):
                    method = "bitsandbytes in 8 bits"
                raise ValueError(
                    f"the model is quantized already, by {method}, which fourbit does not read; "
                    "load it without NF4Config, or load one in 16 bits"
                )
        return original.__func__(cls, quantization_config, given)

    merge._fourbit_original = original  # type: ignore[attr-defined]
    setattr(owner, _MERGE, classmethod(merge))


def _is_ours(folder: Mapping[str, Any], given: Any) -> bool:
    if folder.get("quant_method") == METHOD:
        return True
    if not folder.get("load_in_4bit"):
        return False
    if given is not None:
        return isinstance(given, NF4Config)
    return wrote(folder) or find_spec("bitsandbytes") is None
