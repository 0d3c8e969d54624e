"""Models of transformers from our folders, without bitsandbytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fourbit._core import CheckpointError
from fourbit.integrations.versions import require
from fourbit.model_io import load


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a converted folder into its transformers model, tensor by tensor.

    Quantized layers become `Linear4bit`, the model is in eval mode, and nothing larger than one
    tensor is held beside it. Folders of bitsandbytes (nf4, fp4; any storage dtype) work alike.

    Args:
        folder: what ``fourbit.convert``, ``fourbit.save`` or transformers with bitsandbytes wrote.
        dtype: of everything that is not quantized, and so of the computation; by default the
            configuration's.
        device: where the model goes.

    Returns:
        The model, of the class that the configuration names.

    Raises:
        FileNotFoundError: without such a folder or its ``config.json``.
        CheckpointError: naming what is damaged or does not fit, or a later version of the format.
        ValueError: for a folder that is quantized by another method, or in 8 bits.
        ImportError: without transformers, or with one that is too old.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the path of a converted checkpoint")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no config.json, so its model class is unknown; use fourbit.load"
        )
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError(
            f'from_pretrained needs {error.name}; install it with pip install "fourbit[hf]"'
        ) from None
    for library in ("transformers", "accelerate"):
        require(library)
    config = transformers.AutoConfig.from_pretrained(path)
    if not hasattr(config, "quantization_config"):
        raise CheckpointError(
            f"{path} is not quantized; convert it with fourbit.convert, "
            "or load it with transformers"
        )
    _check_readable(path, config.quantization_config)
    # Ours is the only code that reads the packed weights; transformers must not look for its own.
    del config.quantization_config
    dtype = dtype or _config_dtype(config)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Buffers are computed, not stored, and so must not be on the meta device.
        with init_empty_weights(include_buffers=False):
            model = _model_class(transformers, config)(config)
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    load(model, path, device=device)
    model.to(device)
    model.config._name_or_path = str(path)
    model.config.dtype = dtype
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def _check_readable(path: Path, quantization: Any) -> None:
    from fourbit.integrations.transformers.config import NF4Config

    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    try:
        NF4Config.from_dict(fields)
    except (CheckpointError, ValueError, TypeError) as error:
        raise type(error)(f"{path / 'config.json'}: {error}") from None


def _config_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _model_class(transformers: Any, config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM.from_config
