"""``generate``: an answer from a model, with or without an adapter."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fourbit.cli import screen
from fourbit.cli.common import Json, debugging
from fourbit.cli.quiet import quiet_libraries


def generate(
    model: Annotated[
        Path, typer.Option(show_default=False, help="A model folder, 4-bit or plain.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", show_default=False, help="The text; - reads stdin.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(show_default=False, help="The folder of an adapter.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The answer's greatest length, in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time; above 0 draws.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Draw from the likeliest tokens that hold this much probability."
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, show_default="another each time", help="Of the draws."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            show_default="--chat if the tokenizer has a chat template",
            help="Put the prompt into the chat template, or take it as it is.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Answer a prompt, as the text is written."""
    text = sys.stdin.read().strip() if prompt == "-" else prompt
    with quiet_libraries(everything=debugging()):
        from fourbit.generation import generate as run
        from fourbit.generation import load_for_generation

        loaded, tokenizer = load_for_generation(model, adapter=adapter)
        start = time.perf_counter()
        try:
            answer = run(
                loaded,
                tokenizer,
                text,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                chat=chat,
                stream=None if json else _write,
            )
        except KeyboardInterrupt:
            if not json:
                screen.say("")  # what is said next begins a line
            raise
    if json:
        seconds = time.perf_counter() - start
        screen.say_json({"prompt": text, "answer": answer, "seconds": seconds})
    else:
        screen.say("")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
