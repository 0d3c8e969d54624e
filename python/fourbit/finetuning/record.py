"""The record of a run, ``fourbit_run.json``, and which checkpoint it can be resumed from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fourbit.files import replace_file
from fourbit.finetuning.options import FinetuneOptions

RECORD = "fourbit_run.json"
_FORMAT = 1
# What a resumed run may change: none of it bears on the steps that were done.
_FREE_ON_RESUME = {"epochs", "max_steps", "pager", "save_steps", "save_limit"}
OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.pt"
# What the optimizer of earlier versions' checkpoints is in.
_OLD_OPTIMIZER_FILE = "optimizer.pt"
# What a checkpoint consists of besides the optimizer; the trainer writes the last of them last.
_CHECKPOINT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    SCHEDULER_FILE,
    "rng_state.pth",
    "trainer_state.json",
)
# What tells one base model from another without reading its weights.
_IDENTITY_FILES = ("config.json", "fourbit.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class RunRecord:
    """What a run was started with.

    Attributes:
        options: all fields of `FinetuneOptions`.
        data: fingerprint of the training data.
        model: fingerprint of the base model; "" for a model that came from no folder.
        eval_data: fingerprint of the held-out data; "" for none.
        data_source: where the data came from.
        model_source: where the model came from.
        eval_source: where the held-out data came from; "" for none.
        report: what the finished run did, or None.
    """

    options: dict[str, Any]
    data: str
    model: str
    eval_data: str
    data_source: str
    model_source: str
    eval_source: str
    report: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write it into the run's folder; an older one is replaced."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"
        replace_file(folder / RECORD, lambda file: file.write(text.encode()))


def read_record(folder: Path) -> RunRecord:
    """The record of a run.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if the record is broken, or of a later version.
    """
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no run to resume ({RECORD} is missing)") from None
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); start the run again elsewhere") from None
    names = {field.name for field in fields(RunRecord)}
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is of another version of fourbit; start the run again elsewhere")
    if not names <= content.keys() or not isinstance(content["options"], dict):
        raise ValueError(f"{path} is incomplete; start the run again elsewhere")
    return RunRecord(**{name: content[name] for name in names})


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, or an adapter of any origin, that a new run would overwrite."""
    marks = (RECORD, "adapter_model.safetensors", "adapter_config.json")
    return any((folder / name).exists() for name in marks) or any(folder.glob("checkpoint-*"))


def resumed_options(record: RunRecord, given: Mapping[str, Any]) -> FinetuneOptions:
    """The options of a run that goes on: the recorded ones, and those given that may differ.

    Raises:
        ValueError: naming the first option that may not differ, and does.
    """
    known = {field.name for field in fields(FinetuneOptions)}
    before = FinetuneOptions(**{k: v for k, v in record.options.items() if k in known})
    now = FinetuneOptions(**{**asdict(before), **given})
    for name in sorted(set(given) - _FREE_ON_RESUME):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ValueError(
                f"the run was started with {name} {old!r} and cannot be resumed with {new!r}; "
                "leave the option out, or start a run in another folder"
            )
    return now


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete ``checkpoint-N`` of a run; one cut short while written is passed over."""
    found = {}
    for checkpoint in folder.glob("checkpoint-*"):
        number = checkpoint.name.removeprefix("checkpoint-")
        if number.isdecimal() and _is_complete(checkpoint):
            found[int(number)] = checkpoint
    return found[max(found)] if found else None


def steps_of(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_complete(checkpoint: Path) -> bool:
    is_old = not (checkpoint / OPTIMIZER_FILE).is_file()
    files = (_OLD_OPTIMIZER_FILE if is_old else OPTIMIZER_FILE, *_CHECKPOINT_FILES)
    return all((checkpoint / name).is_file() and _is_whole(checkpoint / name) for name in files)


def _is_whole(path: Path) -> bool:
    """Whether a file of a checkpoint was not cut off; its contents are checked when it is read."""
    if path.suffix in (".pt", ".pth"):
        # A zip archive has its directory at its end.
        return zipfile.is_zipfile(path)
    try:
        if path.suffix == ".safetensors":
            # Late: it imports torch.
            from fourbit.tensor_file import TensorFile

            TensorFile(path).close()
        else:
            json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def model_fingerprint(folder: Path) -> str:
    """SHA-256 of the files that tell a base model from another: its config and its checksums."""
    digest = hashlib.sha256()
    for name in _IDENTITY_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
