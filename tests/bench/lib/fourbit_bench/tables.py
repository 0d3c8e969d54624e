"""How the benches show what they measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, for a terminal and for the README."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: Path, machine: Mapping[str, object], rows: Sequence[object]) -> None:
    """The same for programs: what was measured, and where."""
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
