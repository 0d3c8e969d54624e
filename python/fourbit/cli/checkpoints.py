"""``convert``, ``inspect``, ``verify`` and ``merge``: model folders in, model folders out."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourbit.cli import screen
from fourbit.cli.common import Interrupted, Json, debugging, one_of
from fourbit.cli.progress import Meter
from fourbit.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from fourbit.checkpoint import CheckpointInfo, ConversionReport

Folder = Annotated[Path, typer.Argument(show_default=False, help="A model folder.")]


def convert(
    source: Annotated[
        Path, typer.Argument(show_default=False, help="A 16- or 32-bit model folder.")
    ],
    destination: Annotated[
        Path, typer.Argument(show_default=False, help="The folder to write: new or empty.")
    ],
    codebook: Annotated[
        str, typer.Option(help="nf4, fp4 or int4.", callback=one_of("nf4", "fp4", "int4"))
    ] = "nf4",
    block_size: Annotated[
        int, typer.Option(help="Weights that share a scale: 32, 64, ... 4096.")
    ] = 64,
    double_quant: Annotated[
        bool, typer.Option(help="Quantize the scales too: 4.127 bits a weight in place of 4.5.")
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False, help="Glob of tensors to quantize, no others. Repeatable."
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(show_default=False, help="Glob of tensors to leave as they are. Repeatable."),
    ] = None,
    max_shard_size: Annotated[
        int | None, typer.Option(show_default="2048", help="Largest output file, in MiB.")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(show_default="64", help="Memory for data a thread, in MiB.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(show_default="all cores", help="Threads that quantize.")
    ] = None,
    json: Json = False,
) -> None:
    """Convert a model folder to 4 bits: streamed, resumable, checksummed.

    A conversion that was interrupted goes on where it was when the same command is run again.
    """
    from fourbit import checkpoint

    limits = {
        "max_shard_bytes": max_shard_size,
        "chunk_bytes": chunk_size,
    }
    with Meter("converting", amount=screen.size, rate=lambda r: f"{screen.size(r)}/s") as meter:
        try:
            report = checkpoint.convert(
                source,
                destination,
                codebook=codebook,
                block_size=block_size,
                double_quant=double_quant,
                only=only or (),
                skip=skip or (),
                threads=threads,
                progress=meter.update,
                **{name: mib << 20 for name, mib in limits.items() if mib is not None},
            )
        except KeyboardInterrupt:
            raise Interrupted("run the same command again to go on where it was") from None
    if json:
        totals = {"quantized": len(report.quantized), "kept": len(report.kept)}
        screen.say_json({"destination": str(destination), **totals, **asdict(report)})
    else:
        _say_conversion(report, destination)


def _say_conversion(report: ConversionReport, destination: Path) -> None:
    if report.already_complete:
        screen.say(f"{destination} is complete already; nothing was written")
    else:
        resumed = f"; {report.shards_kept} were there already" if report.shards_kept else ""
        screen.say(
            f"{destination}: {screen.size(report.bytes_before)} -> "
            f"{screen.size(report.bytes_after)} in {screen.duration(report.seconds)} "
            f"({screen.plural(report.shards, 'file')}{resumed})"
        )
    screen.say(f"quantized: {screen.plural(len(report.quantized), 'tensor')}")
    for reason, number in Counter(tensor.reason for tensor in report.kept).most_common():
        kept = sum(t.bytes_after for t in report.kept if t.reason == reason)
        screen.say(
            f"left as they were: {screen.plural(number, 'tensor')}, {screen.size(kept)} ({reason})"
        )
    for name, reason in report.skipped.items():
        screen.say(f"not copied: {name} ({reason})")


def inspect(
    folder: Folder,
    every: Annotated[
        bool, typer.Option("--all", help="A line for each tensor, not for each kind of tensor.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in a model folder: ours, one of bitsandbytes, or a plain one."""
    from fourbit import checkpoint

    info = checkpoint.inspect(folder)
    rows = _rows(info)
    if json:
        screen.say_json({**_totals(info, rows), "tensors": rows})
        return
    _say_rows(rows if every else _grouped(rows))
    _say_totals(_totals(info, rows))


def _rows(info: CheckpointInfo) -> list[dict[str, object]]:
    """One row a tensor of the model, as it was before quantization."""
    nbytes = {tensor.name: tensor.bytes for tensor in info.tensors}
    parts = {part for weight in info.quantized for part in weight.parts.values()}
    rows: list[dict[str, object]] = []
    for weight in info.quantized:
        stored = sum(nbytes[part] for part in weight.parts.values())
        double = " + double" if weight.double_quant else ""
        rows.append(
            {
                "name": weight.name,
                "shape": list(weight.shape),
                "stored_as": f"{weight.codebook}, blocks of {weight.block_size}{double}",
                "bytes": stored,
                "quantized": True,
            }
        )
    for tensor in info.tensors:
        if tensor.name not in parts:
            rows.append(
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "stored_as": tensor.dtype,
                    "bytes": tensor.bytes,
                    "quantized": False,
                }
            )
    return sorted(rows, key=lambda row: _natural(str(row["name"])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _numbers(row: dict[str, object]) -> int:
    shape = row["shape"]
    assert isinstance(shape, list)
    product = 1
    for dimension in shape:
        product *= dimension
    return product


def _grouped(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows that differ in their layer's number only, put together."""
    groups: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for row in rows:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", str(row["name"]))
        groups.setdefault((name, str(row["shape"]), str(row["stored_as"])), []).append(row)
    return [
        {
            **members[0],
            "name": key[0] if len(members) > 1 else members[0]["name"],
            "members": members,
        }
        for key, members in groups.items()
    ]


def _say_rows(rows: list[dict[str, object]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tensor", "shape", "stored as"):
        table.add_column(heading, no_wrap=heading != "tensor", overflow="fold")
    for heading in ("bits a number", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        members = row.get("members", [row])
        assert isinstance(members, list)
        stored = sum(int(member["bytes"]) for member in members)
        numbers = sum(_numbers(member) for member in members)
        shape = row["shape"]
        assert isinstance(shape, list)
        times = f"{len(members)} × " if len(members) > 1 else ""
        table.add_row(
            screen.plain(str(row["name"])),
            times + " × ".join(map(str, shape)) if not times else f"{times}({_shape(shape)})",
            str(row["stored_as"]),
            f"{8 * stored / numbers:.3f}" if numbers else "",
            screen.size(stored),
        )
    screen.table_console().print(table)


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _totals(info: CheckpointInfo, rows: list[dict[str, object]]) -> dict[str, object]:
    quantized = [row for row in rows if row["quantized"]]
    plain = [row for row in rows if not row["quantized"]]
    numbers = sum(map(_numbers, rows))
    return {
        "path": str(info.path),
        "format_version": info.format_version,
        "quantized": bool(quantized),
        "parameters": numbers,
        "bytes": info.bytes,
        "bits_per_parameter": 8 * info.bytes / numbers if numbers else None,
        "stored_as": dict(Counter(str(row["stored_as"]) for row in rows)),
        "quantized_tensors": len(quantized),
        "quantized_parameters": sum(map(_numbers, quantized)),
        "quantized_bytes": sum(int(str(row["bytes"])) for row in quantized),
        "plain_tensors": len(plain),
        "plain_parameters": sum(map(_numbers, plain)),
        "plain_bytes": sum(int(str(row["bytes"])) for row in plain),
    }


def _say_totals(totals: dict[str, object]) -> None:
    def number(key: str) -> int:
        return int(str(totals[key]))

    if not totals["quantized"]:
        screen.say(
            f"not quantized: {screen.count(number('parameters'))} parameters, "
            f"{screen.size(number('bytes'))}"
        )
        return
    writer = "another program (bitsandbytes' layout)"
    if totals["format_version"] is not None:
        writer = f"fourbit, format {totals['format_version']}"
    bits = 8 * number("quantized_bytes") / max(1, number("quantized_parameters"))
    screen.say(
        f"quantized:     {screen.plural(number('quantized_tensors'), 'tensor')}, "
        f"{screen.count(number('quantized_parameters'))} parameters, "
        f"{screen.size(number('quantized_bytes'))} ({bits:.3f} bits a parameter)"
    )
    screen.say(
        f"not quantized: {screen.plural(number('plain_tensors'), 'tensor')}, "
        f"{screen.count(number('plain_parameters'))} parameters, "
        f"{screen.size(number('plain_bytes'))}"
    )
    screen.say(
        f"in all:        {screen.count(number('parameters'))} parameters, "
        f"{screen.size(number('bytes'))} ({float(str(totals['bits_per_parameter'])):.3f} bits a "
        f"parameter); written by {writer}"
    )


def verify(folder: Folder, json: Json = False) -> None:
    """Check every byte of a converted folder against its checksums."""
    from fourbit import checkpoint

    start = time.perf_counter()
    report = checkpoint.verify(folder)
    seconds = time.perf_counter() - start
    if json:
        screen.say_json({"path": str(folder), **asdict(report), "seconds": seconds})
        return
    screen.say(
        f"{folder} is whole: {screen.plural(report.tensors, 'tensor')} in "
        f"{screen.plural(report.shards, 'file')}, {screen.size(report.bytes)}, "
        f"{report.quantized} quantized; {screen.duration(seconds)}"
    )
    if not report.checksums:
        screen.say(
            "its writer gave no checksums: names, shapes and sizes were checked, the data was not"
        )


def merge(
    model: Annotated[
        Path, typer.Option(show_default=False, help="The 4-bit folder the adapter was trained on.")
    ],
    adapter: Annotated[Path, typer.Option(show_default=False, help="The adapter's folder.")],
    output: Annotated[
        Path, typer.Option(show_default=False, help="The folder to write: new or empty.")
    ],
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16, float16, float32, or auto: as it was before quantization.",
            callback=one_of("auto", "bfloat16", "float16", "float32"),
        ),
    ] = "auto",
    json: Json = False,
) -> None:
    """Add an adapter to the weights it was trained on, and write a plain 16-bit model folder."""
    from fourbit.loading import holds_tokenizer, load_model, load_tokenizer, require_quantized

    require_quantized(model)
    with quiet_libraries(everything=debugging()):
        import torch

        from fourbit.lora import load_adapter, lora_modules
        from fourbit.model_io import export_merged

        start = time.perf_counter()
        loaded = load_model(model)
        load_adapter(loaded, adapter, trainable=False)
        target = None if dtype == "auto" else getattr(torch, dtype)
        export_merged(loaded, output, base=model, dtype=target)
        if holds_tokenizer(adapter):
            # Training may have given it another chat template.
            load_tokenizer(adapter).save_pretrained(output)
    seconds = time.perf_counter() - start
    layers = len(lora_modules(loaded))
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    if json:
        result = {"output": str(output), "layers": layers, "bytes": written, "seconds": seconds}
        screen.say_json(result)
        return
    screen.say(
        f"{output}: {layers} adapted layers merged, {screen.size(written)}, "
        f"{screen.duration(seconds)}"
    )
