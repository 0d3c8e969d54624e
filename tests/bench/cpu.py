"""What fourbit costs on this CPU, as ratios against bitsandbytes and the machine's own bandwidth.

    python tests/bench/cpu.py [--json FILE] [--only NAME ...] [--size small]

All figures of a row come from one run, interleaved, as medians over inputs that rotate through
more memory than the last-level cache is likely to hold. Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# `cuda.py` beside this file would stand in the way of NVIDIA's Python package, which torch imports.
FOLDER = Path(__file__).resolve().parent
sys.path[:] = [str(FOLDER / "lib"), *(p for p in sys.path if Path(p).resolve() != FOLDER)]

import torch  # noqa: E402

import fourbit  # noqa: E402
from fourbit import _core  # noqa: E402
from fourbit_bench import tables  # noqa: E402
from fourbit_bench.memory import peak_memory  # noqa: E402

SHAPE = (4096, 11008)
ROTATION = 8
REPETITIONS = 9
BATCH_SECONDS = 0.1
SETTLING_SECONDS = 0.05
MIB = 1 << 20


def median_seconds(calls: list[Callable[[int], object]]) -> list[float]:
    """The median time of each call, in batches that are interleaved.

    A batch is many calls in a row, so that one does not pay for the other's dirty cache, and
    begins after a pause: threads of OpenMP spin for a while after a call.
    """
    times: list[list[float]] = [[] for _ in calls]
    sizes = [1 for _ in calls]
    for repetition in range(REPETITIONS + 1):
        for which, call in enumerate(calls):
            time.sleep(SETTLING_SECONDS)
            started = time.perf_counter()
            for turn in range(sizes[which]):
                call(repetition + turn)
            seconds = (time.perf_counter() - started) / sizes[which]
            if repetition:
                times[which].append(seconds)
            else:
                sizes[which] = max(1, round(BATCH_SECONDS / seconds))
    return [statistics.median(taken) for taken in times]


def copy_bandwidth() -> float:
    """Bytes read and written a second by torch's copy, between buffers larger than the cache."""
    source = [torch.ones(64 * MIB) for _ in range(2)]
    target = torch.zeros(64 * MIB)
    (seconds,) = median_seconds([lambda i: target.copy_(source[i % 2])])
    return 2 * target.nbytes / seconds


def weights(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Matrices with the spread of trained weights; together larger than the cache."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(shape[0], 1, generator=generator) * 0.05
    return [
        (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)
        for _ in range(ROTATION)
    ]


def quantize_rows(shape: tuple[int, int]) -> list[dict[str, object]]:
    """Quantize and dequantize one matrix, against bitsandbytes and against a copy."""
    import bitsandbytes.functional as functional

    inputs = weights(shape)
    elements = inputs[0].numel()
    book = fourbit.codebook.by_name("nf4").core
    threads = torch.get_num_threads()
    packed = [torch.zeros((elements + 1) // 2, dtype=torch.uint8) for _ in inputs]
    absmax = [torch.zeros(-(-elements // 64)) for _ in inputs]
    codes = [torch.zeros(scales.numel(), dtype=torch.uint8) for scales in absmax]
    nested_absmax = [torch.zeros(-(-scales.numel() // 256)) for scales in absmax]
    outputs = [torch.zeros_like(w) for w in inputs]
    quantized = [fourbit.quantize(w) for w in inputs]
    plain = [fourbit.quantize(w, double_quant=False) for w in inputs]
    theirs = [functional.quantize_4bit(w, blocksize=64, quant_type="nf4") for w in inputs]

    def bnb_quantize(double: bool) -> Callable[[int], object]:
        return lambda i: functional.quantize_4bit(
            inputs[i % ROTATION], blocksize=64, quant_type="nf4", compress_statistics=double
        )

    def bnb_dequantize(i: int) -> object:
        codes, state = theirs[i % ROTATION]
        return functional.dequantize_4bit(codes, state)

    def reused_quantize(i: int) -> object:
        i %= ROTATION
        return _core.quantize(inputs[i], book, 64, packed[i], absmax[i], threads=threads)

    def reused_quantize_double(i: int) -> object:
        reused_quantize(i)
        i %= ROTATION
        return _core.quantize_absmax(absmax[i], codes[i], nested_absmax[i], threads=threads)

    def reused_dequantize(i: int) -> object:
        i %= ROTATION
        q = plain[i]
        return _core.dequantize(q.packed, q.scales(), book, 64, outputs[i], threads=threads)

    rows = []
    for name, ours, peer, moved, goal in (
        (
            "quantize nf4",
            lambda i: fourbit.quantize(inputs[i % ROTATION], double_quant=False),
            bnb_quantize(False),
            2 + 0.5 + 4 / 64,
            100,
        ),
        (
            "quantize nf4 + double",
            lambda i: fourbit.quantize(inputs[i % ROTATION]),
            bnb_quantize(True),
            2 + 0.516,
            150,
        ),
        (
            "dequantize nf4 + double",
            lambda i: quantized[i % ROTATION].dequantize(),
            bnb_dequantize,
            0.516 + 2,
            4.5,
        ),
        ("quantize nf4, outputs reused", reused_quantize, bnb_quantize(False), 2.5625, 100),
        (
            "quantize nf4 + double, outputs reused",
            reused_quantize_double,
            bnb_quantize(True),
            2 + 0.516,
            150,
        ),
        ("dequantize nf4, output reused", reused_dequantize, bnb_dequantize, 2.5625, 4.5),
    ):
        mine, other = median_seconds([ours, peer])
        rows.append(
            {
                "row": name,
                "fourbit_ms": mine * 1e3,
                "bitsandbytes_ms": other * 1e3,
                "ratio": other / mine,
                "goal": goal,
                "bytes_per_second": moved * elements / mine,
            }
        )
    return rows


def save_synthetic_llama(folder: Path, layers: int) -> int:
    """A Llama with random bf16 weights; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=layers,
        num_attention_heads=20,
        num_key_value_heads=20,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(p.nbytes for p in model.parameters())


def work_fourbit(source: str, destination: str) -> tuple[float, int]:
    """Convert a folder; seconds, and peak bytes over those after the import."""
    baseline = resident_bytes()
    started = time.perf_counter()
    fourbit.convert(source, destination)
    return time.perf_counter() - started, peak_memory() - baseline


def work_bitsandbytes(source: str, destination: str) -> tuple[float, int]:
    """Load a folder through transformers with bitsandbytes, and save it."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    baseline = resident_bytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(destination)
    return time.perf_counter() - started, peak_memory() - baseline


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def in_fresh_process(work: str, source: Path, destination: Path) -> dict[str, float]:
    """Run one of the ``work_`` functions where nothing else has used memory."""
    command = [sys.executable, __file__, "--work", work, str(source), str(destination)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def convert_rows(layers: int) -> list[dict[str, object]]:
    """Convert a checkpoint, against load-and-save through transformers and bitsandbytes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        total = save_synthetic_llama(folder / "source", layers)
        ours, theirs = [], []
        for turn in range(3):
            for work, results in (("fourbit", ours), ("bitsandbytes", theirs)):
                results.append(in_fresh_process(work, folder / "source", folder / f"{work}-{turn}"))
    mine, peer = (statistics.median(r["seconds"] for r in results) for results in (ours, theirs))
    return [
        {
            "row": f"convert {total / 1e6:.0f} MB",
            "fourbit_ms": mine * 1e3,
            "bitsandbytes_ms": peer * 1e3,
            "ratio": peer / mine,
            "goal": 10,
            "bytes_per_second": total / mine,
            "fourbit_peak_mib": statistics.median(r["peak"] for r in ours) / MIB,
            "bitsandbytes_peak_mib": statistics.median(r["peak"] for r in theirs) / MIB,
        }
    ]


def processor() -> str:
    """The processor's name and how many of it."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0] if names else platform.machine()}"


def main() -> None:
    """Run the rows that are asked for and print them as one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="*", default=["quantize", "convert"])
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work, source, destination = options.work
        worker = {"fourbit": work_fourbit, "bitsandbytes": work_bitsandbytes}[work]
        seconds, peak = worker(source, destination)
        print(json.dumps({"seconds": seconds, "peak": peak}))
        return

    small = options.size == "small"
    bandwidth = copy_bandwidth()
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "simd": _core.simd_backends()[-1],
        "torch": torch.__version__,
        "fourbit": fourbit.__version__,
        "copy_bytes_per_second": bandwidth,
    }
    print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['simd']}, "
        f"torch {machine['torch']}, copy {bandwidth / 1e9:.1f} GB/s (read + written)\n"
    )
    rows: list[dict[str, object]] = []
    if "quantize" in options.only:
        rows += quantize_rows((512, 1376) if small else SHAPE)
    if "convert" in options.only:
        rows += convert_rows(2 if small else 20)
    columns = [
        "work",
        "fourbit",
        "bitsandbytes",
        "ratio",
        "goal",
        "of copy bandwidth",
        "peak memory",
    ]
    print(tables.markdown(columns, (cells(row, bandwidth) for row in rows)))
    if options.json:
        tables.write_json(options.json, machine, rows)


def cells(row: dict[str, object], bandwidth: float) -> list[str]:
    """A row's line of the table."""
    peak = (
        f"{row['fourbit_peak_mib']:.0f} MiB against {row['bitsandbytes_peak_mib']:.0f}"
        if "fourbit_peak_mib" in row
        else ""
    )
    return [
        str(row["row"]),
        f"{row['fourbit_ms']:.1f} ms",
        f"{row['bitsandbytes_ms']:.1f} ms",
        f"{row['ratio']:.1f}x",
        f"{row['goal']}x",
        f"{100 * float(str(row['bytes_per_second'])) / bandwidth:.0f}%",
        peak,
    ]


if __name__ == "__main__":
    main()
