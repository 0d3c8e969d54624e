"""A run whose activations spike past the card, in a process of its own: prints one line of JSON.

    python spiked_run.py PAGER [--emulated]

A few steps of a small model are trained twice: plainly, and on a card that plain allocations fill
but for 1 GiB, with the optimizer's state among what is there. In one step there, an activation
takes more than what is free, and only if the state leaves is there room for it. What the line says:
how each run ended, a digest of parameters and state, the report, and figures of memory.

Managed memory is never more than `Sizes.state`. With ``--emulated`` the same is played on the CPU,
on the recording card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from fourbit import PagedAdamW

MIB = 1 << 20
STEPS, SPIKE_AT = 8, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a run, in bytes but for the model's.

    Attributes:
        width: of the square matrices.
        layers: how many there are.
        rows: of a batch.
        dtype: of the parameters.
        state: all 32-bit moments.
        least: what stays free beside the model, its gradients, and the state. It is for what torch
            and the libraries take in a step, and for lots in which the driver takes memory.
        spike: the activation, more than `least` and less than `least` and `state` together.
    """

    width: int
    layers: int
    rows: int
    dtype: torch.dtype
    state: int
    least: int
    spike: int

    @property
    def elements(self) -> int:
        return self.layers * self.width**2

    @property
    def model(self) -> int:
        """Parameters and gradients."""
        return 2 * self.elements * self.dtype.itemsize


ON_CARD = Sizes(4096, 4, 64, torch.bfloat16, 512 * MIB, 1024 * MIB, 1152 * MIB)
EMULATED = Sizes(64, 4, 4, torch.float32, 128 << 10, 256 << 10, 288 << 10)


class Machine(Protocol):
    """A card, or what plays it."""

    sizes: Sizes
    device: torch.device

    def free(self) -> int:
        """Bytes that nobody has."""

    def take(self, size: int) -> object:
        """Plain memory, until nothing refers to it.

        Raises:
            torch.OutOfMemoryError: if there is none.
        """

    def state_taken(self, size: int) -> object:
        """Told of state that is plain memory."""


class Card:
    """The first GPU."""

    sizes, device = ON_CARD, torch.device("cuda", 0)

    def free(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def take(self, size: int) -> object:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def state_taken(self, size: int) -> object:
        return None


class Emulated:
    """The recording card, on which the model takes nothing."""

    sizes, device = EMULATED, torch.device("cpu")

    def __init__(self, patch: Any) -> None:
        import emulated_optimizer
        from fake_card import FakeCard

        self.fake = FakeCard(4 * MIB)
        emulated_optimizer.patch(patch, self.fake)

    def free(self) -> int:
        gc.collect()
        self.fake.finish()
        return self.fake.free_bytes()

    def take(self, size: int) -> object:
        try:
            self.fake.allocate_plainly(size)
        except torch.OutOfMemoryError:
            self.fake.free_plainly(size)
            raise
        taken = nn.Module()  # anything that may be referred to weakly
        weakref.finalize(taken, self.fake.free_plainly, size)
        return taken

    def state_taken(self, size: int) -> object:
        return self.take(size)


def main() -> int:
    pager = sys.argv[1]
    if "--emulated" not in sys.argv:
        print(json.dumps(runs(Card(), pager)))
        return 0
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        print(json.dumps(runs(Emulated(patch), pager)))
    return 0


def runs(machine: Machine, pager: str) -> dict[str, Any]:
    """Both, after a short one which loads what is loaded once."""
    run(machine, pager, dataclasses.replace(machine.sizes, layers=1), spike=False)
    plain = run(machine, pager, machine.sizes, spike=False)
    free = machine.free()
    with filled(machine, free):
        spiked = run(machine, pager, machine.sizes, spike=True)
    return {"plain": plain, "spiked": spiked, "free": free, "free_after": machine.free()}


@contextlib.contextmanager
def filled(machine: Machine, free: int) -> Iterator[None]:
    """Plain allocations leave room for the model, the state, and `Sizes.least`."""
    sizes, held = machine.sizes, []
    model = sizes.model if machine.device.type == "cuda" else 0
    left = free - sizes.state - sizes.least - model
    assert left > 0, f"the card has only {free} bytes free"
    try:
        while left > 0:
            held.append(machine.take(min(left, 1 << 30)))
            left -= 1 << 30
        yield
    finally:
        held.clear()
        machine.free()


def run(machine: Machine, pager: str, sizes: Sizes, *, spike: bool) -> dict[str, Any]:
    """Some steps; what came of them."""
    figures: dict[str, Any] = {}
    try:
        return {**trained(machine, pager, sizes, figures, spike=spike), "figures": figures}
    except torch.OutOfMemoryError as error:
        return {"outcome": "OutOfMemoryError", "said": str(error)[:200], "figures": figures}
    finally:
        machine.free()


def trained(
    machine: Machine, pager: str, sizes: Sizes, figures: dict[str, Any], *, spike: bool
) -> dict[str, Any]:
    source = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(machine.device, sizes.dtype)

    weights = [nn.Parameter(numbers(sizes.width, sizes.width)) for _ in range(sizes.layers)]
    batch = numbers(sizes.rows, sizes.width)
    optimizer = PagedAdamW(weights, lr=1e-3, state_bits=32, pager=pager)  # type: ignore[arg-type]
    plain: object = None
    for step in range(STEPS):
        spikes = spike and step == SPIKE_AT
        activation = None
        x = batch
        for weight in weights:
            x = torch.tanh(x @ weight / sizes.width**0.5)
            if spikes and activation is None:
                figures["free_before"] = unreserved(machine)
                activation = machine.take(sizes.spike)
        x.float().square().mean().backward()
        del activation, x
        if spikes:
            # As a program does that knows its spike is over; torch would keep the memory.
            figures["free_after"] = machine.free()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if pager == "resident" and plain is None:
            plain = machine.state_taken(optimizer.paging_report().state_bytes)
        if step == SPIKE_AT - 1:
            figures["before"] = dataclasses.asdict(optimizer.paging_report())
    report = dataclasses.asdict(optimizer.paging_report())
    return {"outcome": "finished", "digest": digest(optimizer), "report": report}


def unreserved(machine: Machine) -> int:
    """What is free, without tidying up in the midst of a step."""
    if isinstance(machine, Card):
        return torch.cuda.mem_get_info(machine.device)[0]
    return machine.free()


def digest(optimizer: torch.optim.Optimizer) -> str:
    """Of all bytes of parameters and state, in their order."""
    found = hashlib.sha256()
    add: Callable[[torch.Tensor], None] = lambda tensor: found.update(  # noqa: E731
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    )
    for group in optimizer.param_groups:
        for param in group["params"]:
            add(param)
            for field in sorted(optimizer.state[param]):
                add(optimizer.state[param][field])
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
