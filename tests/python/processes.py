"""Two processes that talk to each other over gloo, for the tests of distributed training."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2


def run(check: Callable[[Path], None], folder: Path) -> None:
    """Call a module's function in every process, with a folder; all must return from it."""
    torch.multiprocessing.spawn(_work, (check, folder), nprocs=WORLD)


def _work(rank: int, check: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        check(folder)
        dist.barrier()  # nobody leaves while the other still talks to it
    finally:
        dist.destroy_process_group()
    # torch's caches of device meshes keep the group, and so gloo's threads, alive. Such a thread
    # that lets go of a tensor while the interpreter is shut down is ended by Python inside C++
    # code that cannot be unwound, and the process aborts: now and then, on a busy machine.
    os._exit(0)
