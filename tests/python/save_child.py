"""Saves an optimizer's state again and again, with a fault at one file operation after the other.

Usage: ``save_child.py MODE FOLDER``, loaded with ``faults.c``. For each operation there is a folder
with the file of an older state, written over by a process of its own. MODE is "kill", "short" or
the number of an errno. Prints JSON: for each process its exit status and the error's message.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from fourbit.optim import PagedAdamW, save_optimizer

NAME = "optimizer.safetensors"


def stepped(steps: int) -> PagedAdamW:
    """8-bit and 32-bit state of several steps; enough that the file takes several writes."""
    source = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=source)) for shape in ((90, 70), (40, 40))]
    optimizer = PagedAdamW(params, lr=1e-2, state_bits=8)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=source)
        optimizer.step()
    return optimizer


def attempt(optimizer: PagedAdamW, folder: Path, mode: str, at: int) -> tuple[int, str]:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os.environ.update(FAULT_DIR=str(folder), FAULT_MODE=mode, FAULT_AT=str(at))
        try:
            save_optimizer(optimizer, folder / NAME)
        except OSError as error:
            os.write(send, f"{error.errno}: {error}".encode())
            os._exit(1)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        message = pipe.read()
    return os.waitpid(child, 0)[1], message


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    old, new = stepped(1), stepped(3)
    outcomes = []
    at = 0
    while not outcomes or outcomes[-1][0] != 0:
        at += 1
        here = folder / str(at)
        here.mkdir()
        save_optimizer(old, here / NAME)
        outcomes.append(attempt(new, here, mode, at))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
