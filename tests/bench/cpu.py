"""What fourbit costs on this CPU, as ratios against 16 bits, bitsandbytes and the memory's speed.

    python tests/bench/cpu.py [--json FILE] [--only GROUP ...] [--size small]

All figures of a row come from one run, interleaved, as medians over inputs that rotate through
more memory than the last-level cache holds. A time's ratio stands behind it: how many times as
long as ours. Needs the `bench` extra; the whole takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# `cuda.py` beside this file would stand in the way of NVIDIA's Python package, which torch imports.
FOLDER = Path(__file__).resolve().parent
sys.path[:] = [str(FOLDER / "lib"), *(p for p in sys.path if Path(p).resolve() != FOLDER)]

import torch  # noqa: E402

import fourbit  # noqa: E402
from fourbit import _core  # noqa: E402
from fourbit_bench import cpu_report, tables  # noqa: E402
from fourbit_bench.cpu_report import Row  # noqa: E402
from fourbit_bench.cpu_timing import (  # noqa: E402
    FULL,
    QUICK,
    Clock,
    cache_bytes,
    measure_rates,
    processor,
)

SCRIPT = Path(__file__).resolve()


# A group's packages are imported when it runs: most need bitsandbytes, some transformers.


def _quantize(clock: Clock, small: bool) -> Iterator[Row]:
    from fourbit_bench import cpu_codes

    return cpu_codes.rows(clock, small=small)


def _convert(_: Clock, small: bool) -> Iterator[Row]:
    from fourbit_bench import cpu_convert

    return cpu_convert.rows(small=small, script=SCRIPT)


def _products(clock: Clock, small: bool) -> Iterator[Row]:
    from fourbit_bench import cpu_products

    return cpu_products.rows(clock, small=small, script=SCRIPT)


def _adamw(clock: Clock, small: bool) -> Iterator[Row]:
    from fourbit_bench import adamw_cpu

    return map(cpu_report.from_figures, adamw_cpu.rows(clock.median_seconds, small=small))


def _step(_: Clock, small: bool) -> Iterator[Row]:
    from fourbit_bench import cpu_training

    return cpu_training.rows(small=small, script=SCRIPT)


def _decode(_: Clock, small: bool) -> Iterator[Row]:
    from fourbit_bench import cpu_decode

    return cpu_decode.rows(small=small)


GROUPS: dict[str, Callable[[Clock, bool], Iterator[Row]]] = {
    "quantize": _quantize,
    "convert": _convert,
    "products": _products,
    "adamw": _adamw,
    "step": _step,
    "decode": _decode,
}


def work(name: str, arguments: list[str]) -> dict[str, float]:
    """What a group does in processes of its own, which start this script for it."""
    if name == "convert":
        from fourbit_bench.cpu_convert import work_convert

        return work_convert(*arguments)
    if name == "step":
        from fourbit_bench.cpu_training import work_step

        return work_step(*arguments)
    from fourbit_bench.cpu_products import work_one_row

    return work_one_row(*arguments)


def main() -> None:
    """Run the groups that are asked for and print their rows as one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.work[0], options.work[1:])))
        return

    small = options.size == "small"
    clock = QUICK if small else FULL
    rates = measure_rates(clock, small=small)
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "simd": _core.simd_backends()[-1],
        "cache_bytes": cache_bytes(),
        "torch": torch.__version__,
        "fourbit": fourbit.__version__,
        "copy_bytes_per_second": rates.copy,
        "read_bytes_per_second": rates.read,
    }
    print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['simd']}, last-level "
        f"cache {cache_bytes() >> 20} MiB, torch {machine['torch']}; copy "
        f"{rates.copy / 1e9:.1f} GB/s (read + written), read {rates.read / 1e9:.1f} GB/s\n"
    )
    rows = [row for name in options.only for row in GROUPS[name](clock, small)]
    print(cpu_report.table(rows, rates))
    if options.json:
        tables.write_json(options.json, machine, [row.as_json(rates) for row in rows])


if __name__ == "__main__":
    main()
