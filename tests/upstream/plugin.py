"""A pytest plugin that lets tests of other projects run here, on a CPU, offline, in 4 bits by us.

It changes no line of a test. What a test imports is prepared before: the name
``BitsAndBytesConfig`` (the config line), the hub's cache (`models`), one data set, and marks that
skip a test only because there is no GPU. The mode is in the environment:

- ``bitsandbytes``: everything as it is.
- ``portable``: the same, without the repacking that bitsandbytes does on a processor with AVX-512
  BF16. What passes in one of the two can pass here at all.
- ``takeover``: ``fourbit.replace_bitsandbytes()`` before the first test, and nothing else.
- ``config``: ``BitsAndBytesConfig(load_in_4bit=True, ...)`` makes a ``fourbit.NF4Config``.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

MODE = os.environ["UPSTREAM_MODE"]
RESULTS = Path(os.environ["UPSTREAM_RESULTS"])
OUR_CLASSES = os.environ.get("UPSTREAM_CLASSES") == "ours"

# Reasons of skips that only say "no GPU here".
LIFTED = (
    "test requires a hardware accelerator",
    "test requires a GPU or XPU",
    "test requires GPU",
    "GPU tests require hardware accelerator",
    "Bnb 4 bit quant with CPU results in high variance",
)


def is_lifted(reason: str) -> bool:
    return reason.startswith(LIFTED)


def lift_module_skips() -> None:
    """A module that skips itself without a GPU is collected."""
    skip = pytest.skip

    @functools.wraps(skip)
    def selective(reason: str = "", **options: Any) -> None:
        if not is_lifted(reason):
            skip(reason, **options)

    selective.Exception = skip.Exception  # type: ignore[attr-defined]
    pytest.skip = selective  # type: ignore[assignment]


def use_local_data() -> None:
    import datasets
    from models import quotes

    rows = {"quote": quotes()}
    rows |= {"author": ["nobody"] * len(rows["quote"]), "tags": [["none"]] * len(rows["quote"])}
    local = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    load = datasets.load_dataset

    def load_dataset(name: str, *arguments: Any, **options: Any) -> Any:
        if name.endswith(("english_quotes_copy", "english_quotes")):
            return local
        return load(name, *arguments, **options)

    datasets.load_dataset = load_dataset


def train_in_fp16() -> None:
    """``fp16=True`` of a Trainer is autocast here; accelerate has it for GPUs only."""
    import torch
    import transformers

    init = transformers.TrainingArguments.__init__
    context = transformers.Trainer.compute_loss_context_manager

    @functools.wraps(init)
    def on_cpu(self: Any, *arguments: Any, fp16: bool = False, **options: Any) -> None:
        init(self, *arguments, use_cpu=True, **options)
        self._upstream_fp16 = fp16

    def with_autocast(self: Any) -> Any:
        if getattr(self.args, "_upstream_fp16", False):
            return torch.autocast("cpu", dtype=torch.float16)
        return context(self)

    transformers.TrainingArguments.__init__ = on_cpu
    transformers.Trainer.compute_loss_context_manager = with_autocast


def name_cuda_cpu() -> None:
    """``.to("cuda")``, ``.to(0)`` and ``.cuda()`` are names of the one device that there is."""
    import bitsandbytes
    import torch

    def renamed(device: Any) -> Any:
        if (isinstance(device, str) and device.startswith("cuda")) or (
            isinstance(device, int) and not isinstance(device, bool)
        ):
            return "cpu"
        return device

    for owner in (torch.Tensor, torch.nn.Module, bitsandbytes.nn.Params4bit):
        move = owner.to

        @functools.wraps(move)
        def to(self: Any, *arguments: Any, move: Any = move, **options: Any) -> Any:
            if arguments:
                arguments = (renamed(arguments[0]), *arguments[1:])
            if "device" in options:
                options["device"] = renamed(options["device"])
            return move(self, *arguments, **options)

        owner.to = to  # type: ignore[method-assign]
        owner.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def leave_weights_packed_as_they_are() -> None:
    import bitsandbytes.backends.cpu.ops
    import bitsandbytes.nn.modules

    for module in (bitsandbytes.nn.modules, bitsandbytes.backends.cpu.ops):
        module.has_avx512bf16 = lambda: False


def use_config_line() -> None:
    """``BitsAndBytesConfig`` becomes a maker of ``NF4Config``, where it asks for 4 bits."""
    import transformers
    from config_line import translate

    transformers.BitsAndBytesConfig = translate(transformers.BitsAndBytesConfig)


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes", "torch_compile_test"):
        config.addinivalue_line("markers", f"{marker}: of the other project")
    lift_module_skips()
    name_cuda_cpu()
    use_local_data()
    train_in_fp16()
    if MODE == "takeover":
        import fourbit

        fourbit.replace_bitsandbytes()
    elif MODE == "config":
        use_config_line()
    elif MODE == "portable":
        leave_weights_packed_as_they_are()
    elif MODE != "bitsandbytes":
        modes = "bitsandbytes, portable, takeover, config"
        raise pytest.UsageError(f"the mode {MODE!r} is none of {modes}")


def _keep_mark(mark: pytest.Mark) -> bool:
    if mark.name not in ("skip", "skipif"):
        return True
    return not is_lifted(str(mark.kwargs.get("reason", "")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from cases import counts

    others = [item for item in items if not counts(item.nodeid)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if counts(item.nodeid)]
    for item in items:
        for node in item.listchain():
            node.own_markers[:] = [mark for mark in node.own_markers if _keep_mark(mark)]
        _hub_was_asked(item)
        if OUR_CLASSES:
            _accept_our_classes(item)


def _hub_was_asked(item: pytest.Item) -> None:
    """PEFT's tests go online the first time that they want a model; every model is here."""
    import sys

    from models import ADAPTERS, TINY

    for name, module in list(sys.modules.items()):
        if name.endswith("tests.testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            known = [*TINY, *ADAPTERS, *(f"{model}tokenizer" for model in TINY)]
            module._HUB_MODEL_ACCESSES.update(dict.fromkeys(known, 1))


def _accept_our_classes(item: pytest.Item) -> None:
    """``isinstance`` with a class of bitsandbytes or PEFT also takes ours of the same meaning."""
    from config_line import accept_our_classes

    module = getattr(item, "module", None)
    if module is not None:
        accept_our_classes(module)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    message = ""
    if report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr)
    record = {
        "test": report.nodeid,
        "phase": report.when,
        "outcome": report.outcome,
        "xfail": hasattr(report, "wasxfail"),
        "seconds": round(report.duration, 2),
        "message": message[:2000],
        "trace": str(report.longrepr)[-6000:] if report.outcome == "failed" else "",
    }
    with RESULTS.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
