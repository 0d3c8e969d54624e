"""``tests/bench/cpu.py`` in small: that every group runs and says what it measured."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes")

SCRIPT = Path(__file__).parents[1] / "bench" / "cpu.py"


def bench(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def test_a_small_run_gives_every_row(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    table = bench("--size", "small", "--only", "products", "adamw", "decode", "--json", str(file))
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["machine"]["read_bytes_per_second"] > 0
    rows = {row["row"]: row for row in found["rows"]}
    for count in (1, 8, 64, 512):
        assert f"M = {count}, 256 x 320, bf16" in rows
    assert {"M = 512, forward + backward, 256 x 320, bf16", "M = 512, 256 x 320, f32"} <= set(rows)
    assert sum("AdamW" in name for name in rows) == 4
    assert sum("greedy decode" in name for name in rows) == 1
    for name, row in rows.items():
        assert f"| {name} |" in table
        assert all(value > 0 and math.isfinite(value) for value in row["milliseconds"].values())
        assert all(goal["met"] in (True, False) for goal in row["goals"])
    assert {"fourbit", "torch", "bitsandbytes"} <= set(
        rows["M = 8, 256 x 320, bf16"]["milliseconds"]
    )


@pytest.mark.parametrize("kind", ["fourbit", "bf16", "bitsandbytes"])
def test_a_small_step_in_a_process_of_its_own(kind: str) -> None:
    result = json.loads(bench("--work", "step", kind, "small").splitlines()[-1])
    assert result["seconds"] > 0
    assert result["elements"] == 2 * (4 * 128**2 + 3 * 128 * 192)
    assert 10 << 20 < result["peak"] < 8 << 30
