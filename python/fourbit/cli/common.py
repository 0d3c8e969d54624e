"""What the commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, TypeAlias, TypeVar

import typer

TRACEBACK_VARIABLE = "FOURBIT_TRACEBACK"
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")
]
Value = TypeVar("Value", str, int, None)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence on how to go on."""


def debugging() -> bool:
    """Whether tracebacks and all messages of libraries are wanted."""
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def one_of(*choices: str | int) -> Callable[[Value], Value]:
    """A callback that lets only these values of an option pass."""

    def check(value: Value) -> Value:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(str, choices))}")
        return value

    return check
