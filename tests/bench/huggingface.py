"""Scripts of the Hugging Face stack with bitsandbytes and with fourbit, side by side.

    python tests/bench/huggingface.py [--json FILE] [--only NAME ...]

Each script runs in a process of its own, once with either engine, with the same seed and the same
data: they differ by ``fourbit.replace_bitsandbytes()``. What is compared stands in
`fourbit_bench.scripts`. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `cuda.py` beside this file would stand in the way of NVIDIA's Python package, which torch imports.
FOLDER = Path(__file__).resolve().parent
sys.path[:] = [str(FOLDER / "lib"), *(p for p in sys.path if Path(p).resolve() != FOLDER)]

from fourbit_bench import tables  # noqa: E402

ENGINES = ("bitsandbytes", "fourbit")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
CHILD = """
import json, sys
from pathlib import Path
import torch, transformers, peft, trl
if sys.argv[2] == "fourbit":
    import fourbit
    fourbit.replace_bitsandbytes()
from fourbit_bench import scripts
result = scripts.run(sys.argv[1], Path(sys.argv[3]))
Path(sys.argv[4]).write_text(json.dumps(result))
"""


def run(name: str, engine: str, work: Path) -> dict[str, Any]:
    """One script with one engine, in a process of its own."""
    folder = work / f"{name}-{engine}"
    folder.mkdir()
    result = work / f"{name}-{engine}.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, engine, str(folder), str(result)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} with {engine} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def rows(name: str, results: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """What the table says of one script: a line for each figure that it has."""
    theirs, ours = (results[engine] for engine in ENGINES)

    def both(what: str, key: str, form: str) -> Iterator[list[str]]:
        cells = [
            form.format(result[key]) if key in result else result.get("error", "")
            for result in (theirs, ours)
        ]
        if any(key in result for result in (theirs, ours)):
            yield [name, what, *cells]

    if any({"losses", "error"} & result.keys() for result in (theirs, ours)):
        cells = [
            f"{r['losses'][0]:.4f} -> {r['losses'][-1]:.4f}"
            if r.get("losses")
            else r.get("error", "")
            for r in (theirs, ours)
        ]
        yield [name, "loss", *cells]
    if theirs.get("losses") and ours.get("losses"):
        apart = max(abs(a - b) for a, b in zip(theirs["losses"], ours["losses"], strict=True))
        yield [name, f"largest difference in {len(ours['losses'])} steps", "", f"{apart:.4f}"]
    yield from both("answer", "answer", "{}")
    yield from both("change of logits by merging", "merged", "{:.3f}")
    yield from both("left of it after unmerging", "unmerged", "{:.1e}")
    yield from both("load and quantize, s", "load_s", "{:.1f}")
    yield from both("save, s", "save_s", "{:.1f}")
    yield from both("load again, s", "reload_s", "{:.1f}")
    yield from both("equal logits after that", "equal", "{}")
    yield from both("parameters, MB", "memory_mb", "{:.1f}")
    yield from both("files, MB", "file_mb", "{:.1f}")
    yield from both("a token, ms", "ms_a_token", "{:.0f}")
    yield from both("a step, s", "s_a_step", "{:.1f}")
    yield from both("graph breaks", "graph_breaks", "{}")
    yield [name, "time, s", *(f"{r['seconds']:.1f}" for r in (theirs, ours))]
    yield [name, "peak memory, MB", *(f"{r['peak'] / 1e6:.0f}" for r in (theirs, ours))]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    from fourbit_bench.scripts import SCRIPTS

    machine = {
        "machine": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        **{package: version(package) for package in PACKAGES},
    }
    print(json.dumps(machine))
    measured = []
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only or SCRIPTS:
            results = {engine: run(name, engine, Path(scratch)) for engine in ENGINES}
            measured.append({"script": name, **results})
            lines.extend(rows(name, results))
            print(f"{name} done", file=sys.stderr, flush=True)
    print(tables.markdown(("script", "figure", *ENGINES), lines))
    if options.json:
        tables.write_json(options.json, machine, measured)


if __name__ == "__main__":
    main()
