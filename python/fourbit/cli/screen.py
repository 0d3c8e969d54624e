"""What is printed where, and in which units."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

# What the table of `inspect` needs to show a part of every column.
_TABLE_WIDTH = 140


def say(text: str) -> None:
    """A line of the result, on stdout."""
    typer.echo(text)


def say_json(value: Any) -> None:
    """The whole result for a program, on stdout."""
    typer.echo(json.dumps(value, indent=2, default=str))


def note(text: str) -> None:
    """A line that is not part of the result, on stderr."""
    typer.echo(f"note: {text}", err=True)


def error(text: str, command: str = "fourbit") -> None:
    """The sentence that says why the command failed, on stderr."""
    typer.echo(f"{command}: error: {text}", err=True)


def stderr_console() -> Console:
    """For progress bars; made anew, so that a redirected stderr is seen."""
    return Console(file=sys.stderr)


def table_console() -> Console:
    """For tables on stdout; not narrower than they are where it is not a terminal.

    In a narrow terminal lines are broken by the terminal: rich would leave out whole columns.
    """
    console = Console(file=sys.stdout)
    width = max(console.width, _TABLE_WIDTH) if console.is_terminal else 160
    return Console(file=sys.stdout, width=width)


def plain(text: str) -> str:
    """Text that rich prints as it is."""
    return escape(text)


def size(count: float) -> str:
    """Bytes in binary units: 1536 is "1.5 KiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}" if count < 100 else f"{count:.0f} {unit}"
    return f"{count / 1024:.1f} TiB"


def duration(seconds: float) -> str:
    """0.04 s, 4.2 s, 42 s, 1:05 or 2:03:04."""
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: int) -> str:
    """123,456 in full, 6.7 B for large numbers of parameters."""
    for scale, unit in ((1e9, "B"), (1e6, "M")):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """1 tensor, 2 tensors."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
