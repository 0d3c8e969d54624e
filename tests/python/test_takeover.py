"""`replace_bitsandbytes`: scripts for bitsandbytes on fourbit, and everything back again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments
from transformers.quantizers import auto

import fourbit
from conftest import REPOSITORY
from fourbit import Linear4bit, PagedAdamW
from fourbit.integrations import bitsandbytes as takeover
from fourbit.integrations.transformers import bitsandbytes as quantizer
from fourbit.integrations.transformers import config as nf4_config
from lora_models import tokens

CHILD = Path(__file__).with_name("takeover_child.py")


def walk_through(folder: Path, steps: int) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), str(steps)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def walked(tmp_path_factory: Any) -> tuple[Path, Any]:
    """Both walk-throughs, with bitsandbytes out of sight."""
    folder = tmp_path_factory.mktemp("takeover")
    return folder, walk_through(folder, 4)


@pytest.fixture
def replaced() -> Iterator[None]:
    fourbit.replace_bitsandbytes()
    yield
    fourbit.restore_bitsandbytes()


def test_the_walk_through_of_sfttrainer(walked: tuple[Path, Any]) -> None:
    found = walked[1]["sft"]
    assert found["layers"] == 28
    assert found["adapter"] == 64
    assert (found["optimizer"], found["state_bits"]) == ("PagedAdamW", 32)
    assert len(found["losses"]) == 2


def check_faq(found: Any) -> None:
    # No parameter was cast to float32.
    assert found["dtypes"] == ["torch.bfloat16", "torch.uint8"]
    assert (found["optimizer"], found["state_bits"]) == ("PagedAdamW", 8)
    assert found["events"] == 1
    dense = AutoModelForCausalLM.from_pretrained(REPOSITORY / "examples" / "base_model")
    trained, counted = found["counted"]
    assert trained == 4 * 16 * (256 + 256 + 256 + 128)  # q_proj and v_proj of four blocks
    assert counted == dense.num_parameters() + trained
    assert found["reloaded"] == found["after"]
    assert found["same_scores"]
    assert found["learned"]


def test_the_walk_through_of_questions_and_answers(walked: tuple[Path, Any]) -> None:
    found = walked[1]["faq"]
    check_faq(found)
    assert len(found["losses"]) == 4


@pytest.mark.slow
def test_the_whole_walk_through(tmp_path: Path) -> None:
    found = walk_through(tmp_path, 80)["faq"]
    check_faq(found)
    losses = found["losses"]
    assert len(losses) == 80
    assert sum(losses[-10:]) < sum(losses[:10]) - 1
    assert found["after"] != found["before"]


def test_what_was_saved_is_read_by_both(walked: tuple[Path, Any], replaced: None) -> None:
    folder = walked[0]
    expected = torch.load(folder / "logits.pt")
    ids = torch.arange(24).view(2, 12)
    ours = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert isinstance(ours.model.layers[0].mlp.up_proj, Linear4bit)
    assert isinstance(ours.config.quantization_config, BitsAndBytesConfig)
    assert ours.config.quantization_config.bnb_4bit_use_double_quant
    fourbit.restore_bitsandbytes()
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, expected)
        # Its products on the CPU are made in another order, in bfloat16.
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0.05, atol=0.1)


def upstream() -> list[Any]:
    return [
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"],
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"],
        vars(transformers.Trainer)["get_optimizer_cls_and_kwargs"],
    ]


def test_everything_comes_back() -> None:
    before = upstream()
    keys = list(auto.AUTO_QUANTIZER_MAPPING)
    for _ in range(2):
        fourbit.replace_bitsandbytes()
        fourbit.replace_bitsandbytes()
        assert not any(a is b for a, b in zip(upstream(), before, strict=True))
        fourbit.restore_bitsandbytes()
        fourbit.restore_bitsandbytes()
        assert all(a is b for a, b in zip(upstream(), before, strict=True))
        assert list(auto.AUTO_QUANTIZER_MAPPING) == keys


def arguments(tmp_path: Path, optim: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path), optim=optim, learning_rate=3e-4, adam_beta2=0.95, use_cpu=True
    )


@pytest.mark.parametrize(
    ("optim", "bits", "pager"),
    [
        ("paged_adamw_8bit", 8, "auto"),
        ("paged_adamw_32bit", 32, "auto"),
        ("adamw_8bit", 8, "resident"),
        ("adamw_bnb_8bit", 8, "resident"),
    ],
)
@pytest.mark.usefixtures("replaced")
def test_optimizers(optim: str, bits: int, pager: str, tmp_path: Path) -> None:
    choose = transformers.Trainer.get_optimizer_cls_and_kwargs
    made, options = choose(arguments(tmp_path, optim))
    assert made is PagedAdamW
    optimizer = made([torch.nn.Parameter(torch.zeros(3))], **options)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["state_bits"]) == (3e-4, (0.9, 0.95), bits)
    assert optimizer.pager == pager
    assert choose(arguments(tmp_path, "adamw_torch"))[0] is torch.optim.AdamW


@pytest.mark.parametrize("optim", ["paged_lion_8bit", "ademamix_8bit", "rmsprop_bnb_32bit"])
@pytest.mark.usefixtures("replaced")
def test_optimizers_that_only_bitsandbytes_has(optim: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f'optim="{optim}" is an optimizer of bitsandbytes'):
        transformers.Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim))


@pytest.mark.usefixtures("replaced")
def test_eight_bits_are_refused(plain_folder: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"asks for 8 bits \(load_in_8bit\).*use load_in_4bit"):
        AutoModelForCausalLM.from_pretrained(plain_folder, quantization_config=config)


@pytest.mark.usefixtures("replaced")
def test_options_without_a_meaning_are_named_once(
    plain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_config, "_said", set())
    monkeypatch.setattr(quantizer, "_said", set())
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_threshold=4.0,
        llm_int8_has_fp16_weight=True,
        llm_int8_skip_modules=["lm_head", "up_proj"],
        bnb_4bit_quant_storage="bfloat16",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model = AutoModelForCausalLM.from_pretrained(plain_folder, quantization_config=config)
    said = [str(warning.message) for warning in caught]
    for option in ("llm_int8_threshold", "llm_int8_has_fp16_weight", "bnb_4bit_quant_storage"):
        assert sum(text.startswith(option) for text in said) == 1
    # Those that have one.
    block = model.model.layers[0]
    assert block.mlp.down_proj.codebook.name == "fp4"
    assert not block.mlp.down_proj.double_quant
    assert type(block.mlp.up_proj) is torch.nn.Linear
    assert model(tokens()).logits.isfinite().all()
    assert not hasattr(model, "is_loaded_in_4bit")


def test_a_version_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = upstream()
    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda self: None)
    with pytest.raises(ImportError, match=rf"transformers {transformers.__version__} has no"):
        fourbit.replace_bitsandbytes()
    assert upstream()[:2] == before[:2]
    assert not takeover._patches
