"""`replace_bitsandbytes`: scripts written for bitsandbytes run on fourbit."""

from __future__ import annotations

from fourbit.integrations.patching import Patches

_patches = Patches()


def replace_bitsandbytes() -> None:
    """Let what transformers and its Trainer do with bitsandbytes in 4 bits be done by fourbit.

    bitsandbytes need not be installed; where it is, it is not used. This call may stand anywhere
    before the model is loaded. Then:

    - ``BitsAndBytesConfig(load_in_4bit=True, ...)`` loads `Linear4bit` layers, from 16-bit folders
      and from folders of bitsandbytes, onto the current GPU unless ``device_map`` says otherwise.
      ``save_pretrained`` writes a folder that bitsandbytes reads. ``bnb_4bit_compute_dtype`` is not
      needed: a layer computes in the dtype of its input. ``model.is_loaded_in_4bit`` is not set,
      because other libraries import bitsandbytes when it is, and TRL casts adapters to 16 bits.
    - ``optim="paged_adamw_8bit"``, ``"paged_adamw_32bit"``, ``"adamw_8bit"`` and
      ``"adamw_bnb_8bit"`` are `PagedAdamW`.
    - ``prepare_model_for_kbit_training``, ``get_peft_model``, ``PeftModel.from_pretrained`` and
      ``print_trainable_parameters`` of PEFT know 4-bit layers with or without this call, as soon as
      fourbit is imported. The first casts no parameter to float32, which would cost memory.

    Options without a meaning here are named in a warning, once each. A script that imports
    bitsandbytes itself still needs it. `restore_bitsandbytes` takes everything back.

    Raises:
        ImportError: without transformers, or with a version of it that this does not fit.
    """
    if _patches:
        return
    try:
        import transformers
        from transformers.quantizers import auto
    except ImportError as error:
        raise ImportError(
            f'replace_bitsandbytes needs {error.name}; install it with pip install "fourbit[hf]"'
        ) from None
    from fourbit.integrations.trainer import replace_optimizers
    from fourbit.integrations.transformers.bitsandbytes import BitsAndBytesQuantizer

    quantizers = getattr(auto, "AUTO_QUANTIZER_MAPPING", {})
    try:
        for method in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
            if method not in quantizers:
                raise ImportError(
                    f"transformers {transformers.__version__} has no quantizer {method}; "
                    "use a version that fourbit supports"
                )
            _patches.entry(quantizers, method, BitsAndBytesQuantizer)
        replace_optimizers(_patches)
    except BaseException:
        _patches.undo()
        raise


def restore_bitsandbytes() -> None:
    """Take `replace_bitsandbytes` back. Models that were loaded meanwhile stay as they are."""
    _patches.undo()
