"""Progress with rate and time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fourbit.cli.screen import duration, plain, stderr_console

# Between two lines where stderr is a file, in seconds.
_LINE_EVERY = 5.0


class Meter:
    """Progress of one piece of work, on stderr.

    Args:
        label: what is being done.
        amount: how to write an amount of work, such as bytes.
        rate: how to write an amount of work a second.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        label: str,
        *,
        amount: Callable[[float], str],
        rate: Callable[[float], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._amount = amount
        self._rate = rate
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._last_line = float("-inf")
        self._final: str | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Meter:
        """Show an empty bar, on a terminal."""
        console = stderr_console()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[status]}"),
                console=console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None, status="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar away, or write the last line, once."""
        if self._bar is not None:
            self._bar.stop()
        if self._final is not None:
            typer.echo(self._final, err=True)
            self._final = None

    def update(self, done: float, total: float, detail: str = "") -> None:
        """Say how far the work is.

        Args:
            done: amount of work done; the first call's is taken as done before.
            total: amount of work in all.
            detail: what is under way.
        """
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        status = self._status(now, done, total)
        if self._bar is not None and self._task is not None:
            text = f"{status}  {detail}" if detail else status
            self._bar.update(self._task, completed=done, total=total, status=plain(text))
            return
        if done >= total:
            # More updates may come, with the last loss: only the last of them is written.
            self._final = f"{self._label}: {status}"
        elif now - self._last_line >= _LINE_EVERY:
            typer.echo(f"{self._label}: {status}" + (f" ({detail})" if detail else ""), err=True)
            self._last_line = now

    def _status(self, now: float, done: float, total: float) -> str:
        assert self._first is not None
        share = 100 * done / total if total else 100.0
        parts = [f"{share:3.0f}%", f"{self._amount(done)} of {self._amount(total)}"]
        elapsed, fresh = now - self._first[0], done - self._first[1]
        if elapsed > 0 and fresh > 0:
            per_second = fresh / elapsed
            parts.append(self._rate(per_second))
            if done < total:
                parts.append(f"{duration((total - done) / per_second)} left")
        return ", ".join(parts)
