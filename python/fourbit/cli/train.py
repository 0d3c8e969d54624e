"""``finetune``: adapters for a 4-bit model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import screen
from fourbit.cli.common import Interrupted, Json, debugging, one_of
from fourbit.cli.progress import Meter
from fourbit.cli.quiet import quiet_libraries
from fourbit.finetuning.options import FinetuneOptions

if TYPE_CHECKING:
    from fourbit.finetuning import FinetuneReport

_DEFAULTS = FinetuneOptions()


def finetune(
    context: typer.Context,
    model: Annotated[
        Path, typer.Option(show_default=False, help="A 4-bit folder, as `fourbit convert` writes.")
    ],
    data: Annotated[
        str,
        typer.Option(
            show_default=False,
            help="A JSONL file with `messages`, `prompt` and `completion`, or `text`; or a "
            "datasets id, name or name:split.",
        ),
    ],
    eval_data: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Examples of the same kind that are not trained on, to measure the loss with.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            show_default="MODEL-adapter", help="The folder for the adapter: new or empty."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in the output folder."),
    ] = False,
    r: Annotated[int, typer.Option("--r", help="Rank of the adapters.")] = _DEFAULTS.r,
    lora_alpha: Annotated[
        float, typer.Option(help="The adapter's output is multiplied by alpha / r.")
    ] = _DEFAULTS.lora_alpha,
    lora_dropout: Annotated[
        float, typer.Option(help="Share of the adapter's input that is dropped.")
    ] = _DEFAULTS.lora_dropout,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or names of layers with commas between them.")
    ] = "all-linear",
    target_parameters: Annotated[
        str | None,
        typer.Option(
            show_default="all with all-linear",
            help="3-D weights of experts, such as experts.down_proj, with commas between them; "
            "or none.",
        ),
    ] = None,
    use_dora: Annotated[
        bool, typer.Option("--use-dora", help="Learn the norm of each row apart (DoRA).")
    ] = _DEFAULTS.use_dora,
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Multiply by alpha / sqrt(r) instead.")
    ] = _DEFAULTS.use_rslora,
    init_lora_weights: Annotated[
        str, typer.Option(help="default or gaussian.", callback=one_of("default", "gaussian"))
    ] = _DEFAULTS.init_lora_weights,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = _DEFAULTS.epochs,
    max_steps: Annotated[
        int | None, typer.Option(show_default=False, help="Optimizer steps, in place of epochs.")
    ] = _DEFAULTS.max_steps,
    batch_size: Annotated[
        int, typer.Option(help="Sequences in a forward pass.")
    ] = _DEFAULTS.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Forward passes in an optimizer step.")
    ] = _DEFAULTS.gradient_accumulation,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = _DEFAULTS.lr,
    lr_schedule: Annotated[
        str,
        typer.Option(
            help="linear, cosine, constant or constant_with_warmup.",
            callback=one_of("linear", "cosine", "constant", "constant_with_warmup"),
        ),
    ] = _DEFAULTS.lr_schedule,
    warmup_ratio: Annotated[
        float, typer.Option(help="Share of the steps in which the learning rate rises.")
    ] = _DEFAULTS.warmup_ratio,
    weight_decay: Annotated[float, typer.Option(help="Of the adapters.")] = _DEFAULTS.weight_decay,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are scaled down to this norm.")
    ] = _DEFAULTS.max_grad_norm,
    optimizer_bits: Annotated[
        int, typer.Option(help="Bits of the optimizer's state: 8 or 32.", callback=one_of(8, 32))
    ] = _DEFAULTS.optimizer_bits,
    pager: Annotated[
        str,
        typer.Option(
            help="Where the optimizer's state lives: resident (beside the parameters), unified "
            "(moves between GPU and host), pinned (on the host) or auto.",
            callback=one_of("auto", "unified", "pinned", "resident"),
        ),
    ] = _DEFAULTS.pager,
    max_length: Annotated[
        int, typer.Option(help="Tokens at which a sequence is cut.")
    ] = _DEFAULTS.max_length,
    packing: Annotated[
        bool, typer.Option("--packing", help="Put several examples into one sequence.")
    ] = _DEFAULTS.packing,
    assistant_only: Annotated[
        bool | None,
        typer.Option(
            show_default="where they can be told apart",
            help="Of messages, learn the assistant's turns only.",
        ),
    ] = _DEFAULTS.assistant_only,
    completion_only: Annotated[
        bool | None,
        typer.Option(show_default="yes", help="Of prompts, learn the completion only."),
    ] = _DEFAULTS.completion_only,
    chat_template: Annotated[
        Path | None,
        typer.Option(show_default=False, help="A Jinja file in place of the tokenizer's template."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute blocks again in the backward pass, to save memory.")
    ] = _DEFAULTS.gradient_checkpointing,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the computation: auto, bfloat16, float16 or float32.",
            callback=one_of("auto", "bfloat16", "float16", "float32"),
        ),
    ] = _DEFAULTS.dtype,
    seed: Annotated[
        int, typer.Option(help="Of adapters, dropout and the order of the data.")
    ] = _DEFAULTS.seed,
    logging_steps: Annotated[
        int, typer.Option(help="Optimizer steps between entries of the loss log.")
    ] = _DEFAULTS.logging_steps,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            show_default="as save-steps",
            help="Optimizer steps between measurements on the held-out data.",
        ),
    ] = _DEFAULTS.eval_steps,
    save_steps: Annotated[
        int, typer.Option(help="Optimizer steps between checkpoints.")
    ] = _DEFAULTS.save_steps,
    save_limit: Annotated[
        int, typer.Option(help="Newest checkpoints kept.")
    ] = _DEFAULTS.save_limit,
    json: Json = False,
) -> None:
    """Train adapters on a 4-bit model (QLoRA).

    They are saved in PEFT's format, with the tokenizer, the loss log and its curve.

    Ctrl-C or SIGTERM ends the run after the step under way, with a checkpoint; a second one at
    once. The same command with --resume then goes on, and ends in the same adapter as without the
    interruption.
    """
    options = _given(context)
    if output is None:
        named = model if model.name not in ("", "..") else model.resolve()
        output = Path(f"{named}-adapter")
    with quiet_libraries(everything=debugging()):
        # Late: these take seconds to import.
        from fourbit import finetuning
        from fourbit.finetuning.trainer import StepProgress

        with (
            Meter("training", amount=lambda n: f"{n:.0f}", rate=_pace) as meter,
            _stop_on_interrupt() as stopped,
        ):

            def progress(now: StepProgress) -> None:
                loss = "" if now.loss is None else f"loss {now.loss:.4f}"
                meter.update(now.step, now.total, loss)

            try:
                report = finetuning.finetune(
                    model,
                    data,
                    output,
                    eval_data=eval_data,
                    resume=resume,
                    progress=progress,
                    note=screen.note,
                    should_stop=stopped,
                    **options,
                )
            except finetuning.FinetuneStoppedError as stop:
                raise Interrupted(
                    f"step {stop.step} is saved; run the same command with --resume to go on"
                ) from None
            except KeyboardInterrupt:
                raise Interrupted(
                    "run the same command with --resume to go on from the last checkpoint"
                ) from None
    if json:
        screen.say_json({**asdict(report), "tokens_per_second": report.tokens_per_second})
    else:
        _say_report(report)


def _given(context: typer.Context) -> dict[str, Any]:
    """The training options on the command line: a resumed run has its own values for the rest."""
    options: dict[str, Any] = {}
    for field in fields(FinetuneOptions):
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            options[field.name] = context.params[field.name]
    targets = options.get("target_modules")
    if targets not in (None, "all-linear"):
        options["target_modules"] = _names(targets)
    weights = options.get("target_parameters")
    if weights is not None:
        options["target_parameters"] = () if weights == "none" else _names(weights)
    if options.get("chat_template") is not None:
        options["chat_template"] = str(options["chat_template"])
    try:
        FinetuneOptions(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return options


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _pace(steps_a_second: float) -> str:
    if steps_a_second >= 1:
        return f"{steps_a_second:.1f} steps/s"
    return f"{1 / steps_a_second:.1f} s/step"


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C, or SIGTERM of a scheduler, into a question the run asks itself.

    A second one interrupts.
    """
    wanted = False

    def ask(*_: object) -> None:
        nonlocal wanted
        if wanted:
            raise KeyboardInterrupt
        wanted = True
        screen.note("stopping after this step; Ctrl-C again stops at once")

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(one, ask) for one in signals]
    except ValueError:  # not in the main thread, where signals do not arrive
        yield lambda: False
        return
    try:
        yield lambda: wanted
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


def _held_out_row(report: FinetuneReport) -> dict[str, str]:
    if report.eval_loss is None:
        return {}
    row = f"loss {report.eval_loss:.4f}"
    if report.best_eval_loss is not None and report.best_eval_loss < report.eval_loss:
        row += f"; it was lowest, {report.best_eval_loss:.4f}, at step {report.best_eval_step}"
    return {"held out": row}


def _optimizer_rows(report: FinetuneReport) -> dict[str, str]:
    rows = {}
    if report.pager != "resident":
        rows["paging"] = (
            f"{report.pager}: {screen.size(report.paging_bytes_in)} in, "
            f"{screen.size(report.paging_bytes_out)} out, "
            f"{screen.duration(report.paging_seconds_waiting)} waiting"
        )
    if report.skipped_updates:
        rows["skipped"] = (
            f"{screen.plural(report.skipped_updates, 'update')} of single tensors, for NaN or "
            "infinity in the gradient"
        )
    return rows


def _say_report(report: FinetuneReport) -> None:
    learned = {"assistant": "the assistant's turns", "completion": "completions", "all": "all text"}
    memory = [] if report.peak_memory_bytes is None else [screen.size(report.peak_memory_bytes)]
    if report.peak_gpu_bytes is not None:
        memory.append(f"{screen.size(report.peak_gpu_bytes)} on the GPU")
    resumed = "" if report.resumed_from is None else f", resumed from {report.resumed_from}"
    rows = {
        "loss": f"{report.first_loss:.4f} -> {report.last_loss:.4f}",
        **_held_out_row(report),
        "learned": f"{learned[report.loss_on]}: {report.learned_tokens:,} tokens in "
        f"{screen.plural(report.examples, 'sequence')}",
        "steps": f"{report.steps}{resumed}",
        "time": f"{screen.duration(report.seconds)}, {report.tokens_per_second:,.0f} tokens/s",
        **_optimizer_rows(report),
        "trainable": f"{report.trainable_parameters:,} parameters",
        "adapter": f"{report.output}, {screen.size(report.adapter_bytes)}",
        "peak memory": ", ".join(memory) or "not known here",
        "loss curve": report.loss_curve or 'not drawn: pip install "fourbit[plot]"',
    }
    for name, value in rows.items():
        screen.say(f"{name + ':':<13}{value}")
