"""Where the tensors of a folder go in a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fourbit._core import CheckpointError
from fourbit.integrations.conversions import Naming
from fourbit.integrations.transformers.expert_names import expert_shapes, sources_of
from fourbit.model_io import Arrangement

Shapes = Mapping[str, Sequence[int]]


def arrange(model: Any, quantized: Shapes, plain: Shapes) -> Arrangement:
    """Where the tensors of a checkpoint go whose names the model does not have.

    transformers renames tensors of some checkpoints, and makes one tensor of many: the experts of
    a layer are stored one by one and computed with as one. Its own table says how.

    Args:
        model: it may be on the meta device.
        quantized: the shapes of a folder's quantized weights, by name.
        plain: the shapes of its other tensors.

    Raises:
        CheckpointError: naming quantized weights that the model does not compute with as they are.
    """
    naming = Naming(model, {**quantized, **plain})
    # Packed codes can be renamed, and put one after the other where they are those of experts.
    renamed: dict[str, str] = {}
    packed: dict[str, list[str]] = {}
    experts = expert_shapes(model)
    for name in naming.sorted(quantized):
        target, pattern = naming.place(name)
        if pattern is None and target not in experts:
            renamed[name] = target
        else:
            packed.setdefault(target, []).append(name)
    dense: dict[str, list[str]] = {}
    for name in naming.sorted(plain):
        target, pattern = naming.place(name)
        if target in packed:
            raise CheckpointError(
                f"{packed[target][0]} is quantized and {name} is not, and the model makes one "
                f"tensor of them; {_AGAIN}"
            )
        if pattern is not None or (target != name and target not in dense):
            dense.setdefault(target, []).append(name)
    stored: dict[str, tuple[str, ...]] = {}
    for target, names in packed.items():
        found = sources_of(naming, target, {name: quantized[name] for name in names}, experts)
        if found is None:
            raise CheckpointError(
                f"{names[0]} is quantized, and the model makes {target} of it in another form; "
                f"{_AGAIN}"
            )
        stored |= found
    made = [(names, partial(naming.make, target, names)) for target, names in dense.items()]
    return Arrangement(renamed, made, stored)


_AGAIN = "convert the model again with --skip '*experts*', or with a pattern for these weights"
