"""The package's face: every name is where it says, and nothing heavy is imported for it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fourbit


def test_lazy_names_agree_with_the_typed_imports() -> None:
    tree = ast.parse(Path(fourbit.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    eager = {"CheckpointError", "CudaError", "NonFiniteError", "__version__"}
    assert set(typed) == set(fourbit._MODULE_OF) == set(fourbit.__all__) - eager
    for name, module in typed.items():
        assert getattr(fourbit, name) is getattr(importlib.import_module(str(module)), name)


def test_submodules_are_attributes() -> None:
    code = "import fourbit; print(fourbit.lora.add_lora, fourbit.ops, fourbit.integrations)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unknown_names_are_named() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = fourbit.no_such_name
    assert {"convert", "lora", "__version__"} <= set(dir(fourbit))


@pytest.mark.parametrize("command", [[], ["convert"], ["finetune"]])
def test_help_waits_for_no_heavy_library(command: list[str]) -> None:
    code = (
        "import sys; from fourbit.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert done.stdout.endswith("[]\n")
