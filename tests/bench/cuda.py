"""What fourbit costs on this GPU: ratios to the card's own bandwidth and GEMM, and to bitsandbytes.

    python tests/bench/cuda.py [--json FILE] [--only NAME ...] [--size small]

Runs from an installed wheel, takes less than eight minutes, and needs the `bench` extra for the
comparison with bitsandbytes; without it, or where something of another library fails, the row says
so. How calls are timed: ``tests/bench/lib/fourbit_bench/timing.py``. The goals are stated against
the card's rates of the same run, so the figures mean something on any card; for those to be
published, let nothing else run on it, and leave its clocks alone.

That the kernels are right is shown by ``python -m pytest -m cuda``, with NVIDIA's compute-sanitizer
too; see ``tests/python/on_card.py``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

# As `cuda`, this file would stand in the way of NVIDIA's Python package, which torch imports.
FOLDER = Path(__file__).resolve().parent
sys.path[:] = [str(FOLDER / "lib"), *(p for p in sys.path if Path(p).resolve() != FOLDER)]

SECTIONS = ("codes", "products", "training", "optimizers", "paging", "decode", "step", "routes")


def main() -> int:
    """Run the sections that are asked for and print them as one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME")
    parser.add_argument("--size", choices=["full", "small"], default="full")
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("tests/bench/cuda.py measures an NVIDIA GPU, and torch sees none.", file=sys.stderr)
        return 2

    from fourbit_bench import (
        codes,
        decode,
        optimizers,
        paging,
        products,
        report,
        routes,
        step,
        tables,
        timing,
        training,
    )

    sections = {
        "codes": codes,
        "products": products,
        "training": training,
        "optimizers": optimizers,
        "paging": paging,
        "decode": decode,
        "step": step,
        "routes": routes,
    }
    started = time.perf_counter()
    small = options.size == "small"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    card = report.measure_card(small=small)
    print(f"{card}\n", flush=True)
    found: dict[str, list[report.Row]] = {}
    for name in options.only:
        section = found.setdefault(name, [])
        try:
            for row in sections[name].rows(small=small):
                section.append(row)
                print(f"{time.perf_counter() - started:5.0f} s  {row.name}", file=sys.stderr)
        except Exception as error:  # one section's failure must not lose the others' figures
            section.append(report.Row(f"{name}: the rest", {report.OURS: timing.why(error)}))
        # The next section's matrices need the memory of this one's.
        gc.collect()
        torch.cuda.empty_cache()
    everything = [row for section in found.values() for row in section]
    swept = found.pop("routes", [])
    print(report.table(card, [row for section in found.values() for row in section]))
    if swept:
        print(f"\n{report.table(card, swept, ours=routes.TENSOR)}\n")
        print("\n".join(routes.crossovers(swept)))
    seconds = time.perf_counter() - started
    print(f"\n{len(everything)} rows in {seconds:.0f} s.")
    if options.json:
        machine = {**card.facts, "seconds": seconds}
        tables.write_json(options.json, machine, [row.as_json(card) for row in everything])
    return 0


if __name__ == "__main__":
    sys.exit(main())
