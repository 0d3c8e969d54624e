"""The command: exit codes, one-sentence errors, JSON, progress, and the whole path."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import fourbit
from conftest import REPOSITORY
from fourbit.cli import progress, screen
from fourbit.cli.app import app

FAQ = REPOSITORY / "examples" / "data" / "faq.jsonl"
MAIN = "import sys; sys.argv[0] = 'fourbit'; from fourbit.cli import main; main()"


def call(*arguments: object, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def program(*arguments: object, code: str = MAIN) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def done(*arguments: object) -> dict[str, Any]:
    """The JSON that a command leaves on stdout."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def refused(*arguments: object, code: int = 1) -> str:
    """The one line that a failing command leaves on stderr."""
    result = call(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    line, *more = result.stderr.splitlines()
    assert not more, result.stderr
    assert line.startswith("fourbit")
    assert "Traceback" not in line
    assert "fault" not in line
    return str(line)


# --- folders ------------------------------------------------------------------------------------


def test_convert_inspect_verify(plain_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    report = done("convert", plain_folder, folder)
    assert report["quantized"] == 14
    assert report["bytes_after"] < report["bytes_before"]
    again = call("convert", plain_folder, folder)
    assert "complete already; nothing was written" in again.stdout
    assert "left as they were: 1 tensor, 256 KiB (embedding)" in again.stdout

    contents = done("inspect", folder)
    assert contents["quantized"]["tensors"] == 14
    assert contents["plain"]["tensors"] == 7
    assert contents["format_version"] == 1
    numbers = contents["quantized"]["parameters"]
    assert contents["parameters"] == numbers + contents["plain"]["parameters"]
    assert contents["bytes"] == sum(tensor["bytes"] for tensor in contents["tensors"])
    shown = call("inspect", folder).stdout
    assert "model.layers.*.mlp.down_proj.weight" in shown
    assert "2 x [64, 128]" in shown
    assert "written by:    fourbit, format 1" in shown
    every = call("inspect", folder, "--all").stdout
    assert "model.layers.1.mlp.down_proj.weight" in every

    assert done("verify", folder)["checksums"] is True
    assert f"{folder} is whole" in call("verify", folder).stdout


def test_convert_passes_its_options_on(plain_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = "--codebook fp4 --block-size 128 --no-double-quant --threads 1 --chunk-size 2"
    globs = ("--only", "*q_proj*", "--only", "*k_proj*", "--skip", "*.0.*")
    report = done("convert", plain_folder, folder, *options.split(), *globs)
    assert report["quantized"] == 2
    stored = done("inspect", folder)["stored_as"]
    assert stored["fp4, blocks of 128"] == 2


def test_inspect_reads_other_folders(plain_folder: Path, tmp_path: Path) -> None:
    shown = call("inspect", plain_folder).stdout
    assert "not quantized: 336,192 parameters" in shown
    pytest.importorskip("bitsandbytes")
    import transformers

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain_folder, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "bnb")
    contents = done("inspect", tmp_path / "bnb")
    assert contents["format_version"] is None
    assert contents["stored_as"]["nf4, blocks of 64"] == 14
    assert "bitsandbytes' layout" in call("inspect", tmp_path / "bnb").stdout
    assert done("verify", tmp_path / "bnb")["checksums"] is False


def test_damage_is_named(four_bit_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(four_bit_folder, tmp_path / "damaged")
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)
    line = refused("verify", folder)
    assert shard.name in line
    assert ".weight" in line


def test_one_sentence_errors(plain_folder: Path, four_bit_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert str(tmp_path / "no") in refused("convert", tmp_path / "no", out)
    assert "only" in refused("convert", plain_folder, out, "--only", "nothing*")
    assert "quantized already" in refused("convert", four_bit_folder, out)
    assert str(tmp_path / "no") in refused("inspect", tmp_path / "no")
    assert "os error" not in refused("convert", tmp_path / "no", out)
    assert "there is no model folder" in refused("generate", "--model", "no", "-p", "a")
    assert "the prompt is empty" in refused("generate", "--model", plain_folder, "-p", " ")
    adapter = ("--adapter", tmp_path / "no", "--output", out)
    assert "is not quantized; run `fourbit convert" in refused(
        "merge", "--model", plain_folder, *adapter
    )
    assert str(tmp_path / "no") in refused("merge", "--model", four_bit_folder, *adapter)
    training = ("finetune", "--model", four_bit_folder, "--output", out)
    assert "no data file" in refused(*training, "--data", "no.jsonl")
    used = ("finetune", "--model", four_bit_folder, "--output", four_bit_folder)
    assert "is not empty" in refused(*used, "--data", FAQ)
    broken = shutil.copytree(four_bit_folder, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {broken} cannot be read" in refused(
        "generate", "--model", broken, "-p", "a"
    )
    assert "holds no run to resume" in refused(*training, "--data", FAQ, "--resume")
    missing = tmp_path / "no.jinja"
    assert f"{missing}: No such file" in refused(
        *training, "--data", FAQ, "--chat-template", missing
    )
    assert not out.exists()


def test_wrong_command_lines() -> None:
    assert "No such command 'frob'" in refused("frob", code=2)
    assert "see `fourbit convert --help`" in refused("convert", "a", code=2)
    assert "nf4, fp4, int4" in refused("convert", "a", "b", "--codebook", "nf5", code=2)
    options = ("finetune", "--model", "m", "--data", "d", "--output", "o")
    assert "No such option" in refused(*options, "--rank", 3, code=2)
    assert "lora_dropout is 2.0" in refused(*options, "--lora-dropout", 2, code=2)
    for option, value in (
        *(("--block-size", 33), ("--threads", 0), ("--chunk-size", 1), ("--max-shard-size", -1)),
    ):
        assert option in refused("convert", "a", "b", option, value, code=2)
    for option, value in (("--max-new-tokens", 0), ("--temperature", -1), ("--top-p", 2)):
        assert option in refused("generate", "--model", "m", "-p", "a", option, value, code=2)
    assert "not one of 8, 32" in refused(*options, "--optimizer-bits", 4, code=2)
    bare = call()
    assert (bare.exit_code, bare.stdout) == (2, "")
    assert "Usage: fourbit" in bare.stderr


def test_json_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --json a program can parse stdout whatever happens; people still read stderr."""

    def error(*arguments: object, code: int) -> str:
        result = call(*arguments, "--json")
        assert result.exit_code == code
        value = json.loads(result.stdout)
        assert list(value) == ["error"]
        assert value["error"] in result.stderr
        return str(value["error"])

    missing = tmp_path / "no"
    assert str(missing) in error("verify", missing, code=1)
    assert "Missing argument" in error("verify", code=2)
    assert "No such option" in error("inspect", missing, "--frob", code=2)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fourbit.checkpoint.verify", interrupt)
    assert error("verify", missing, code=130) == "interrupted"


def test_version() -> None:
    assert call("--version").stdout == f"fourbit {fourbit.__version__}\n"


def test_faults_show_a_traceback_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, four_bit_folder: Path
) -> None:
    def broken(folder: Path, **options: object) -> None:
        raise RuntimeError("of all things")

    monkeypatch.setattr("fourbit.checkpoint.verify", broken)
    result = call("verify", four_bit_folder)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "fourbit verify: error: RuntimeError: of all things "
        "(this is a fault of fourbit's; FOURBIT_TRACEBACK=1 shows where)"
    ]
    monkeypatch.setenv("FOURBIT_TRACEBACK", "1")
    result = call("verify", four_bit_folder)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_interrupted_convert_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, plain_folder: Path, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.Meter, "update", interrupt)
    result = call("convert", plain_folder, tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; run the same command again to go on where it was\n"
    monkeypatch.undo()
    assert done("convert", plain_folder, tmp_path / "out")["quantized"] == 14


def test_the_command_line_libraries_are_asked_for() -> None:
    code = "import sys; sys.modules['typer'] = None\n" + MAIN
    result = subprocess.run(program("--help", code=code), capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "fourbit: error: the command line needs typer; install it with: "
        'pip install "fourbit[cli]"\n'
    )


@pytest.mark.parametrize("package", ["accelerate", "transformers"])
def test_missing_packages_are_asked_for(package: str, four_bit_folder: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None\n" + MAIN
    command = program("generate", "--model", four_bit_folder, "-p", "a", code=code)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("fourbit generate: error: ")
    assert package in line
    assert "pip install" in line
    assert "fault" not in line
    assert f"{package}." not in line


def test_an_interrupt_while_the_program_starts() -> None:
    code = (
        "import sys, builtins\n"
        "real = builtins.__import__\n"
        "def fake(name, *rest, **named):\n"
        "    if name == 'fourbit.cli.app': raise KeyboardInterrupt\n"
        "    return real(name, *rest, **named)\n"
        "builtins.__import__ = fake\n"
    ) + MAIN
    result = subprocess.run(program("--help", code=code), capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_an_interrupted_answer_ends_its_line(
    monkeypatch: pytest.MonkeyPatch, four_bit_folder: Path
) -> None:
    def interrupted(*_: object, stream: Any, **__: object) -> None:
        stream("An answer that")
        raise KeyboardInterrupt

    monkeypatch.setattr("fourbit.generation.generate", interrupted)
    result = call("generate", "--model", four_bit_folder, "-p", "a")
    assert (result.exit_code, result.stdout) == (130, "An answer that\n")
    assert result.stderr == "interrupted\n"


# --- progress and units -------------------------------------------------------------------------


def meter(clock: list[float]) -> progress.Meter:
    return progress.Meter(
        "reading",
        amount=screen.size,
        rate=lambda rate: f"{screen.size(rate)}/s",
        clock=lambda: clock[0],
    )


def test_progress_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    with meter(clock) as shown:
        for second in range(11):
            clock[0] = 100.0 + second
            # A resumed piece of work: what was there before counts for no rate.
            shown.update(1024 * (10 + second), 1024 * 20, "tensor")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "reading:  50%, 10.0 KiB of 20.0 KiB (tensor)",
        "reading:  75%, 15.0 KiB of 20.0 KiB, 1.0 KiB/s, 5.0 s left (tensor)",
        "reading: 100%, 20.0 KiB of 20.0 KiB, 1.0 KiB/s",
    ]


def test_the_last_line_of_progress_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    with meter(clock) as shown:
        for second, done in enumerate((0, 1024, 1024, 1024)):
            clock[0] = float(second)
            shown.update(done, 1024)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["reading:   0%", "reading: 100%"]


def test_tables_keep_their_columns_in_narrow_terminals(
    monkeypatch: pytest.MonkeyPatch, four_bit_folder: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    shown = call("inspect", four_bit_folder).stdout
    assert "model.embed_tokens" in shown
    assert "blocks of 64" in shown


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    clock = [0.0]
    with meter(clock) as shown:
        shown.update(0, 2048, "[odd] name")
        clock[0] = 1.0
        shown.update(1024, 2048, "[odd] name")
    text = written.getvalue()
    assert "50%, 1.0 KiB of 2.0 KiB, 1.0 KiB/s, 1.0 s left" in text
    assert "[odd] name" in text


def test_units() -> None:
    assert [screen.size(n) for n in (0, 1023, 1536, 150 << 20, 70 << 30, 3 << 40)] == [
        *("0 B", "1023 B", "1.5 KiB", "150 MiB", "70.0 GiB", "3.0 TiB")
    ]
    assert [screen.duration(s) for s in (0.041, 4.25, 42.4, 65, 7384)] == [
        *("0.04 s", "4.2 s", "42 s", "1:05", "2:03:04")
    ]
    assert [screen.count(n) for n in (7, 123456, 1_500_000, 6_740_000_000)] == [
        *("7", "123,456", "1.50 M", "6.74 B")
    ]


# --- the whole path -----------------------------------------------------------------------------

TRAINING = (
    *("--r", 4, "--max-steps", 40, "--batch-size", 4, "--gradient-accumulation", 1),
    *("--max-length", 64),
)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_finetune_generate_merge(
    four_bit_folder: Path, tmp_path: Path, environment: dict[str, str], sent: signal.Signals
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    command = program(
        *("finetune", "--model", four_bit_folder, "--data", FAQ, "--output", adapter),
        *(*TRAINING, "--lr", "1e-2", "--json"),
    )
    # Ctrl-C in the middle, as the terminal sends it, or a scheduler that wants the machine.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if " of 40" in line and ": 0%" not in line.replace(" ", ""):
            process.send_signal(sent)
            break
    out, rest = process.communicate(timeout=120)
    heard += rest.splitlines(keepends=True)
    assert process.returncode == 130, "".join(heard)
    assert json.loads(out)["error"].startswith("interrupted; step ")
    assert heard[-1].startswith("interrupted; step ")
    assert heard[-1].endswith("is saved; run the same command with --resume to go on\n")
    assert not (adapter / "adapter_model.safetensors").exists()

    resumed = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, check=True
    )
    report = json.loads(resumed.stdout)
    assert (report["steps"], report["loss_on"]) == (40, "assistant")
    assert report["resumed_from"] is not None
    assert report["last_loss"] < report["first_loss"]
    # Nothing of other libraries' talk, and no line twice.
    lines = resumed.stderr.splitlines()
    assert all(line.startswith(("training:", "note: ")) for line in lines), resumed.stderr
    assert len(set(lines)) == len(lines)

    question = ("--prompt", "What is NF4?", "--max-new-tokens", 12)
    tuned = done("generate", "--model", four_bit_folder, "--adapter", adapter, *question)
    streamed = call("generate", "--model", four_bit_folder, "--adapter", adapter, *question)
    assert streamed.stdout == tuned["answer"] + "\n"
    plain = done("generate", "--model", four_bit_folder, *question)
    assert plain["answer"] != tuned["answer"]

    files = ("--model", four_bit_folder, "--adapter", adapter, "--output", merged)
    assert done("merge", *files, "--dtype", "float32")["layers"] == 14
    # The merged weights are those that were trained on, so the words are the same.
    assert done("generate", "--model", merged, *question)["answer"] == tuned["answer"]
    assert done("verify", merged)["checksums"] is True
    assert "holds" in refused("merge", *files) or "empty" in refused("merge", *files)


def test_prompts_from_stdin(plain_folder: Path) -> None:
    options = ("--model", plain_folder, "--max-new-tokens", 5, "--json")
    asked = call("generate", *options, "-p", "-", input="What is NF4?\n")
    assert json.loads(asked.stdout)["prompt"] == "What is NF4?"
    raw = call("generate", *options, "-p", "What is NF4?", "--raw")
    assert json.loads(raw.stdout)["answer"] != json.loads(asked.stdout)["answer"]


def test_the_adapter_goes_beside_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []

    def seen(model: Path, data: str, output: Path, **_: object) -> None:
        asked.append(output)
        raise ValueError("enough")

    monkeypatch.setattr("fourbit.finetuning.finetune", seen)
    monkeypatch.chdir(tmp_path)
    for model in ("models/llama-4bit/", "."):
        assert "enough" in refused("finetune", "--model", model, "--data", FAQ)
    assert asked == [Path("models/llama-4bit-adapter"), Path(f"{tmp_path}-adapter")]


def test_finetune_summary(four_bit_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"text": "one two three four five"}] * 3 + [{"text": ""}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "adapter"
    files = ("--model", four_bit_folder, "--data", data, "--output", output)
    targets = ("--target-modules", "q_proj, v_proj", "--target-parameters", "none")
    held_out = ("--eval-data", data, "--eval-steps", 1)
    result = call("finetune", *files, *TRAINING, "--max-steps", 2, *targets, *held_out)
    assert result.exit_code == 0, result.stderr
    assert "note: 1 of 4 examples are empty: left out" in result.stderr
    shown = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert list(shown) == [
        *(
            "loss",
            "held out",
            "learned",
            "steps",
            "time",
            "trainable",
            "adapter",
            "peak memory",
            "loss curve",
        )
    ]
    assert shown["steps"].strip() == "2"
    assert float(shown["held out"].split()[1].rstrip(";")) > 0
    # A and B of q_proj (64 to 64) and v_proj (64 to 32), r = 4, in two blocks.
    assert shown["trainable"].split()[0] == f"{2 * 4 * (64 + 64 + 64 + 32):,}"
    config = json.loads((output / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["target_parameters"] is None
    record = json.loads((output / "fourbit_run.json").read_text())
    assert record["options"]["target_parameters"] == []
