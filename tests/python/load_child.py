"""Loads a folder in 4 bits, and prints what memory that took: most, the model's, one tensor's."""

import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import fourbit


def private_bytes() -> int:
    """Memory of this process that is not pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the system does not say")


def main() -> None:
    torch.set_num_threads(1)
    fourbit.quantize(torch.randn(1 << 16))  # what the first call of all loads is not the model's
    before = private_bytes()
    most, done = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], quantization_config=fourbit.NF4Config()
    )
    most = max(most, private_bytes())
    done.set()
    thread.join()
    largest = max(
        2 * layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    print(most - before, model.get_memory_footprint(), largest)


main()
