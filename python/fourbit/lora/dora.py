"""DoRA (arXiv 2402.09353): the norm of each row of a weight is learned apart from its direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def add_dora(result: Tensor, direction: Tensor, side: Tensor, factor: Tensor) -> Tensor:
    """A layer's output with DoRA, in the widest dtype of all.

    Args:
        result: ``x W^T + b``, [..., out_features].
        direction: ``x W^T`` of what dropout left of ``x``, [..., out_features].
        side: ``scaling * x A^T B^T`` of the same, [..., out_features].
        factor: learned magnitudes over `row_norms` of ``W + scaling * B A``, [out_features].
    """
    return result + (factor - 1) * direction + factor * side


def row_norms(weight: Tensor) -> Tensor:
    """Euclidean norms of rows, never zero: a row of zeros shall stay one, not become NaN."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms.clamp_min(torch.finfo(weight.dtype).tiny)


class KeptNorms:
    """Row norms of one layer's weight, kept from call to call while nothing can change them.

    They are kept only where nothing is trained (eval mode without gradients), and until a parameter
    changes in place or `forget` is called. An edit through ``.data`` cannot be seen.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def forget(self) -> None:
        """Compute them anew at the next call."""
        self._kept = None

    def get(
        self,
        parts: Sequence[Tensor],
        scaling: float,
        weight: Callable[[], Tensor],
        *,
        training: bool,
    ) -> Tensor:
        """The row norms of a weight, detached.

        Args:
            parts: the parameters that the weight is made of.
            scaling: of the adapter in it.
            weight: makes it, [out_features, in_features].
            training: whether the layer is in training mode.
        """
        keep = not (training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        with torch.no_grad():
            # Inference tensors have no version by which a change could be noticed.
            if not keep or any(part.is_inference() for part in parts):
                return row_norms(weight())
            key = (scaling, *((id(part), part._version, part.data_ptr()) for part in parts))
            if self._kept is None or self._kept[0] != key:
                self._kept = (key, row_norms(weight()))
            return self._kept[1]
