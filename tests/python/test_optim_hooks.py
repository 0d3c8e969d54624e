"""`PagedAdamW` by the hooks that trainers have: transformers, TRL, accelerate.

Every run is stopped and resumed once, and must end in the bits of the run that was not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
import trl
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fourbit
from fourbit import PagedAdamW
from lora_models import VOCABULARY, llama

STEPS, SAVED = 6, 3


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    # Tiny layers on several threads wait for each other longer than they compute.
    threads(1)


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Any:
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not before:
        datasets.enable_progress_bars()


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def assert_same_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Of two optimizers, as ``state_dict`` gives them."""
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert_same_tensors(state, other["state"][index])


def bare(optimizer: Any) -> PagedAdamW:
    """What accelerate has wrapped."""
    assert type(optimizer) is accelerate.optimizer.AcceleratedOptimizer
    assert type(optimizer.optimizer) is PagedAdamW
    return optimizer.optimizer


# --- transformers and TRL -------------------------------------------------------------------------


def common(folder: Path) -> dict[str, Any]:
    """Arguments of both trainers; decay of weights alone, as the trainer groups them."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-9,  # the optimizer's own counts
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def plain_trainer(folder: Path, options: dict[str, Any]) -> transformers.Trainer:
    """All weights of a random model, with dropout, so that random states must be resumed too."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, VOCABULARY, (40, 12), generator=generator).tolist()
    return transformers.Trainer(
        model=llama(attention_dropout=0.1),
        args=transformers.TrainingArguments(**common(folder)),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
        optimizer_cls_and_kwargs=(PagedAdamW, options),
    )


def sft_trainer(folder: Path, options: dict[str, Any], base: Path) -> trl.SFTTrainer:
    """Adapters of PEFT on a 4-bit model."""
    model = fourbit.quantize_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    )
    texts = [f"Question {i}: what is {i} + {i}? Answer: {2 * i}." for i in range(40)]
    lora = peft.LoraConfig(r=64, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**common(folder), max_length=64),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        peft_config=lora,
        optimizer_cls_and_kwargs=(PagedAdamW, options),
    )


def trained(trainer: Any) -> dict[str, Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# trl sets an option of transformers that was renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("bits", [8, 32])
def test_trainers_save_and_resume(kind: str, bits: int, plain_folder: Path, tmp_path: Path) -> None:
    def build(folder: Path) -> Any:
        options = {"lr": 1e-2, "betas": (0.9, 0.98), "state_bits": bits}
        if kind == "Trainer":
            return plain_trainer(folder, options)
        return sft_trainer(folder, options, plain_folder)

    whole = build(tmp_path / "whole")
    before = {name: value.clone() for name, value in trained(whole).items()}
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1
    optimizer = bare(whole.optimizer)
    assert optimizer.defaults["lr"] == 1e-2
    assert {group["state_bits"] for group in optimizer.param_groups} == {bits}
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.9, 0.98)}
    decays = [group["weight_decay"] for group in optimizer.param_groups if group["params"]]
    assert decays == ([0.1, 0.0] if kind == "Trainer" else [0.1]), "norms and biases have none"
    widths = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert (torch.uint8 in widths) == (bits == 8)
    assert all(state["step"] == STEPS for state in optimizer.state.values())

    resumed = build(tmp_path / "resumed")
    for value in trained(resumed).values():
        value.fill_(0.5)  # the checkpoint's must take their place
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert resumed.state.global_step == STEPS
    weights = trained(resumed)
    assert_same_tensors(weights, trained(whole))
    assert any(not torch.equal(value, before[name]) for name, value in weights.items())
    assert_same_states(bare(resumed.optimizer).state_dict(), optimizer.state_dict())
    files = [
        torch.load(tmp_path / run / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
        for run in ("whole", "resumed")
    ]
    assert_same_states(*files)


# --- accelerate -----------------------------------------------------------------------------------


class Prepared:
    """A run prepared by accelerate, in steps of two batches."""

    def __init__(self, bits: int, *, seed: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Dropout(0.1), nn.Linear(80, 64))
        optimizer = PagedAdamW(model.parameters(), lr=1e-2, state_bits=bits)  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        data = torch.randn(96, 64, generator=torch.Generator().manual_seed(9))
        loader = DataLoader(data, batch_size=8)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, schedule
        )
        self.losses: list[float] = []

    def epoch(self) -> None:
        for inputs in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = (self.model(inputs) - inputs).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                self.losses.append(loss.item())


@pytest.fixture
def _fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize("bits", [8, 32])
def test_accelerate_prepares_saves_and_loads(bits: int, tmp_path: Path) -> None:
    whole = Prepared(bits, seed=4)
    optimizer = bare(whole.optimizer)
    whole.epoch()
    assert all(state["step"] == 6 for state in optimizer.state.values())
    whole.accelerator.save_state(str(tmp_path / "state"))
    for _ in range(2):
        whole.epoch()
    assert whole.losses[-1] < 0.8 * whole.losses[0]

    resumed = Prepared(bits, seed=5)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    for _ in range(2):
        resumed.epoch()
    assert resumed.losses == whole.losses[12:]
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert_same_states(bare(resumed.optimizer).state_dict(), optimizer.state_dict())
    assert all(state["step"] == 18 for state in bare(resumed.optimizer).state.values())
