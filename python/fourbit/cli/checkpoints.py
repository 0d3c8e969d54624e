"""``convert``, ``inspect``, ``verify`` and ``merge``: model folders in, model folders out."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourbit.cli import screen
from fourbit.cli.common import Interrupted, Json, debugging, one_of
from fourbit.cli.contents import Contents
from fourbit.cli.progress import Meter
from fourbit.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from fourbit.checkpoint import ConversionReport

Folder = Annotated[Path, typer.Argument(show_default=False, help="A model folder.")]
_BLOCK_SIZES = [1 << power for power in range(5, 13)]


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
        int,
        typer.Option(
            help="Weights that share a scale: 32, 64, 128, ... 4096.",
            callback=one_of(*_BLOCK_SIZES),
        ),
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
        typer.Option(
            show_default=False,
            help="Glob of tensors to leave as they are. Repeatable. With '*experts*', bitsandbytes "
            "can load a mixture of experts.",
        ),
    ] = None,
    max_shard_size: Annotated[int, typer.Option(min=1, help="Largest output file, in MiB.")] = 2048,
    chunk_size: Annotated[
        int, typer.Option(min=2, help="Memory for data in flight, in MiB a thread.")
    ] = 64,
    threads: Annotated[
        int | None,
        typer.Option(min=1, show_default="as many as torch uses", help="Threads that quantize."),
    ] = None,
    json: Json = False,
) -> None:
    """Convert a model folder to 4 bits.

    The weights are streamed, and the result is checksummed. A conversion that was interrupted goes
    on where it was when the same command is run again.
    """
    from fourbit import checkpoint

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
                max_shard_bytes=max_shard_size << 20,
                chunk_bytes=chunk_size << 20,
                threads=threads,
                progress=meter.update,
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
    """Show what is in a model folder.

    It may be ours, one of bitsandbytes, or a plain one.
    """
    from fourbit import checkpoint

    contents = Contents.of(checkpoint.inspect(folder))
    if json:
        screen.say_json(contents.as_json())
        return
    screen.table_console().print(contents.table(every=every))
    for line in contents.summary():
        screen.say(line)


def verify(folder: Folder, json: Json = False) -> None:
    """Check a converted folder, byte for byte."""
    from fourbit import checkpoint

    start = time.perf_counter()
    with Meter("verifying", amount=screen.size, rate=lambda r: f"{screen.size(r)}/s") as meter:
        report = checkpoint.verify(folder, progress=meter.update)
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
    """Write a 16-bit model with an adapter in it.

    The adapter is added, in float32, to the 4-bit weights that it was trained on.
    """
    from fourbit.loading import holds_tokenizer, load_model, require_quantized

    require_quantized(model)
    with quiet_libraries(everything=debugging()):
        import torch

        from fourbit.export import export_merged
        from fourbit.lora import load_adapter, lora_modules

        start = time.perf_counter()
        loaded = load_model(model)
        load_adapter(loaded, adapter, trainable=False)
        target = None if dtype == "auto" else getattr(torch, dtype)
        tokenizer = adapter if holds_tokenizer(adapter) else None
        export_merged(loaded, output, base=model, tokenizer_from=tokenizer, dtype=target)
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
