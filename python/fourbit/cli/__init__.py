"""The ``fourbit`` command.

==============  ==================================================================================
``app``         the commands' common ground: options, errors, exit codes
``screen``      what is printed where, and in which units
``progress``    progress with rate and time left
``quiet``       which messages of other libraries reach the screen
``checkpoints`` ``convert``, ``inspect``, ``verify``, ``merge``
``train``       ``finetune``
``talk``        ``generate``
``doctor``      ``doctor``
==============  ==================================================================================

Results go to stdout; progress, notes and errors to stderr. With ``--json`` stdout is one JSON
object whatever happens: the result, or ``{"error": "the sentence"}``. Exit codes: 0 done, 1 an
error, said in one sentence, 2 a wrong command line, 130 interrupted.
"""

import sys


def main() -> None:
    """Entry point of the ``fourbit`` command."""
    try:
        try:
            import rich  # noqa: F401
            import typer  # noqa: F401
        except ModuleNotFoundError as error:
            print(
                f"fourbit: error: the command line needs {error.name}; install it with: "
                'pip install "fourbit[cli]"',
                file=sys.stderr,
            )
            sys.exit(1)
        from fourbit.cli.app import app
    except KeyboardInterrupt:
        # Once the application is there, it says this itself.
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    app()
