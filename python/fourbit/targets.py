"""Which weights of a model are quantized: the rules of ``fourbit.convert``, for modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fourbit import _core
from fourbit.dense import is_dense
from fourbit.experts import ExpertsLayout
from fourbit.integrations import is_of_transformers


@dataclass(frozen=True)
class Targets:
    """What is quantized of a model.

    Attributes:
        layers: linear layers, by path: ``nn.Linear``, or transformers' `Conv1D`.
        experts: for the names of 3-D weights of experts, those of their tensors in a checkpoint,
            in order; each of these is a group.
        kept_experts: for the names of those that cannot be quantized, why not.
    """

    layers: dict[str, Any]
    experts: dict[str, tuple[str, ...]]
    kept_experts: dict[str, str]


def weights_to_quantize(
    model: nn.Module,
    *,
    block_size: int = 64,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    keep: Callable[[str], bool] = lambda path: False,
) -> Targets:
    """What `quantize_model` quantizes; the model may be on the meta device.

    Args:
        model: any module.
        block_size: layers smaller than a block stay, and experts whose matrices are not whole ones.
        only: as in `quantize_model`.
        skip: as in `quantize_model`.
        keep: says of a path of a layer or a name of a weight of experts that it stays, whatever
            `only` says.

    Raises:
        ValueError: for a pattern that is no glob or matches nothing, or if there is nothing to
            quantize.
    """
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if is_dense(m)}
    experts = _experts(model)
    if not layers and not experts:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    paths = [*layers, *experts]
    named, skipped = _core.matched_modules(list(only), list(skip), paths)
    chosen = {
        path
        for path, is_named, is_skipped in zip(paths, named, skipped, strict=True)
        if (is_named or not only) and not is_skipped and not keep(path)
    }
    tied = _tied_parameters(model)
    head = _output_embeddings(model)

    def wanted(path: str, layer: Any) -> bool:
        if path not in chosen or id(layer.weight) in tied or layer.weight.numel() < block_size:
            return False
        return bool(only) or (_core.kept_module(path) is None and layer is not head)

    targets = Targets(
        {path: layer for path, layer in layers.items() if wanted(path, layer)}, {}, {}
    )
    for name, sources in experts.items():
        if name not in chosen:
            continue
        reason = _why_kept(model, name, sources, block_size)
        if reason is not None:
            targets.kept_experts[name] = reason
        elif sources is not None:
            targets.experts[name] = sources
    if not targets.layers and not targets.experts:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantize: all that it has are heads, "
            "routers, tied, smaller than a block, or left out by the options"
        )
    return targets


def _experts(model: nn.Module) -> dict[str, tuple[str, ...] | None]:
    """The 3-D weights of a model's experts that are not quantized, and their sources."""
    if not is_of_transformers(model):
        return {}
    from fourbit.integrations.transformers.expert_names import expert_sources

    return {
        name: sources
        for name, sources in expert_sources(model).items()
        if model.get_parameter(name).is_floating_point()
    }


def _why_kept(
    model: nn.Module, name: str, sources: tuple[str, ...] | None, block_size: int
) -> str | None:
    if sources is None:
        return "checkpoints hold its elements in another order"
    shape = model.get_parameter(name).shape
    whole = shape.numel() // len(sources) % block_size == 0
    if not whole or not ExpertsLayout.fits(shape, block_size):
        return f"its matrices are not whole blocks of {block_size}"
    return None


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _tied_parameters(model: nn.Module) -> set[int]:
    """The parameters that more than one module holds."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied
