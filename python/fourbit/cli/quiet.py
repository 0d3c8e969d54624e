"""Which messages of other libraries reach the screen.

Progress bars, deprecations and advice about options that the user never gave are noise. What TRL
says about the data, and runtime warnings such as those of a number that is not finite, are kept.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourbit.cli.screen import note

_PACKAGE = str(Path(__file__).resolve().parents[1])


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def quiet_libraries(*, everything: bool = False) -> Iterator[None]:
    """Keep noise off the screen for as long as this lasts.

    Args:
        everything: let all messages through, to look for a fault.
    """
    if everything:
        yield
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    levels = {name: logging.getLogger(name).level for name in ("bitsandbytes", "accelerate")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    handler = _Notes(logging.WARNING)
    ours = [logging.getLogger(name) for name in ("fourbit", "trl")]
    for logger in ours:
        logger.addHandler(handler)
        logger.propagate = False
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
        if issubclass(category, RuntimeWarning) or filename.startswith(_PACKAGE):
            note(str(message))

    warnings.showwarning = show  # type: ignore[assignment]  # the rest is of no interest
    try:
        _hide_loading_bars()
        yield
    finally:
        warnings.showwarning = shown
        for logger in ours:
            logger.removeHandler(handler)
            logger.propagate = True
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _hide_loading_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
