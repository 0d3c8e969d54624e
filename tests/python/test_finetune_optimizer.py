"""The optimizer of a fine-tuning run: its file in checkpoints, its pager in log and report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open

import emulate
import emulated_optimizer
import fourbit
from conftest import REPOSITORY
from fake_card import FakeCard
from fourbit.cli import train as cli_train
from fourbit.finetuning import FinetuneReport, FinetuneStoppedError, options, trainer
from fourbit.finetuning.options import FinetuneOptions
from fourbit.finetuning.paging import PagingLog
from fourbit.finetuning.record import RunRecord, latest_checkpoint, read_record, resumed_options
from fourbit.optim import PagedAdamW, PagingReport
from fourbit.optim.paging import PagerName

FAQ = REPOSITORY / "examples" / "data" / "faq.jsonl"
# With r = 64 some adapters have the 4096 elements from which on state is kept in 8 bits.
OPTIONS: dict[str, Any] = {
    "r": 64,
    "lora_dropout": 0.2,
    "lr": 1e-3,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "max_length": 64,
    "max_steps": 6,
    "save_steps": 3,
}
FILE = "optimizer.safetensors"


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    threads(1)


def run(model: Path, output: Path, **given: Any) -> FinetuneReport:
    return fourbit.finetune(model, FAQ, output, **{**OPTIONS, **given})


@pytest.fixture(scope="module")
def finished(four_bit_folder: Path, tmp_path_factory: Any) -> dict[int, tuple[Path, Any]]:
    """Uninterrupted runs, by the width of their state."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {}
    for bits in (8, 32):
        output = tmp_path_factory.mktemp("runs") / str(bits)
        runs[bits] = (output, run(four_bit_folder, output, optimizer_bits=bits))
    torch.set_num_threads(before)
    return runs


def assert_same_end(one: Path, other: Path) -> None:
    names = ("adapter_model.safetensors", f"checkpoint-6/{FILE}")
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_ends_in_the_same_bytes(
    finished: Any, four_bit_folder: Path, tmp_path: Path, bits: int, at: int
) -> None:
    whole, report = finished[bits]
    with safe_open(whole / "checkpoint-3" / FILE, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == ({"U8", "F32"} if bits == 8 else {"F32"})
    output, steps = tmp_path / "stopped", []
    with pytest.raises(FinetuneStoppedError):
        run(
            four_bit_folder,
            output,
            optimizer_bits=bits,
            progress=lambda now: steps.append(now.step),
            should_stop=lambda: len(steps) > 0 and steps[-1] >= at - 1,
        )
    resumed = fourbit.finetune(four_bit_folder, FAQ, output, resume=True)
    assert resumed.resumed_from == at
    assert resumed.last_loss == report.last_loss
    assert_same_end(output, whole)


def cut_back(whole: Path, output: Path) -> Path:
    """A copy of a run as it was after its first checkpoint; the path of that."""
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoint-6")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (output / name).unlink()
    return output / "checkpoint-3"


@pytest.mark.parametrize("bits", [8, 32])
def test_checkpoints_of_earlier_versions(
    finished: Any, four_bit_folder: Path, tmp_path: Path, bits: int
) -> None:
    """They have the state dict in ``optimizer.pt``."""
    whole, _ = finished[bits]
    output = tmp_path / "old"
    checkpoint = cut_back(whole, output)
    state: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(checkpoint / FILE, "pt") as file:
        groups = json.loads(file.metadata()["fourbit.optimizer"])["param_groups"]
        for name in file.keys():  # noqa: SIM118
            _, index, field = name.split(".")
            state.setdefault(int(index), {})[field] = file.get_tensor(name)
    for group in groups:
        group["betas"] = tuple(group["betas"])
    (checkpoint / FILE).unlink()
    assert latest_checkpoint(output) is None
    torch.save({"state": state, "param_groups": groups}, checkpoint / "optimizer.pt")
    assert latest_checkpoint(output) == checkpoint
    resumed = fourbit.finetune(four_bit_folder, FAQ, output, resume=True)
    assert resumed.resumed_from == 3
    assert_same_end(output, whole)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import fourbit, fourbit.optim.files as files

torch.set_num_threads(1)
write, saves = files.write_tensors, []

class Dying:
    def __init__(self, file):
        self.file, self.left = file, 50_000

    def seek(self, position):
        self.file.seek(position)

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(data)

def dying(file, *arguments, **options):
    saves.append(file)
    write(file if len(saves) < 2 else Dying(file), *arguments, **options)

files.write_tensors = dying
model, data, output, *options = sys.argv[1:]
fourbit.finetune(model, data, output, **eval(options[0]))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_while_the_optimizer_is_written(
    finished: Any, four_bit_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, four_bit_folder, FAQ, output, repr(OPTIONS)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (output / "checkpoint-6").glob(f".{FILE}.*.tmp")
    assert left.stat().st_size > 10_000
    assert not (output / "checkpoint-6" / FILE).exists()
    assert latest_checkpoint(output) == output / "checkpoint-3"
    resumed = fourbit.finetune(four_bit_folder, FAQ, output, resume=True)
    assert resumed.resumed_from == 3
    assert_same_end(output, finished[8][0])
    assert not list((output / "checkpoint-6").glob("*.tmp"))
    assert not left.exists()


def test_damage_is_said_before_a_step_is_done(
    finished: Any, four_bit_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "damaged"
    path = cut_back(finished[8][0], output) / FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(fourbit.CheckpointError, match=r"checkpoint-3/.*state\.\d+\.\w+ does not"):
        fourbit.finetune(four_bit_folder, FAQ, output, resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="open files are named in /proc")
def test_a_full_disk_is_said(
    finished: Any, four_bit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        calls.append(FILE in name)
        if sum(calls) == 2 and calls[-1]:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    output = tmp_path / "full"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"step 6 cannot be written to .*full \(No space left"):
        run(four_bit_folder, output)
    monkeypatch.undo()
    assert not list((output / "checkpoint-6").glob(f"*{FILE}*"))
    assert fourbit.finetune(four_bit_folder, FAQ, output, resume=True).resumed_from == 3
    assert_same_end(output, finished[8][0])


# --- the pager ------------------------------------------------------------------------------------


class StandIn(PagedAdamW):
    """Reports as if state moved at each step: 10 n bytes in at step n, and half as many out."""

    reported = "unified"

    def __init__(self, *arguments: Any, pager: str = "auto", **given: Any) -> None:
        super().__init__(*arguments, **given)
        self.asked_for = pager
        self.done = 0

    def step(self, closure: Any = None) -> Any:
        self.done += 1
        if self.done == 2:
            self.param_groups[0]["params"][3].grad.fill_(torch.nan)
        return super().step(closure)

    def paging_report(self) -> PagingReport:
        moved = 10 * self.done * (self.done + 1) // 2
        return PagingReport(
            pagers={"cuda:0": self.reported},
            resident_bytes=100 + self.done,
            bytes_in=moved,
            bytes_out=moved // 2,
            seconds_waiting=self.done / 4,
        )


def entries_of(output: Path) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    return [entry for entry in logged if "loss" in entry]


def test_the_log_has_what_was_moved(
    four_bit_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[StandIn] = []

    class Recorded(StandIn):
        def __init__(self, *arguments: Any, **given: Any) -> None:
            super().__init__(*arguments, **given)
            made.append(self)

    monkeypatch.setattr(trainer, "PagedAdamW", Recorded)
    output = tmp_path / "run"
    with pytest.warns(RuntimeWarning, match="skipped the update of parameter 3"):
        report = run(
            four_bit_folder, output, logging_steps=2, eval_data=FAQ, eval_steps=6, max_length=32
        )
    assert [one.asked_for for one in made] == ["auto"]
    entries = entries_of(output)
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    # 10 (1 + 2), then 10 (3 + 4) and 10 (5 + 6).
    assert [entry["paging_bytes_in"] for entry in entries] == [30, 70, 110]
    assert [entry["paging_bytes_out"] for entry in entries] == [15, 35, 55]
    assert [entry["paging_seconds_waiting"] for entry in entries] == [0.5, 0.5, 0.5]
    assert [entry["paging_resident_bytes"] for entry in entries] == [102, 104, 106]
    # With the losses alone: neither with held-out data nor with the summary at the end.
    lines = (output / "loss.jsonl").read_text().splitlines()
    assert sum("paging" in line for line in lines) == 3 < len(lines)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (output / "runs").iterdir()
    seen = EventAccumulator(str(events)).Reload()
    scalars = seen.Scalars("train/paging_bytes_in")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(2, 30), (4, 70), (6, 110)]

    assert report.pager == "unified"
    assert (report.paging_bytes_in, report.paging_bytes_out) == (210, 105)
    assert report.paging_seconds_waiting == 1.5
    assert report.skipped_updates == 1
    recorded = read_record(output).report
    assert recorded is not None
    assert recorded["pager"] == "unified"
    assert recorded["paging_bytes_in"] == 210
    cli_train._say_report(report)
    shown = capsys.readouterr().out
    assert "paging:      unified: 210 B in, 105 B out, 1.5 s waiting\n" in shown
    assert "skipped:     1 update of single tensors, for NaN or infinity in the gradient\n" in shown
    assert all(":" in line[:13] and line[12] == " " for line in shown.splitlines())

    # A resumed run counts skipped updates on, and what it moved itself; the log is whole.
    with pytest.warns(RuntimeWarning, match="2 updates so far"):
        again = fourbit.finetune(
            four_bit_folder, FAQ, output, eval_data=FAQ, resume=True, max_steps=8, pager="resident"
        )
    assert [one.asked_for for one in made] == ["auto", "resident"]
    assert again.skipped_updates == 2
    assert again.paging_bytes_in == 30
    assert [entry["paging_bytes_in"] for entry in entries_of(output)] == [30, 70, 110, 30]


def test_a_run_on_a_full_card_is_paged_before_and_after_it_is_resumed(
    four_bit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that is not there: the same bytes as on the CPU, at the end of each."""
    if emulate.unavailable():
        pytest.skip(emulate.unavailable())
    given = {"r": 4, "logging_steps": 2, "optimizer_bits": 32}
    run(four_bit_folder, tmp_path / "cpu", **given)
    emulated_optimizer.patch(monkeypatch, FakeCard(3 * emulated_optimizer.PAGE))
    output = tmp_path / "card"
    with pytest.raises(FinetuneStoppedError):
        run(four_bit_folder, output, **given, pager="unified", should_stop=lambda: True)
    again = fourbit.finetune(four_bit_folder, FAQ, output, resume=True)
    assert_same_end(output, tmp_path / "cpu")
    assert again.pager == "unified"
    entries = entries_of(output)
    assert [entry["step"] for entry in entries] == [1, 2, 4, 6]
    assert all(entry["paging_bytes_in"] > 0 for entry in entries)
    assert again.paging_bytes_in == sum(entry["paging_bytes_in"] for entry in entries[1:])


def test_nothing_is_logged_where_nothing_moves(
    finished: Any,
    four_bit_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, report = finished[8]
    assert not any("paging" in line for line in (output / "loss.jsonl").read_text().splitlines())
    assert (report.pager, report.paging_bytes_in, report.skipped_updates) == ("resident", 0, 0)
    cli_train._say_report(report)
    shown = capsys.readouterr().out
    assert "paging" not in shown
    assert "skipped" not in shown
    # An optimizer that says so.
    monkeypatch.setattr(StandIn, "reported", "resident")
    monkeypatch.setattr(StandIn, "step", PagedAdamW.step)
    monkeypatch.setattr(trainer, "PagedAdamW", StandIn)
    report = run(four_bit_folder, tmp_path / "run")
    assert not any("paging" in line for line in map(str, entries_of(tmp_path / "run")))
    assert report.pager == "resident"
    assert_same_end(tmp_path / "run", output)


def test_figures_are_those_since_the_last_entry() -> None:
    optimizer = StandIn([torch.nn.Parameter(torch.ones(3))])
    log = PagingLog(optimizer)
    assert log.entry()["paging_bytes_in"] == 0
    optimizer.done = 3
    assert log.entry()["paging_bytes_in"] == 60
    assert log.entry() == {
        "paging_bytes_in": 0,
        "paging_bytes_out": 0,
        "paging_seconds_waiting": 0.0,
        "paging_resident_bytes": 103,
    }


def test_the_pagers_are_those_of_the_optimizer() -> None:
    assert get_args(options.Pager) == get_args(PagerName)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can page")
@pytest.mark.parametrize("pager", ["unified", "pinned"])
def test_a_pager_that_the_machine_has_not_is_said_at_once(
    four_bit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pager: str
) -> None:
    def late(*_: object) -> None:
        raise AssertionError("the model is read first")

    monkeypatch.setattr("fourbit.finetuning.run.load_model", late)
    with pytest.raises(ValueError, match=f'"{pager}" needs parameters on a GPU.*or "resident"'):
        run(four_bit_folder, tmp_path / "run", pager=pager)
    assert not (tmp_path / "run").exists()


def test_the_pager_may_differ_when_a_run_goes_on() -> None:
    before = asdict(FinetuneOptions(lr=0.5))
    record = RunRecord(before, "", "", "", "", "", "")
    assert resumed_options(record, {}).pager == "auto"
    assert resumed_options(record, {"pager": "pinned"}).pager == "pinned"
    # Records of versions that had no such option.
    older = replace(record, options={k: v for k, v in before.items() if k != "pager"})
    assert resumed_options(older, {"pager": "unified"}) == FinetuneOptions(lr=0.5, pager="unified")
