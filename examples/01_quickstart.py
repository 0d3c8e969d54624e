"""Fine-tune a small model in 4 bits, from a checkpoint to a merged model, in about a minute.

    python examples/01_quickstart.py

converts the model that ships in ``examples/base_model`` to 4 bits, trains an adapter on questions
and answers about fourbit, asks it one of them before and after, and merges the adapter into a plain
checkpoint. What it writes stays in ``runs/quickstart``.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch

import fourbit

EXAMPLES = Path(__file__).resolve().parent
BASE = EXAMPLES / "base_model"
FAQ = EXAMPLES / "data" / "faq.jsonl"
QUESTION = "What does NF4 stand for?"


def ask(folder: Path, adapter: Path | None = None) -> str:
    """The answer of a model, with or without an adapter."""
    model, tokenizer = fourbit.generation.load_for_generation(folder, adapter=adapter)
    return fourbit.generate(model, tokenizer, QUESTION, max_new_tokens=48)


def main() -> None:
    """The whole path, step by step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--output", type=Path, default=EXAMPLES.parent / "runs" / "quickstart")
    options = parser.parse_args()
    # Layers this small, on several threads, wait for each other longer than they compute.
    torch.set_num_threads(1)
    started = time.monotonic()
    shutil.rmtree(options.output, ignore_errors=True)
    quantized = options.output / "base-4bit"
    adapter = options.output / "adapter"
    merged = options.output / "merged"

    print("1. Convert to 4 bits")
    report = fourbit.convert(BASE, quantized)
    print(
        f"   {len(report.quantized)} of {len(report.tensors)} tensors quantized: "
        f"{report.bytes_before / 1e6:.1f} MB became {report.bytes_after / 1e6:.1f} MB "
        f"in {report.seconds:.2f} s; every byte verified: {fourbit.verify(quantized).checksums}"
    )

    print(f"\n2. Ask: {QUESTION}")
    print(f"   before: {ask(quantized)}")

    print(f"\n3. Fine-tune on {FAQ.name}")

    shown = set()

    def show(step) -> None:
        if step.loss is not None and step.step % 20 == 0 and step.step not in shown:
            shown.add(step.step)
            print(f"   step {step.step:>4} of {step.total}   loss {step.loss:.3f}")

    run = fourbit.finetune(
        quantized,
        FAQ,
        adapter,
        r=64,
        lora_alpha=64,
        lora_dropout=0.05,
        lr=2e-3,
        batch_size=8,
        gradient_accumulation=1,
        max_steps=options.steps,
        gradient_checkpointing=False,  # the model is small: memory is not what is short
        progress=show,
    )
    print(
        f"   loss {run.first_loss:.2f} -> {run.last_loss:.2f} in {run.seconds:.0f} s; "
        f"{run.trainable_parameters:,} trainable parameters, "
        f"adapter of {run.adapter_bytes / 1e6:.1f} MB; the curve is in {run.loss_curve}"
    )
    if run.peak_memory_bytes is not None:
        print(f"   peak memory {run.peak_memory_bytes / 1e6:.0f} MB, libraries included")

    print(f"\n4. Ask again: {QUESTION}")
    print(f"   after:  {ask(quantized, adapter)}")

    print("\n5. Merge the adapter into a plain 16-bit checkpoint")
    model = fourbit.from_pretrained(quantized, dtype=torch.float32)
    fourbit.load_adapter(model, adapter)
    fourbit.export_merged(model, merged, dtype=torch.bfloat16)
    print(f"   merged: {ask(merged)}")

    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print(f"Everything is in {options.output}.")


if __name__ == "__main__":
    main()
