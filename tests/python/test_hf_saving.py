"""``save_pretrained`` of models that were quantized without transformers' loader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import fourbit
from fourbit.integrations.transformers import methods
from lora_models import llama
from moe_models import moe


def make(kind: str) -> Any:
    return llama(torch.bfloat16) if kind == "Llama" else moe(kind)


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("config.json", "model.safetensors")]


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_what_was_quantized_in_memory_is_loaded_again(kind: str, tmp_path: Path) -> None:
    model = fourbit.quantize_model(make(kind))
    model.save_pretrained(tmp_path / "memory")
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    state = model.state_dict()
    assert state.keys() == by_transformers.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in by_transformers.state_dict().items())
    by_transformers.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "memory")
    fourbit.from_pretrained(tmp_path / "memory").save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "memory")


def test_plain_models_are_saved_as_without_us(tmp_path: Path) -> None:
    methods.register()  # it is registered already
    ours = PreTrainedModel.save_pretrained
    model = llama()
    model.save_pretrained(tmp_path / "with")
    methods.unregister()
    try:
        assert PreTrainedModel.save_pretrained is ours.__wrapped__
        model.save_pretrained(tmp_path / "without")
    finally:
        methods.register()
    assert files(tmp_path / "with") == files(tmp_path / "without")
