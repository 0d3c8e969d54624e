"""The commands' common ground: the application, its errors and its exit codes."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fourbit.cli import checkpoints, doctor, screen, talk, train
from fourbit.cli.common import TRACEBACK_VARIABLE, Interrupted, debugging


class _Commands(TyperGroup):
    """All commands; what they raise becomes one sentence and an exit code."""

    _json = False

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            hint = f"; {error}" if isinstance(error, Interrupted) else ""
            typer.echo(f"interrupted{hint}", err=True)
            self._say_json(f"interrupted{hint}")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of stdout has gone, as `head` does; the interpreter must not flush again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):  # a wrong command line
                raise
            if debugging():
                traceback.print_exc()
            screen.error(_sentence(error), _name(ctx))
            self._say_json(_sentence(error))
            raise typer.Exit(1) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse the command line and run."""
        # The command line itself may be what is wrong.
        self._json = "--json" in (sys.argv[1:] if args is None else args)
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            code = 1
        except Exception as error:
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            name = _name(getattr(error, "ctx", None))
            sentence = f"{message().rstrip('.')}; see `{name} --help`"
            screen.error(sentence, name)
            self._say_json(sentence)
            code = int(getattr(error, "exit_code", 2))
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def _say_json(self, sentence: str) -> None:
        if self._json:
            screen.say_json({"error": sentence})


def _name(ctx: Any) -> str:
    if ctx is None:
        return "fourbit"
    sub = getattr(ctx, "invoked_subcommand", None)
    return "fourbit " + sub if sub and ctx.parent is None else str(ctx.command_path)


def _sentence(error: Exception) -> str:
    """One line that says what happened."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}"
    # Rust ends the system's messages with their number.
    text = re.sub(r" \(os error \d+\)", "", " ".join(text.split()))
    if isinstance(error, ImportError):
        if "pip install" in text:
            return text
        if error.name:
            package = error.name.partition(".")[0]
            return f'{package} is not installed; install it with: pip install "fourbit[all]"'
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory; try a smaller --batch-size or --max-length, or fewer --threads" + (
            f" ({text})" if text else ""
        )
    expected = (ValueError, OSError, NotImplementedError, FloatingPointError)
    known = type(error).__module__.startswith("fourbit") or isinstance(error, expected)
    if known and text:
        return text
    return (
        f"{type(error).__name__}: {text} (this is a fault of fourbit's; "
        f"{TRACEBACK_VARIABLE}=1 shows where)"
    )


app = typer.Typer(
    name="fourbit",
    cls=_Commands,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from fourbit._core import __version__

        screen.say(f"fourbit {__version__}")
        raise typer.Exit


def _debug(wanted: bool) -> None:
    if wanted:
        os.environ[TRACEBACK_VARIABLE] = "1"


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            callback=_debug,
            is_eager=True,
            help=f"Show tracebacks and all messages of libraries (or set {TRACEBACK_VARIABLE}=1).",
        ),
    ] = False,
) -> None:
    """Fine-tune large language models with the frozen base in 4 bits."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


for _command in (
    checkpoints.convert,
    checkpoints.inspect,
    checkpoints.verify,
    train.finetune,
    talk.generate,
    checkpoints.merge,
    doctor.doctor,
):
    app.command()(_command)
