"""Which layers of a model get an adapter, found without a look at any library's classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fourbit.lora.config import TargetRule, fits, named

ALL_LINEAR = "all-linear"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that can have an adapter, by path.

    The output projection of ``nn.MultiheadAttention`` is not among them: attention reads its
    weight and never calls it, so that an adapter on it would do nothing.
    """
    inert = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    return {
        path: module
        for path, module in model.named_modules()
        if path and isinstance(module, nn.Linear) and id(module) not in inert
    }


def output_head(model: nn.Module) -> list[nn.Module]:
    """The layers that turn hidden states into logits.

    Models of transformers name theirs; elsewhere it is the linear layer whose weight is also an
    embedding's.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tied: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in embeddings
    ]
    return tied if head is None else [*tied, head]


def find_targets(model: nn.Module, rule: TargetRule) -> dict[str, nn.Linear]:
    """The layers that a rule names, by path.

    Raises:
        ValueError: naming what matches nothing, or something that is not a linear layer, and
            saying what the model has.
    """
    linear = linear_layers(model)
    if rule.target_modules == ALL_LINEAR:
        heads = {id(head) for head in output_head(model)}
        open_rule = TargetRule(".*", rule.exclude_modules, rule.modules_to_save)
        found = {
            path: layer
            for path, layer in linear.items()
            if id(layer) not in heads and open_rule.matches(path)
        }
    else:
        paths = [path for path, _ in model.named_modules() if path and rule.matches(path)]
        for path in paths:
            if path not in linear:
                kind = type(model.get_submodule(path)).__name__
                raise ValueError(
                    f"target_modules matches {path}, which is a {kind}; "
                    f"only linear layers can have an adapter: {_known(linear)}"
                )
        found = {path: linear[path] for path in paths}
    if not found:
        raise ValueError(
            f"target_modules {_shown(rule.target_modules)} matches no layer of this model; "
            f"its linear layers are {_known(linear)}"
        )
    return found


def check_each_name_matches(targets: str | Sequence[str], found: Iterable[str]) -> None:
    """Refuse a list with a name that no layer bears: most likely it is misspelt.

    Raises:
        ValueError: naming it.
    """
    if isinstance(targets, str):
        return
    paths = list(found)
    for name in targets:
        if not any(named([name], path) for path in paths):
            raise ValueError(
                f"target_modules names {name!r}, which matches no linear layer of this model"
            )


def check_each_pattern_matches(
    option: str, patterns: Iterable[str], targets: Iterable[str]
) -> None:
    """Refuse a pattern for single layers that fits none of the targets.

    Raises:
        ValueError: naming it.
    """
    paths = list(targets)
    for pattern in patterns:
        if not any(fits(pattern, path) for path in paths):
            raise ValueError(f"{option} has {pattern!r}, which matches no layer with an adapter")


def shortest_names(targets: Iterable[str], model: nn.Module) -> str | tuple[str, ...]:
    """The shortest last parts of paths that name these layers of the model and no other module.

    Files list them, so that other tools recognise ``q_proj``. Where the whole path of a layer is
    the end of another module's, no list can tell them apart, and the result is a pattern.
    """
    chosen = set(targets)
    rest: set[str] = set()
    for path, _ in model.named_modules():
        if path and path not in chosen:
            rest.update(_suffixes(path))
    names = {path: next((s for s in _suffixes(path) if s not in rest), None) for path in chosen}
    if None in names.values():
        return "|".join(re.escape(path) for path in sorted(chosen))
    return tuple(sorted({name for name in names.values() if name is not None}))


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _known(linear: Iterable[str]) -> str:
    names = sorted({path.rpartition(".")[2] for path in linear})
    return ", ".join(names) if names else "none at all"


def _shown(targets: str | Sequence[str]) -> str:
    return repr(targets) if isinstance(targets, str) else repr(list(targets))
