"""`finetune`: train adapters on a 4-bit model, with TRL's SFTTrainer doing the training."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.data import (
    DataError,
    LossOn,
    TokenCounts,
    TrainingData,
    check_template,
    check_tokens,
    load_training_data,
    resolve_loss,
)
from fourbit.finetuning.curve import draw_loss_curve
from fourbit.finetuning.options import FinetuneOptions
from fourbit.finetuning.paging import totals
from fourbit.finetuning.record import (
    RunRecord,
    holds_run,
    latest_checkpoint,
    model_fingerprint,
    read_record,
    resumed_options,
    steps_of,
)
from fourbit.loading import load_model, load_tokenizer, require_quantized

if TYPE_CHECKING:
    from fourbit.finetuning.trainer import StepProgress

LOSS_CURVE = "loss.png"
_logger = logging.getLogger("fourbit")


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        output: the folder with the adapter.
        steps: optimizer steps of the whole run.
        resumed_from: the step it was resumed from, or None.
        examples: sequences in an epoch.
        learned_tokens: tokens in an epoch whose prediction counts.
        loss_on: what is learned: "assistant", "completion" or "all".
        first_loss: mean loss of the first tenth of the logged steps, in nats a token.
        last_loss: the same of the last tenth.
        eval_loss: mean loss on the held-out data after the last step, or None without any.
        best_eval_loss: the lowest of the run, at step `best_eval_step`; None without any.
        best_eval_step: see `best_eval_loss`.
        trainable_parameters: numbers that were trained.
        adapter_bytes: size of ``adapter_model.safetensors``.
        tokens: tokens seen by this call, padding not counted.
        skipped_updates: updates of single tensors that were left out in the whole run for NaN or
            infinity in the gradient.
        pager: where the optimizer's state lived: "resident", "unified" or "pinned".
        paging_bytes_in: of that state, moved to the GPU by this call.
        paging_bytes_out: moved to the host.
        paging_seconds_waiting: that steps waited for it.
        seconds: of training, without loading.
        peak_memory_bytes: largest resident memory of the process so far; None where it cannot be
            asked for.
        peak_gpu_bytes: largest GPU memory in tensors, or None without a GPU.
        loss_curve: the picture, or None without matplotlib.
    """

    output: str
    steps: int
    resumed_from: int | None
    examples: int
    learned_tokens: int
    loss_on: LossOn
    first_loss: float
    last_loss: float
    eval_loss: float | None
    best_eval_loss: float | None
    best_eval_step: int | None
    trainable_parameters: int
    adapter_bytes: int
    tokens: int
    skipped_updates: int
    pager: str
    paging_bytes_in: int
    paging_bytes_out: int
    paging_seconds_waiting: float
    seconds: float
    peak_memory_bytes: int | None
    peak_gpu_bytes: int | None
    loss_curve: str | None

    @property
    def tokens_per_second(self) -> float:
        """Of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


class FinetuneStoppedError(Exception):
    """A run was asked to stop, and did after saving a checkpoint.

    Attributes:
        step: the optimizer steps that are saved.
        output: the run's folder.
    """

    def __init__(self, step: int, output: Path) -> None:
        super().__init__(f"stopped after step {step}; {output} can be resumed")
        self.step = step
        self.output = output


def finetune(
    model: Any,
    data: str | Path | Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    eval_data: str | Path | Iterable[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    progress: Callable[[StepProgress], None] | None = None,
    note: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> FinetuneReport:
    """Train adapters on a 4-bit model and save them in PEFT's format.

    The folder then holds ``adapter_model.safetensors`` and ``adapter_config.json``, the tokenizer,
    ``loss.jsonl``, ``loss.png``, ``fourbit_run.json`` (options and report), TensorBoard's events in
    ``runs/`` if TensorBoard is installed, and the last checkpoints.

    Args:
        model: a folder that `convert` wrote, or a loaded model (then give its `tokenizer`).
        data: see `load_training_data`.
        output: the folder to write: a new or empty one.
        eval_data: examples that are not trained on; their loss is measured every `eval_steps` steps
            and after the last. Of the kind of `data`.
        tokenizer: in place of the model folder's.
        resume: go on from the newest checkpoint in `output`, and end in the same bits as without
            the interruption. Options that are not given are those of the first run; others must
            agree with it, but for `epochs`, `max_steps`, `pager`, `save_steps` and `save_limit`.
        progress: called with a `StepProgress` after each optimizer step.
        note: called with sentences that a user should see; by default they are logged as warnings.
        should_stop: asked after each step; when it says True a checkpoint is saved and
            `FinetuneStoppedError` raised.
        options: fields of `FinetuneOptions`.

    Raises:
        DataError: for data or a tokenizer that cannot be trained with; before training starts.
        ValueError: for an option that makes no sense, or that differs from the run to be resumed;
            in one of several processes that train together.
        FileNotFoundError: for a folder that is missing.
        FileExistsError: if `output` holds anything already and `resume` is False.
        OSError: if a checkpoint cannot be written; the run can be resumed from the one before.
        FinetuneStoppedError: after `should_stop` said so.
    """
    _check_one_process()
    folder = Path(output)
    record, settings = _settings(folder, resume, options)
    if isinstance(model, str | Path):
        require_quantized(Path(model))
    _check_pager(settings)
    # What can be wrong with data and tokenizer is said before the model is read.
    examples = load_training_data(data)
    held_out = None if eval_data is None else load_training_data(eval_data)
    if held_out is not None and held_out.kind != examples.kind:
        raise DataError(
            f"{held_out.source} is of the kind {held_out.kind!r}, but {examples.source} of "
            f"{examples.kind!r}; held-out data must be like the training data"
        )
    started = _started(model, settings, examples, held_out)
    if record is not None:
        _check_same_inputs(folder, record, started)
    tokenizer = _tokenizer(model, tokenizer, settings)
    loss_on = resolve_loss(
        examples,
        tokenizer,
        tokenizer_name=started.model_source,
        assistant_only=settings.assistant_only,
        completion_only=settings.completion_only,
    )
    for part in (examples, held_out):
        if part is not None:
            check_template(part, tokenizer, tokenizer_name=started.model_source)
    say = note or _logger.warning
    if examples.kind == "messages" and loss_on == "all" and settings.assistant_only is None:
        say(
            "the chat template does not mark the assistant's turns, so the users' are learned too; "
            "put {% generation %} ... {% endgeneration %} around the former to learn only those"
        )
    checkpoint = latest_checkpoint(folder) if resume else None
    if resume and checkpoint is None:
        say(f"{folder} has no complete checkpoint: starting from the first step")

    # Heavy imports, for those who do train.
    from fourbit.finetuning.trainer import RunCallback, build_trainer

    trainable = _with_adapter(model, settings, checkpoint)
    callback = RunCallback(
        folder,
        progress,
        should_stop,
        begin=lambda: started.write(folder),
        held_out=held_out is not None,
    )
    trainer = build_trainer(
        trainable,
        tokenizer,
        examples,
        settings,
        loss_on,
        folder,
        started.model_source,
        callback,
        held_out=held_out,
    )
    check = partial(
        check_tokens,
        tokenizer=tokenizer,
        embedding_rows=trainable.get_input_embeddings().weight.shape[0],
        max_length=settings.max_length,
        context=getattr(trainable.config.get_text_config(), "max_position_embeddings", None),
        packing=settings.packing,
    )
    counts = check(trainer.train_dataset, examples)
    notes = list(counts.notes)
    if held_out is not None:
        of_held_out = check(trainer.eval_dataset, held_out).notes
        notes += [f"held-out data: {sentence}" for sentence in of_held_out]
    for sentence in notes:
        say(sentence)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A disk that is full, met by a library that does not say where.
        raise OSError(error.errno, error.strerror, str(folder)) from error
    seconds = time.perf_counter() - start
    if callback.stopped:
        raise FinetuneStoppedError(trainer.state.global_step, folder)
    trainer.save_model(str(folder))
    report = _report(trainer, callback, counts, loss_on, folder, checkpoint, seconds)
    replace(started, report=asdict(report)).write(folder)
    return report


def _settings(
    folder: Path, resume: bool, given: Mapping[str, Any]
) -> tuple[RunRecord | None, FinetuneOptions]:
    known = {field.name for field in fields(FinetuneOptions)}
    for name in given:
        if name not in known:
            raise TypeError(f"finetune has no option {name!r}; see FinetuneOptions")
    if resume:
        record = read_record(folder)
        return record, resumed_options(record, given)
    if holds_run(folder):
        raise FileExistsError(
            f"{folder} holds a run or an adapter already; resume it (--resume), or choose another "
            "folder"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a new or empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        # A model folder, for one: its tokenizer would be written over.
        raise FileExistsError(f"{folder} is not empty; give a new or empty folder")
    return None, FinetuneOptions(**given)


def _check_one_process() -> None:
    """Raise where torchrun or accelerate started several: the folder has one writer."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(
            f"finetune trains in one process, and this is one of {processes}; use TRL's SFTTrainer "
            "or a loop of your own with fourbit's layers, as examples/02_two_processes.py has it"
        )


def _check_pager(settings: FinetuneOptions) -> None:
    """Raise what the optimizer would say of the pager after the model was read."""
    import torch

    from fourbit.optim import PagedAdamW

    device = "cuda" if torch.cuda.is_available() else "cpu"
    PagedAdamW([torch.nn.Parameter(torch.zeros(1, device=device))], pager=settings.pager)


def _started(
    model: Any, settings: FinetuneOptions, examples: TrainingData, held_out: TrainingData | None
) -> RunRecord:
    from_folder = isinstance(model, str | Path)
    return RunRecord(
        options=asdict(settings),
        data=examples.fingerprint,
        model=model_fingerprint(Path(model)) if from_folder else "",
        eval_data="" if held_out is None else held_out.fingerprint,
        data_source=examples.source,
        eval_source="" if held_out is None else held_out.source,
        model_source=str(model if from_folder else getattr(model, "name_or_path", "") or "model"),
    )


def _check_same_inputs(folder: Path, before: RunRecord, now: RunRecord) -> None:
    for what, old, new, source in (
        ("data", before.data, now.data, now.data_source),
        ("model", before.model, now.model, now.model_source),
        ("held-out data", before.eval_data, now.eval_data, now.eval_source or "no data"),
    ):
        if old != new:
            raise ValueError(
                f"{source} is not the {what} that the run in {folder} was started with; resume "
                f"with the same {what}, or start a run in another folder"
            )


def _tokenizer(model: Any, tokenizer: Any, settings: FinetuneOptions) -> Any:
    if tokenizer is None:
        if not isinstance(model, str | Path):
            raise ValueError("a loaded model needs its tokenizer: give tokenizer=...")
        tokenizer = load_tokenizer(Path(model))
    if settings.chat_template is not None:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    return tokenizer


def _with_adapter(model: Any, settings: FinetuneOptions, checkpoint: Path | None) -> Any:
    import transformers

    from fourbit.linear import Linear4bit
    from fourbit.lora import LoraLinear, add_lora, load_adapter
    from fourbit.training import prepare_for_training

    if isinstance(model, str | Path):
        model = load_model(Path(model), _dtype(settings))
    head = model.get_output_embeddings()
    if isinstance(head, Linear4bit):
        raise ValueError(
            "the output head of the model is in 4 bits, and TRL computes the loss from its dense "
            "weight; convert the model again with --skip lm_head"
        )
    prepare_for_training(model, gradient_checkpointing=settings.gradient_checkpointing)
    if checkpoint is not None:
        return load_adapter(model, checkpoint)
    transformers.set_seed(settings.seed)
    add_lora(
        model,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        target_parameters=settings.target_parameters,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
    )
    if isinstance(model.get_output_embeddings(), LoraLinear):
        raise ValueError(
            "target_modules names the output head, but TRL computes the loss from its weight alone "
            "and would never train that adapter; leave it out"
        )
    return model


def _dtype(settings: FinetuneOptions) -> Any:
    import torch

    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _report(
    trainer: Any,
    callback: Any,
    counts: TokenCounts,
    loss_on: LossOn,
    folder: Path,
    checkpoint: Path | None,
    seconds: float,
) -> FinetuneReport:
    import torch

    from fourbit.lora import adapter_size

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps, losses = [e["step"] for e in logged], [e["loss"] for e in logged]
    tenth = max(1, len(losses) // 10)
    measured = [
        (entry["step"], entry["eval_loss"])
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    best_step, best_loss = min(measured, key=lambda at: at[1], default=(None, None))
    curve = folder / LOSS_CURVE
    title = f"Fine-tuning: {folder.resolve().name}"
    drawn = draw_loss_curve(steps, losses, curve, title, held_out=measured)
    return FinetuneReport(
        output=str(folder),
        steps=trainer.state.global_step,
        resumed_from=None if checkpoint is None else steps_of(checkpoint),
        examples=counts.examples,
        learned_tokens=counts.learned,
        loss_on=loss_on,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        eval_loss=measured[-1][1] if measured else None,
        best_eval_loss=best_loss,
        best_eval_step=best_step,
        trainable_parameters=adapter_size(trainer.model).parameters,
        adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        tokens=callback.tokens,
        skipped_updates=trainer.paged_optimizer.skipped_updates,
        **totals(trainer.paged_optimizer),
        seconds=seconds,
        peak_memory_bytes=_peak_memory(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        loss_curve=str(curve) if drawn else None,
    )


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)
