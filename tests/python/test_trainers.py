"""SFTTrainer with 4-bit models, however it comes by them: object, folder, quantization_config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
import trl

import fourbit
from fourbit import Linear4bit, PagedAdamW
from fourbit.integrations.peft.layer import LoraLinear4bit
from moe_models import moe, tokens

# trl sets an option of transformers that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated")


def trainer(source: str, plain: Path, folder: Path, **options: Any) -> trl.SFTTrainer:
    """Two steps in bfloat16 with checkpointing, on the model that the source names."""
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
        max_length=32,
        report_to="none",
        model_init_kwargs=None if source == "object" else {"dtype": "bfloat16"},
    )
    model: Any = str(plain)
    if source == "object":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
        model = fourbit.quantize_model(loaded)
    elif source == "4-bit folder":
        model = str(plain.with_name("four-bit"))
    elif source == "config":
        options["quantization_config"] = fourbit.NF4Config()
    texts = [f"Question {i}: what is {i} + {i}? Answer: {2 * i}." for i in range(8)]
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=transformers.AutoTokenizer.from_pretrained(plain),
        peft_config=peft.LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"),
        optimizer_cls_and_kwargs=(PagedAdamW, {"lr": 1e-2}),
        **options,
    )


def losses(run: trl.SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trained(run: trl.SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: part for name, part in run.model.named_parameters() if part.requires_grad}


@pytest.mark.usefixtures("four_bit_folder")
def test_every_source_trains_alike_and_resumes(plain_folder: Path, tmp_path: Path) -> None:
    runs = {}
    for source in ("object", "4-bit folder", "config"):
        runs[source] = run = trainer(source, plain_folder, tmp_path / source)
        layers = [m for m in run.model.modules() if isinstance(m, LoraLinear4bit)]
        assert len(layers) == 14
        assert type(layers[0].base_layer) is Linear4bit
        assert layers[0].lora_A["default"].weight.dtype == torch.float32
        run.train()
        assert losses(run) == losses(runs["object"])
    assert all(part.any() for part in trained(run).values())
    resumed = trainer("config", plain_folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "config" / "checkpoint-1"))
    expected = trained(runs["config"])
    assert trained(resumed).keys() == expected.keys()
    assert all(torch.equal(part, expected[name]) for name, part in trained(resumed).items())


@pytest.mark.parametrize("loader", ["transformers", "fourbit"])
def test_our_adapters_on_experts_resume(loader: str, tmp_path: Path) -> None:
    moe("Mixtral", torch.float32).save_pretrained(tmp_path / "plain")
    fourbit.convert(tmp_path / "plain", tmp_path / "packed")

    def run(**options: Any) -> dict[str, torch.Tensor]:
        if loader == "fourbit":
            model = fourbit.from_pretrained(tmp_path / "packed")
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        fourbit.add_lora(model, r=2, lora_dropout=0.0, seed=0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            save_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
        )
        examples = [{"input_ids": row, "labels": row} for row in tokens()]
        transformers.Trainer(model, arguments, train_dataset=examples).train(**options)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    expected = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(part, expected[name]) for name, part in resumed.items())


def test_a_model_without_adapters_is_refused(plain_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain_folder, quantization_config=fourbit.NF4Config()
    )
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments)
