"""Loads two folders in 4 bits; of the second, prints most memory, the model's and a tensor's."""

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


def load(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=fourbit.NF4Config())


def main() -> None:
    torch.set_num_threads(1)
    load(sys.argv[1])  # what the first one imports is not the model's
    before = private_bytes()
    most, done = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    model = load(sys.argv[2])
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
