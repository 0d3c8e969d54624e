"""`finetune`: what is learned, what is written, and that a resumed run ends in the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fourbit
from conftest import REPOSITORY
from fourbit import DataError
from fourbit.finetuning import FinetuneReport, FinetuneStoppedError
from fourbit.finetuning.curve import draw_loss_curve, running_mean
from fourbit.finetuning.record import latest_checkpoint, read_record
from optimizers import same

FAQ = REPOSITORY / "examples" / "data" / "faq.jsonl"
# Dropout is on, so that a run resumes exactly only if the random state does.
OPTIONS: dict[str, Any] = {
    "r": 4,
    "lora_dropout": 0.2,
    "lr": 5e-3,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "max_length": 96,
    "max_steps": 6,
    "save_steps": 3,
}


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    # Tiny layers on several threads wait for each other longer than they compute.
    threads(1)


def run(model: Any, output: Path, **options: Any) -> FinetuneReport:
    data = options.pop("data", FAQ)
    return fourbit.finetune(model, data, output, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def finished(four_bit_folder: Path, tmp_path_factory: Any) -> tuple[Path, FinetuneReport]:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    report = run(four_bit_folder, output)
    torch.set_num_threads(before)
    return output, report


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def optimizer_bytes(folder: Path, step: int = 6) -> bytes:
    return (folder / f"checkpoint-{step}" / "optimizer.safetensors").read_bytes()


def test_a_run_learns_and_reports(finished: tuple[Path, FinetuneReport]) -> None:
    output, report = finished
    assert report.last_loss < report.first_loss - 0.05
    assert (report.steps, report.loss_on, report.resumed_from) == (6, "assistant", None)
    assert report.examples == len(FAQ.read_text().splitlines())
    assert 0 < report.learned_tokens < report.tokens * report.examples
    assert report.adapter_bytes == len(adapter_bytes(output))
    assert report.seconds > 0
    assert report.peak_memory_bytes is None or report.peak_memory_bytes > 50 << 20
    logged = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 6
    assert report.first_loss == losses[0]
    assert report.last_loss == losses[-1]


def test_what_a_run_leaves(finished: tuple[Path, FinetuneReport]) -> None:
    output, report = finished
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((output / "runs").rglob("events.out.tfevents.*"))
    transformers.AutoTokenizer.from_pretrained(output)
    for checkpoint in (output / "checkpoint-3", output / "checkpoint-6"):
        files = {path.name for path in checkpoint.iterdir()}
        weights = {name for name in files if name.endswith(".safetensors")}
        assert weights == {"adapter_model.safetensors", "optimizer.safetensors"}
        assert "optimizer.pt" not in files
    assert adapter_bytes(output) == adapter_bytes(output / "checkpoint-6")
    record = read_record(output)
    assert record.report is not None
    assert record.report["last_loss"] == report.last_loss
    assert record.options["r"] == 4


def test_held_out_data_is_measured_and_does_not_train(
    finished: tuple[Path, FinetuneReport], four_bit_folder: Path, tmp_path: Path
) -> None:
    whole, _ = finished
    examples = [json.loads(line) for line in FAQ.read_text().splitlines()]
    output = tmp_path / "measured"
    report = run(four_bit_folder, output, eval_data=examples[:9], eval_steps=4)
    assert adapter_bytes(output) == adapter_bytes(whole)
    logged = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    measured = {entry["step"]: entry["eval_loss"] for entry in logged if "eval_loss" in entry}
    assert list(measured) == [4, 6]
    assert report.eval_loss == measured[6]
    assert (report.best_eval_loss, report.best_eval_step) == (measured[6], 6)

    # The same examples through the adapter that was saved, each batch a mean as in training.
    model = fourbit.from_pretrained(four_bit_folder, dtype=torch.float32)
    fourbit.load_adapter(model, output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    losses, sizes = [], []
    for start in range(0, 9, OPTIONS["batch_size"]):
        rows = [
            tokenizer.apply_chat_template(
                example["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            for example in examples[start : min(9, start + OPTIONS["batch_size"])]
        ]
        total = count = 0.0
        for row in rows:
            ids = torch.tensor([row["input_ids"][: OPTIONS["max_length"]]])
            mask = torch.tensor(row["assistant_masks"][: OPTIONS["max_length"]]).bool()[1:]
            with torch.no_grad():
                nats = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total -= nats.gather(1, ids[0, 1:, None])[mask].sum().item()
            count += mask.sum().item()
        losses.append(total / count)
        sizes.append(len(rows))
    expected = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / 9
    assert report.eval_loss == pytest.approx(expected, rel=1e-4)  # of sums in another order

    with pytest.raises(ValueError, match="held-out data"):
        run(four_bit_folder, output, eval_data=examples[:8], resume=True)
    with pytest.raises(DataError, match="must be like the training data"):
        run(four_bit_folder, tmp_path / "other", eval_data=[{"text": "All of this is learned."}])


def test_peft_reads_the_adapter(
    finished: tuple[Path, FinetuneReport], plain_folder: Path, four_bit_folder: Path
) -> None:
    peft = pytest.importorskip("peft")
    output, _ = finished
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(four_bit_folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(plain_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, output)
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(value.abs().sum() > 0 for value in trained)


def test_a_stopped_run_resumes_to_the_same_bits(
    finished: tuple[Path, FinetuneReport], four_bit_folder: Path, tmp_path: Path
) -> None:
    whole, report = finished
    output = tmp_path / "stopped"
    steps: list[int] = []
    with pytest.raises(FinetuneStoppedError) as caught:
        run(
            four_bit_folder,
            output,
            progress=lambda now: steps.append(now.step),
            should_stop=lambda: len(steps) > 0 and steps[-1] >= 3,
        )
    assert caught.value.step == 4
    assert not (output / "adapter_model.safetensors").exists()
    # A newer checkpoint that was cut short is passed over.
    broken = shutil.copytree(output / "checkpoint-4", output / "checkpoint-5")
    (broken / "trainer_state.json").write_text('{"cut": ')
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"

    # Options that are not given are those of the first run.
    resumed = fourbit.finetune(four_bit_folder, FAQ, output, resume=True)
    assert (resumed.resumed_from, resumed.steps) == (4, 6)
    assert adapter_bytes(output) == adapter_bytes(whole)
    assert resumed.last_loss == report.last_loss
    # The log is that of one run: every step once.
    logged = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    schedules = []
    for folder in (whole, output):
        path = folder / "checkpoint-6" / "scheduler.pt"
        schedules.append(torch.load(path, weights_only=True))
    assert same(*schedules)
    assert optimizer_bytes(output) == optimizer_bytes(whole)


def test_a_resumed_run_is_the_same_run(
    finished: tuple[Path, FinetuneReport], four_bit_folder: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(finished[0], tmp_path / "copy")
    with pytest.raises(ValueError, match=r"started with lr 0\.005 and cannot be .* with 0\.1"):
        fourbit.finetune(four_bit_folder, FAQ, output, resume=True, lr=0.1)
    with pytest.raises(ValueError, match="is not the data that the run"):
        fourbit.finetune(four_bit_folder, [{"text": "a"}], output, resume=True)
    other = shutil.copytree(four_bit_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="other is not the model that the run"):
        fourbit.finetune(other, FAQ, output, resume=True)
    with pytest.raises(ValueError, match="complete at step 6; raise epochs or max_steps"):
        fourbit.finetune(four_bit_folder, FAQ, output, resume=True)
    assert read_record(output) == read_record(finished[0])
    longer = fourbit.finetune(four_bit_folder, FAQ, output, resume=True, max_steps=7)
    assert (longer.resumed_from, longer.steps) == (6, 7)


def test_a_run_is_never_overwritten(
    finished: tuple[Path, FinetuneReport], four_bit_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileExistsError, match="holds a run or an adapter already"):
        run(four_bit_folder, finished[0])
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        run(four_bit_folder, tmp_path / "empty", resume=True)


def test_nothing_is_written_into_a_folder_in_use(four_bit_folder: Path, tmp_path: Path) -> None:
    """The model's own folder, for one, would have its tokenizer written over."""
    model = shutil.copytree(four_bit_folder, tmp_path / "model")
    with pytest.raises(FileExistsError, match="model is not empty; give a new or empty folder"):
        run(model, model)
    fourbit.verify(model)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file"):
        run(model, tmp_path / "file")


def test_a_checkpoint_that_was_cut_off_is_passed_over(
    finished: tuple[Path, FinetuneReport], tmp_path: Path
) -> None:
    output = shutil.copytree(finished[0], tmp_path / "copy")
    newest = latest_checkpoint(output)
    assert newest is not None
    assert newest.name == "checkpoint-6"
    state = newest / "optimizer.safetensors"
    whole = state.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        state.write_bytes(whole[:size])
        assert latest_checkpoint(output) == output / "checkpoint-3"
    state.unlink()
    assert latest_checkpoint(output) == output / "checkpoint-3"
    state.write_bytes(whole)
    assert latest_checkpoint(output) == newest
    (newest / "rng_state.pth").write_bytes(b"PK")
    assert latest_checkpoint(output) == output / "checkpoint-3"


def test_a_full_disk_is_said_and_the_run_goes_on(
    finished: tuple[Path, FinetuneReport],
    four_bit_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save, saved = torch.save, []

    def full(value: Any, *arguments: Any, **options: Any) -> None:
        saved.append(value)
        if len(saved) > 2:  # schedule and random state of the first checkpoint
            raise RuntimeError("unexpected pos 704640 vs 704528")
        save(value, *arguments, **options)

    output = tmp_path / "run"
    monkeypatch.setattr(torch, "save", full)
    sentence = r"checkpoint of step 6 cannot be written to .*run \(unexpected pos .* MiB are free"
    with pytest.raises(OSError, match=sentence):
        run(four_bit_folder, output)
    monkeypatch.undo()
    resumed = fourbit.finetune(four_bit_folder, FAQ, output, resume=True)
    assert resumed.resumed_from == 3
    assert adapter_bytes(output) == adapter_bytes(finished[0])


def labels(model: Path, output: Path, data: Any, **options: Any) -> list[dict[str, Any]]:
    """The tokenized examples of a run that is stopped before its first step."""
    from fourbit.data import load_training_data, resolve_loss
    from fourbit.finetuning import FinetuneOptions
    from fourbit.finetuning.trainer import RunCallback, build_trainer
    from fourbit.loading import load_model, load_tokenizer

    settings = FinetuneOptions(**{**OPTIONS, **options})
    examples = load_training_data(data)
    tokenizer = load_tokenizer(model)
    loss_on = resolve_loss(
        examples,
        tokenizer,
        tokenizer_name=str(model),
        assistant_only=settings.assistant_only,
        completion_only=settings.completion_only,
    )
    loaded = fourbit.add_lora(load_model(model, torch.float32), r=2)
    callback = RunCallback(output, None, None)
    trainer = build_trainer(
        loaded, tokenizer, examples, settings, loss_on, output, "base", callback
    )
    return list(trainer.train_dataset)


CHAT = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five six"},
]


@pytest.mark.parametrize(
    ("example", "options", "learned"),
    [
        ({"messages": CHAT}, {}, "three<|end|>five six<|end|>"),
        (
            {"messages": CHAT},
            {"assistant_only": False},
            "<|user|>one two<|assistant|>three<|end|><|user|>four<|assistant|>five six<|end|>",
        ),
        ({"prompt": "one two", "completion": " three"}, {}, " three<|end|>"),
        (
            {"prompt": "one two", "completion": " three"},
            {"completion_only": False},
            "one two three<|end|>",
        ),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, {}, "three<|end|>"),
        ({"text": "one two"}, {}, "one two<|end|>"),
    ],
)
def test_labels(
    four_bit_folder: Path,
    tmp_path: Path,
    example: dict[str, Any],
    options: dict[str, Any],
    learned: str,
) -> None:
    (row,) = labels(four_bit_folder, tmp_path, [example], **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(four_bit_folder)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == learned
    assert all(
        label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True)
    )


def test_the_end_token_is_learned_where_it_is_also_the_padding(
    four_bit_folder: Path, tmp_path: Path
) -> None:
    """Masking all padding by its id would mask every end as well."""
    model = shutil.copytree(four_bit_folder, tmp_path / "model")
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token": config["eos_token"]}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = labels(model, tmp_path, [{"text": "one"}, {"text": "one two three four five"}])
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    for row, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        assert (row == tokenizer.eos_token_id).sum() == 1
        assert (row[mask == 0] == -100).all()


def refused(model: Path, output: Path, data: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        run(model, output, data=data, **options)
    written = list(output.iterdir()) if output.exists() else []
    assert not written, "nothing may be written before the checks are passed"
    return str(caught.value)


def test_data_that_teaches_nothing_is_refused(four_bit_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    long = [{"prompt": "word " * 50, "completion": "answer"}]
    assert "no token is left to learn from" in refused(four_bit_folder, output, long, max_length=8)
    chat = [{"messages": CHAT[:1]}]
    assert "no usable example" in refused(four_bit_folder, output, chat)


def test_tokenizers_that_do_not_fit_are_refused(four_bit_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    model = shutil.copytree(four_bit_folder, tmp_path / "model")
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())

    path.write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    assert "has no end token" in refused(model, output, [{"text": "one"}])

    path.write_text(json.dumps(config))
    system = [{"messages": [{"role": "system", "content": "x"}, *CHAT]}]
    assert "example 1: the chat template" in refused(model, output, system)

    (model / "chat_template.jinja").unlink()
    message = refused(model, output, [{"messages": CHAT}])
    assert "no chat template; give one with --chat-template" in message

    tokenizer = transformers.AutoTokenizer.from_pretrained(four_bit_folder)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(model)
    message = refused(model, output, [{"text": "one <|new|>"}])
    assert "token 2048 ('<|new|>') has no row in the model's embedding of 2048" in message


def test_a_chat_template_can_be_given(four_bit_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    output = tmp_path / "run"
    notes: list[str] = []
    report = run(
        four_bit_folder,
        output,
        data=[{"messages": CHAT}] * 4,
        chat_template=str(template),
        max_steps=1,
        note=notes.append,
    )
    assert report.loss_on == "all"
    assert any("does not mark the assistant's turns" in note for note in notes)
    saved = transformers.AutoTokenizer.from_pretrained(output)
    assert saved.chat_template == template.read_text()


def test_folders_that_are_not_in_4_bits_are_refused(plain_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"run `fourbit convert {plain_folder} "):
        run(plain_folder, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        run(tmp_path / "nothing", tmp_path / "run")


def test_the_output_head_is_left_alone(
    four_bit_folder: Path, plain_folder: Path, tmp_path: Path
) -> None:
    """TRL reads the head's weight itself: packed bytes, or an adapter beside it, would be lost."""
    with pytest.raises(ValueError, match="target_modules names the output head"):
        run(four_bit_folder, tmp_path / "run", target_modules=("lm_head", "q_proj"))
    model = transformers.AutoModelForCausalLM.from_pretrained(plain_folder)
    model.lm_head = fourbit.Linear4bit.from_linear(model.lm_head)
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_folder)
    with pytest.raises(ValueError, match="output head of the model is in 4 bits"):
        run(model, tmp_path / "run", tokenizer=tokenizer)


def test_a_loaded_model_can_be_given(four_bit_folder: Path, tmp_path: Path) -> None:
    model = fourbit.from_pretrained(four_bit_folder, dtype=torch.float32)
    with pytest.raises(ValueError, match="give tokenizer="):
        run(model, tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(four_bit_folder)
    report = run(
        model,
        tmp_path / "run",
        tokenizer=tokenizer,
        data=[{"text": "one two three"}] * 4,
        max_steps=2,
        use_dora=True,
        optimizer_bits=32,
        gradient_checkpointing=False,
        lr_schedule="constant",
    )
    assert report.steps == 2
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["use_dora"] is True


def test_packing_keeps_examples_apart(four_bit_folder: Path, tmp_path: Path) -> None:
    """In one sequence or each in its own, the same tokens are predicted from the same ones."""
    data = [{"text": "one two three"}, {"text": "four five"}, {"text": "six"}]
    losses = []
    for packing in (False, True):
        report = run(
            four_bit_folder,
            tmp_path / str(packing),
            data=data,
            packing=packing,
            max_steps=1,
            batch_size=1 if packing else 3,
            gradient_accumulation=1,
            lora_dropout=0.0,
        )
        losses.append(report.first_loss)
    # Sums in another order, in float32.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_not_a_number_ends_the_run(four_bit_folder: Path, tmp_path: Path) -> None:
    model = fourbit.from_pretrained(four_bit_folder, dtype=torch.float32)
    model.model.norm.weight.data.fill_(float("nan"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(four_bit_folder)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        run(model, tmp_path / "run", tokenizer=tokenizer, data=[{"text": "one two"}])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora_dropout": 1.0}, r"lora_dropout is 1\.0; it must be in \[0, 1\)"),
        ({"r": 0}, "r is 0; it must be at least 1"),
        ({"lr": 0.0}, r"lr is 0\.0; it must be above 0"),
        ({"lr": float("nan")}, "lr is nan; it must be above 0"),
        ({"lr": float("inf")}, "lr is inf; it must be above 0 and finite"),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0; it must be at least 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; use one of auto"),
        ({"optimizer_bits": 4}, "optimizer_bits is 4; use 8 or 32"),
        ({"pager": "swap"}, "pager is 'swap'; use one of auto, unified, pinned, resident"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fourbit.finetune("model", "data", tmp_path, **options)


def test_one_of_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of 2; use TRL's SFTTrainer"):
        fourbit.finetune("model", "data", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="finetune has no option 'rank'"):
        fourbit.finetune("model", "data", tmp_path, rank=4)


def test_loss_curves_of_any_length(tmp_path: Path) -> None:
    for length in (1, 5, 200):
        path = tmp_path / f"{length}.png"
        losses = [1 / (step + 1) for step in range(length)]
        assert draw_loss_curve(range(1, length + 1), losses, path, "run")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
