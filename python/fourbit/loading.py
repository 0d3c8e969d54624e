"""Model folders: what kind a folder is, and the model and tokenizer in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

FolderKind = Literal["4bit", "plain"]


def folder_kind(folder: Path) -> FolderKind:
    """Whether a model folder is in 4 bits (ours, or one of bitsandbytes) or not quantized.

    Raises:
        FileNotFoundError: if there is no such folder, or no config in it.
        ValueError: for a broken config, or another quantization.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken: {error}") from None
    if quantization is None:
        return "plain"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    # Codebooks that bitsandbytes does not know go under our own name.
    ours = method == "fourbit"
    if not ours and (method != "bitsandbytes" or not quantization.get("load_in_4bit")):
        raise ValueError(f"{folder} is quantized by another method ({method}), which is not read")
    return "4bit"


def require_quantized(folder: Path) -> None:
    """Raise ``ValueError``, with what to do, unless a folder is in 4 bits."""
    if folder_kind(folder) == "plain":
        target = f"{str(folder).rstrip('/')}-4bit"
        raise ValueError(
            f"{folder} is not quantized; run `fourbit convert {folder} {target}` first, then use "
            f"{target}"
        )


def load_model(folder: Path, dtype: Any = None) -> Any:
    """The transformers model of a folder, 4-bit or plain, in eval mode on the CPU.

    Args:
        folder: of the model.
        dtype: of what is not quantized, and so of the computation; None keeps the folder's.
    """
    if folder_kind(folder) == "4bit":
        from fourbit.integrations.transformers.folders import from_pretrained

        return from_pretrained(folder, dtype=dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it is broken.
    """
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        raise FileNotFoundError(f"{folder} holds no tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder, such as an adapter's, brings a tokenizer of its own."""
    return (folder / "tokenizer_config.json").is_file()
