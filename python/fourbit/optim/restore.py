"""Reading a state dict: what it holds for whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fourbit.optim.options import check_options
from fourbit.optim.state import bits_for, check_fields


class SavedState(NamedTuple):
    """What a state dict holds for one parameter.

    Attributes:
        param: whose it is.
        bits: its width.
        fields: as `state.fill_state` takes them; they may be read from a file when asked for.
    """

    param: Tensor
    bits: int
    fields: Mapping[str, Any]


class Restored(NamedTuple):
    """A state dict, checked but for the tensors.

    Attributes:
        groups: its groups, completed by the options that it does not name.
        states: one for each parameter that has state.
        other: entries of its state that belong to no parameter.
    """

    groups: list[dict[str, Any]]
    states: list[SavedState]
    other: dict[Any, Any]


def read_state_dict(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    name: Callable[[Tensor], str],
) -> Restored:
    """Check a state dict against the groups of an optimizer. No tensor is looked at.

    Args:
        state_dict: of `PagedAdamW`, or of ``torch.optim.AdamW`` with 32-bit state.
        param_groups: the optimizer's own.
        name: how errors call a parameter.

    Raises:
        ValueError: naming what is missing, unknown, or does not fit.
    """
    saved_states, saved_groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(saved_states, Mapping) or not isinstance(saved_groups, list):
        raise ValueError("not an optimizer's state dict: it lacks state or param_groups")
    if not all(isinstance(group, Mapping) and "params" in group for group in saved_groups):
        raise ValueError("the state dict has a parameter group without params; it is damaged")
    if [len(group["params"]) for group in saved_groups] != [
        len(group["params"]) for group in param_groups
    ]:
        raise ValueError("the state dict is one of other parameter groups")
    for group in saved_groups:
        names = group.get("param_names", group["params"])
        if not isinstance(names, list | tuple) or len(names) != len(group["params"]):
            raise ValueError("the state dict does not name each parameter once; it is damaged")
    indices = [index for group in saved_groups for index in group["params"]]
    if len(set(indices)) != len(indices):
        raise ValueError("the state dict names a parameter twice; it is damaged")
    restored = Restored([], [], dict(saved_states))
    for saved_group, group in zip(saved_groups, param_groups, strict=True):
        kept = {option: value for option, value in group.items() if option != "params"}
        completed = {**kept, **saved_group}
        check_options(completed)
        restored.groups.append(completed)
        for index, param in zip(saved_group["params"], group["params"], strict=True):
            fields = restored.other.pop(index, None)
            if fields is not None and fields != {}:
                bits = bits_for(param, completed["state_bits"])
                check_fields(fields, bits, name(param))
                restored.states.append(SavedState(param, bits, fields))
    for key in restored.other:
        if isinstance(key, int):
            raise ValueError(f"the state dict holds state of parameter {key}, which no group names")
    return restored
