"""Files that are there whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file durably beside a path, under a name of its own; the caller renames it.

    Args:
        path: where the file will be in the end.
        write: given the open file, which it may also seek in.

    Returns:
        The path of what was written, in the folder of `path`. After an error nothing is there.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = aside.open("xb")
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file durably: at every moment the path has the old file or the whole new one.

    Raises:
        OSError: naming the path, if it cannot be written; it is as it was then.
    """
    try:
        aside = write_aside(path, write)
        try:
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        # The name that the system knows is that of the file aside, or none: a full disk.
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing this path; no other may be writing it."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
