"""Distributed parameters: the ``DTensor`` of FSDP2, stepped shard by shard.

AdamW works element by element, so every process steps the shard it holds. Two things cross shards:
the scales of 8-bit state, which need a global shape of their own, and the decision to skip a tensor
whose gradient is not finite, which all processes must take together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fourbit.distributed import is_distributed, local
from fourbit.layout import block_count

GRADIENT_LIMIT = 2.0**63
"""As the core's: the squares of larger gradients overflow, and they count as not finite."""


def placements(tensor: Tensor) -> Any:
    """How it is distributed; None for a plain tensor."""
    return tensor.placements if is_distributed(tensor) else None  # type: ignore[attr-defined]


def shard_of(param: Tensor, values: Tensor) -> Tensor:
    """A tensor distributed as a parameter is, whose shard here is `values` itself.

    Args:
        param: distributed or not.
        values: contiguous, in the shape of the parameter's shard here; of any dtype.
    """
    if not is_distributed(param):
        return values
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        values,
        param.device_mesh,  # type: ignore[attr-defined]
        placements(param),
        run_check=False,
        shape=param.shape,
        stride=torch.empty(param.shape, device="meta").stride(),
    )


def zero_scales(param: Tensor, block_size: int) -> Tensor:
    """float32 zeros for the scales of blocks of a parameter, distributed as it is.

    A plain parameter has [blocks]. The blocks of a distributed one do not cross shards, so shard
    `i` has row `i` of [shards, blocks], wide enough for the largest shard; there is one more
    dimension for every further mesh dimension that shards. So the rows are always divided evenly,
    however the parameter is, and survive being gathered and distributed again.
    """
    if not is_distributed(param):
        blocks = block_count(param.numel(), block_size)
        return torch.zeros(blocks, dtype=torch.float32, device=param.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    shape, shard_axes = list(param.shape), 0
    scale_placements: list[Shard | Replicate] = []
    for placement, size in zip(placements(param), mesh.shape, strict=True):
        if hasattr(placement, "dim"):
            shape[placement.dim] = -(-shape[placement.dim] // size)
            scale_placements.append(Shard(shard_axes))
            shard_axes += 1
        else:
            scale_placements.append(Replicate())
    blocks = block_count(torch.Size(shape).numel(), block_size)
    row = torch.zeros([1] * shard_axes + [blocks], device=local(param).device)
    return DTensor.from_local(row, mesh, scale_placements, run_check=False)


def local_scales(scales: Tensor, param: Tensor, block_size: int) -> Tensor:
    """The scales of this process's shard: contiguous, float32 [blocks]."""
    if not is_distributed(scales):
        return scales
    return local(scales).view(-1)[: block_count(local(param).numel(), block_size)]


def usable_everywhere(params: list[Tensor]) -> list[bool]:
    """Whether all shards of the gradients of distributed parameters can be stepped with.

    One collective for each mesh and its dimensions; all processes call it with the same parameters.
    """
    by_mesh: dict[Any, list[int]] = defaultdict(list)
    for index, param in enumerate(params):
        by_mesh[param.device_mesh].append(index)  # type: ignore[attr-defined]
    usable = [True] * len(params)
    for mesh, indices in by_mesh.items():
        usable_here = [_is_usable(params[index].grad) for index in indices]
        # Where the shards are, since a backend moves its own kind of memory alone.
        flags = torch.tensor(usable_here, device=local(params[indices[0]]).device).int()
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN, group)
        for index, flag in zip(indices, flags.tolist(), strict=True):
            usable[index] = bool(flag)
    return usable


def _is_usable(grad: Tensor | None) -> bool:
    assert grad is not None
    return bool((local(grad).abs() < GRADIENT_LIMIT).all())
