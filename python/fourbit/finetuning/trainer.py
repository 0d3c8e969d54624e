"""TRL's SFTTrainer for our own adapters: checkpoints hold the adapter, not the model.

Private parts of transformers (5.0 to 5.23 were read) that are replaced: ``Trainer._save``, which
would write all weights, ``Trainer._load_from_checkpoint``, which would look for them,
``Trainer._save_checkpoint``, whose errors do not say what to do, and
``Trainer._save_optimizer_and_scheduler`` and ``Trainer._load_optimizer_and_scheduler``, which would
pickle the optimizer's state. Of ``transformers.trainer_pt_utils``, ``reissue_pt_warnings`` is used
as they use it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import reissue_pt_warnings
from trl import SFTConfig, SFTTrainer

from fourbit.data import LossOn, TrainingData
from fourbit.files import remove_leftovers
from fourbit.finetuning.options import FinetuneOptions
from fourbit.finetuning.paging import PagingLog
from fourbit.finetuning.record import OPTIMIZER_FILE, SCHEDULER_FILE
from fourbit.lora import save_adapter
from fourbit.optim import PagedAdamW, load_optimizer, save_optimizer
from fourbit.optim.files import unwrapped

LOSS_LOG = "loss.jsonl"


@dataclass(frozen=True)
class StepProgress:
    """Where a training run is.

    Attributes:
        step: optimizer steps done.
        total: optimizer steps of the whole run.
        loss: the loss logged last, mean negative log-likelihood a learned token; None before.
        tokens: tokens seen, padding not counted.
    """

    step: int
    total: int
    loss: float | None
    tokens: int


class AdapterTrainer(SFTTrainer):  # type: ignore[misc]  # transformers has no types
    """`SFTTrainer` on a model with fourbit adapters.

    A checkpoint is the adapter in PEFT's format, the optimizer as `save_optimizer` writes it, the
    schedule, the random state and the trainer's state. Put the adapter of the checkpoint on the
    model before resuming from it. Checkpoints of earlier versions, with the optimizer in
    ``optimizer.pt``, are resumed from too.

    Args:
        base_name: what ``adapter_config.json`` names as the base.
        kwargs: as for ``SFTTrainer``.
    """

    def __init__(self, *, base_name: str, **kwargs: Any) -> None:
        self._base_name = base_name
        self._paging: PagingLog | None = None
        super().__init__(**kwargs)

    @property
    def paged_optimizer(self) -> PagedAdamW:
        """The optimizer itself, without accelerate's wrapper; there is one once training starts."""
        return unwrapped(self.optimizer)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        save_adapter(model, folder, base_model_name_or_path=self._base_name)
        self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            # torch's writer says "unexpected pos" where the disk is full.
            folder = Path(self.args.output_dir)
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            free = shutil.disk_usage(folder).free >> 20
            raise OSError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder} "
                f"({reason}; {free} MiB are free there); put that right and resume the run"
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        path = Path(output_dir) / OPTIMIZER_FILE
        # Of a run that was killed here: as large as the file itself.
        remove_leftovers(path)
        save_optimizer(self.paged_optimizer, path)
        with warnings.catch_warnings(record=True) as caught:
            torch.save(self.lr_scheduler.state_dict(), path.with_name(SCHEDULER_FILE))
        reissue_pt_warnings(caught)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_FILE
        if path is None or not path.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.paged_optimizer, path)
        with warnings.catch_warnings(record=True) as caught:
            schedule = torch.load(path.with_name(SCHEDULER_FILE), weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)
        reissue_pt_warnings(caught)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter is on the model already."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with each loss what the optimizer's pager did since the one before."""
        if "loss" in logs:
            if self._paging is None:
                self._paging = PagingLog(self.paged_optimizer)
            logs = {**logs, **self._paging.entry()}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Measure the held-out data; training goes on as if it had not been measured."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None is written: the run's record says what was done."""


def build_trainer(
    model: Any,
    tokenizer: Any,
    examples: TrainingData,
    settings: FinetuneOptions,
    loss_on: LossOn,
    folder: Path,
    base_name: str,
    callback: TrainerCallback,
    *,
    held_out: TrainingData | None = None,
) -> AdapterTrainer:
    """A trainer ready to run; its datasets are tokenized, masked and cut."""
    on_gpu = torch.cuda.is_available()
    base_dtype = model.get_input_embeddings().weight.dtype
    # `prepare_for_training` has turned checkpointing on; the trainer must not do it again. Its
    # option was renamed in transformers 5.
    names = {field.name for field in fields(SFTConfig)}
    checkpointing = (
        "activation_checkpointing"
        if "activation_checkpointing" in names
        else "gradient_checkpointing"
    )
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=settings.eval_steps or settings.save_steps,
        # The logits of all held-out data would fill the memory.
        prediction_loss_only=True,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        # A loss of NaN must be seen, not replaced by an average.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_limit,
        report_to=["tensorboard"] if _has_tensorboard() else [],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        bf16=on_gpu and base_dtype == torch.bfloat16,
        fp16=on_gpu and base_dtype == torch.float16,
        dataloader_pin_memory=on_gpu,
        max_length=settings.max_length,
        packing=settings.packing,
        assistant_only_loss=loss_on == "assistant",
        completion_only_loss=loss_on == "completion",
        **{checkpointing: False},
    )
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        trainer = AdapterTrainer(
            base_name=base_name,
            model=model,
            args=arguments,
            train_dataset=examples.dataset,
            eval_dataset=None if held_out is None else held_out.dataset,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(
                PagedAdamW,
                {
                    "lr": settings.lr,
                    "state_bits": settings.optimizer_bits,
                    "pager": settings.pager,
                },
            ),
            callbacks=[callback],
        )
    finally:
        if not bars:
            datasets.enable_progress_bars()
    trainer.remove_callback(PrinterCallback)
    return trainer


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Writes the loss log, reports progress, and stops cleanly when asked to.

    Args:
        folder: where ``loss.jsonl`` is written: one JSON object a logged step.
        progress: called after each optimizer step.
        should_stop: asked after each optimizer step; True saves a checkpoint and ends the run.
        begin: called once it is certain that there are steps to do, before the first of them.
        held_out: whether there is held-out data, to be measured after the last step at least.

    Attributes:
        stopped: whether the run was ended before its last step.
        tokens: tokens seen since the run began or was resumed, padding not counted.
    """

    def __init__(
        self,
        folder: Path,
        progress: Callable[[StepProgress], None] | None,
        should_stop: Callable[[], bool] | None,
        begin: Callable[[], None] = lambda: None,
        *,
        held_out: bool = False,
    ) -> None:
        self.held_out = held_out
        self.begin = begin
        self.path = folder / LOSS_LOG
        self.progress = progress
        self.should_stop = should_stop
        self.stopped = False
        self.tokens = 0
        self._tokens_before = 0
        self._loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the log with what the checkpoint remembers, and nothing logged after it."""
        if state.global_step >= state.max_steps:
            # The trainer would take one step more.
            raise ValueError(
                f"the run in {self.path.parent} is complete at step {state.global_step}; raise "
                "epochs or max_steps to go on"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.begin()
        self.path.write_text("".join(map(_line, state.log_history)))
        self._tokens_before = int(state.num_input_tokens_seen)
        self._report(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the entry that was logged last."""
        entry = state.log_history[-1]
        self._loss = entry.get("loss", self._loss)
        if self._loss is not None and not math.isfinite(self._loss):
            raise FloatingPointError(
                f"the loss is {self._loss} at step {state.global_step}; lower the learning rate, "
                "or compute in bfloat16 or float32"
            )
        with self.path.open("a") as file:
            file.write(_line(entry))
        self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask whether to stop; the trainer saves after this."""
        self.tokens = int(state.num_input_tokens_seen) - self._tokens_before
        if self.should_stop is not None and self.should_stop():
            self.stopped = state.global_step < state.max_steps
            control.should_log = control.should_save = control.should_training_stop = True
        if self.held_out and state.global_step >= state.max_steps:
            # What the adapter that is kept does, whatever the steps between measurements.
            control.should_evaluate = True
        self._report(state)

    def _report(self, state: Any) -> None:
        if self.progress is not None:
            tokens = int(state.num_input_tokens_seen)
            self.progress(StepProgress(state.global_step, state.max_steps, self._loss, tokens))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
