"""Which layers of a model get an adapter, found without a look at any library's classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fourbit.lora.config import TargetRule, fits, named, within
from fourbit.lora.experts import experts_parameters

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


def experts_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The 3-D weights that can have adapters, by path of their module of experts."""
    found = {path: experts_parameters(module) for path, module in model.named_modules() if path}
    return {path: names for path, names in found.items() if names}


def find_experts(model: nn.Module, rule: TargetRule) -> dict[str, tuple[str, ...]]:
    """The 3-D weights that a rule's `target_parameters` names, by path of their module.

    Raises:
        ValueError: naming what matches nothing, or something that is no weight of experts, and
            saying what the model has.
    """
    known = experts_weights(model)
    weights = [f"{path}.{name}" for path, names in known.items() for name in names]
    have = f"its weights of experts are {_known(weights)}"
    for target in rule.target_parameters:
        if any(named([target], weight) for weight in weights):
            continue
        other = next((path for path, _ in model.named_parameters() if named([target], path)), None)
        if other is None:
            raise ValueError(
                f"target_parameters names {target!r}, which this model does not have; {have}"
            )
        raise ValueError(
            f"target_parameters names {target!r}, and {other} is no 3-D weight of experts whose "
            f"forward is known; name linear layers in target_modules; {have}"
        )
    chosen: dict[str, tuple[str, ...]] = {}
    for path, names in known.items():
        if any(within(saved, path) for saved in rule.modules_to_save):
            continue
        kept = tuple(name for name in names if named(rule.target_parameters, f"{path}.{name}"))
        if kept:
            chosen[path] = kept
    return chosen


def names_of_experts(chosen: Mapping[str, Sequence[str]], model: nn.Module) -> tuple[str, ...]:
    """What `target_parameters` has to be for these weights of experts, and no others.

    Names such as ``experts.down_proj`` where they are enough, else whole paths.
    """
    weights = [f"{path}.{name}" for path, names in chosen.items() for name in names]
    short = tuple(dict.fromkeys(".".join(weight.split(".")[-2:]) for weight in weights))
    everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if {weight for weight in everything if named(short, weight)} == set(weights):
        return short
    return tuple(weights)


def find_targets(model: nn.Module, rule: TargetRule) -> dict[str, nn.Linear]:
    """The linear layers that a rule names, by path; none where it names only experts.

    Raises:
        ValueError: naming what matches nothing, or something that is not a linear layer, and
            saying what the model has.
    """
    linear = linear_layers(model)
    if not rule.target_modules and rule.target_parameters:
        return {}
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
            f"its linear layers are {_known(linear)}{_hint(rule.target_modules, model)}"
        )
    return found


def check_each_name_matches(
    targets: str | Sequence[str], found: Iterable[str], model: nn.Module
) -> None:
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
                f"{_hint([name], model)}"
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


def _hint(targets: str | Sequence[str], model: nn.Module) -> str:
    for path, names in experts_weights(model).items():
        for name in names:
            if named(targets, f"{path}.{name}"):
                return f"; {path}.{name} is a 3-D weight of experts: name it in target_parameters"
    return ""


def _known(linear: Iterable[str]) -> str:
    names = sorted({path.rpartition(".")[2] for path in linear})
    return ", ".join(names) if names else "none at all"


def _shown(targets: str | Sequence[str]) -> str:
    return repr(targets) if isinstance(targets, str) else repr(list(targets))
