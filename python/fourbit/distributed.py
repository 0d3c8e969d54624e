"""Models that are sharded over processes: PyTorch's FSDP2, and nothing of our own beside it.

``torch.distributed.fsdp.fully_shard`` cuts the bytes of 4-bit weights as it cuts everything else,
so a model is prepared for it by no code of ours (`sharding_options` is for older torch). What is
here says what is sharded, and puts shards together for files.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Asked of every tensor in every step; to look for an attribute in vain takes half a microsecond.
_PLAIN = (Tensor, nn.Parameter)

# torch.distributed.fsdp of older versions makes every shard a parameter that asks for gradients
# first, which bytes cannot.
_SHARDS_BYTES_SINCE = (2, 12)


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``. Asked without importing that, which takes a second."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its shard if it is distributed."""
    if not is_distributed(tensor):
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together of its shards: all processes take part. A plain one is returned."""
    if not is_distributed(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has distributed a model, or any parameter of it, over processes."""
    if any(is_distributed(parameter) for parameter in model.parameters()):
        return True
    # After a forward pass the outermost module may hold its parameters whole for a while.
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and any(isinstance(m, loaded.FSDPModule) for m in model.modules())


def refuse_sharded(model: nn.Module, task: str) -> None:
    """Refuse what needs whole weights in one process.

    Raises:
        ValueError: for a model that is sharded over processes, saying what to do.
    """
    if is_sharded(model):
        raise ValueError(
            f"the model is sharded over processes (FSDP2); save its adapter with "
            f"fourbit.save_adapter, and {task} in one process"
        )


def local_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this process holds."""
    return sum(local(part).numel() * part.element_size() for part in model.parameters())


def sharding_options(model: nn.Module) -> dict[str, Any]:
    """What to pass to every ``fully_shard`` of a model with 4-bit weights.

    Nothing from torch 2.12 on. Before, FSDP2 cannot shard bytes: the 4-bit weights are named as
    `ignored_params`, and every process keeps all of them; trained parameters are sharded.

    Args:
        model: before it is sharded.

    Returns:
        ``{}`` or ``{"ignored_params": {...}}``.

    Raises:
        RuntimeError: for a torch whose ``fully_shard`` has no such option.
    """
    if _torch_version() >= _SHARDS_BYTES_SINCE:
        return {}
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise RuntimeError(
            f"fully_shard of torch {torch.__version__} can neither shard 4-bit weights nor leave "
            "them out; install torch 2.12 or later"
        )
    return {"ignored_params": {p for p in model.parameters() if p.dtype == torch.uint8}}


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def write_once(
    tensors: Iterable[Tensor], write: Callable[[Iterator[Tensor]], None], *, sharded: bool
) -> None:
    """Hand tensors to what writes them; of a sharded model, in the first process alone.

    Every process of the run calls this, and returns when all is written. Shards are put together
    tensor by tensor, as the writer asks for them.

    Args:
        tensors: plain ones, or shards in the same order everywhere.
        write: is called with the tensors, whole.
        sharded: whether the model they are of is sharded; if not, processes do not wait for each
            other, and each that calls this writes.

    Raises:
        RuntimeError: in the other processes, with what the first could not do.
    """
    if not sharded:
        write(iter(tensors))
        return
    gathered = (whole(tensor) for tensor in tensors)
    error: BaseException | None = None
    if torch.distributed.get_rank() == 0:
        try:
            write(gathered)
        except BaseException as raised:
            error = raised
    # The others take part in what was not asked for, or somebody would wait for ever.
    for _ in gathered:
        pass
    said = [None if error is None else f"{type(error).__name__}: {error}"]
    torch.distributed.broadcast_object_list(said, src=0)
    if error is not None:
        raise error
    if said[0] is not None:
        raise RuntimeError(f"the first process could not write ({said[0]})")
