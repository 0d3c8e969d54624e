"""LoftQ (arXiv 2310.08659): adapters that start as the correction of the base's rounding."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourbit._core import CheckpointError
from fourbit.linear import Linear4bit
from fourbit.quantized import QuantizedTensor, quantize

# The subspace iteration below keeps all but about 0.05% of the best rank-r part's energy, even on
# the flat spectrum of rounding errors (2048 x 2048, r = 64), in a twentieth of the time.
_OVERSAMPLING = 2
_ITERATIONS = 16


class Start(NamedTuple):
    """Where LoftQ lets a layer start: ``W`` is close to ``quantized + scaling * b a``."""

    quantized: QuantizedTensor
    a: Tensor
    b: Tensor


class WeightSource(Protocol):
    """Where the weights before quantization come from, one at a time."""

    def weight(self, path: str) -> Tensor:
        """The 16- or 32-bit weight of the layer at that path of the model."""


@torch.no_grad()
def loftq(
    weight: Tensor,
    *,
    r: int,
    scaling: float,
    iterations: int = 1,
    base: Linear4bit | None = None,
) -> Start:
    """Alternate between quantizing ``W - s B A`` and the best rank-r ``s B A`` for ``W - Q``.

    Args:
        weight: ``W``, [out_features, in_features], float32, float16 or bfloat16.
        r: rank.
        scaling: ``s``, by which the layer multiplies.
        iterations: rounds; of all rounds the one with the least error is taken.
        base: the layer that holds ``W`` quantized, which gives codebook, block size and the first
            ``Q``; by default NF4 in blocks of 64 with double quantization.

    Returns:
        ``Q``, A [r, in_features] and B [out_features, r], float32. With one iteration ``Q`` is
        plainly ``W`` quantized, so that the adapter fits every copy of the quantized base.

    Raises:
        NonFiniteError: for a weight with NaN or infinity.
    """
    first = quantize(weight) if base is None else base.quantized()
    weight = weight.detach().float()
    best: tuple[float, Start] | None = None
    quantized = first
    for round_number in range(iterations):
        if round_number and best is not None:
            _, start = best
            target = weight - scaling * start.b @ start.a
            quantized = requantize(target, first)
        residual = weight - _dense(quantized)
        a, b = _best_rank(residual, r)
        error = torch.linalg.vector_norm(residual - b @ a).item()
        if best is not None and error >= best[0]:
            # The next round would start from the same matrices and end here again.
            break
        root = math.sqrt(scaling)
        best = (error, Start(quantized, a / root, b / root))
    if best is None:
        raise ValueError(f"loftq_iterations is {iterations}; at least one is needed")
    return best[1]


def requantize(weight: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """Another weight in the format of a quantized one, as if it had had the same dtype."""
    quantized = quantize(
        weight,
        codebook=like.codebook,
        block_size=like.block_size,
        double_quant=like.double_quant,
    )
    return replace(quantized, dtype=like.dtype)


def check_same_weights(weight: Tensor, base: Linear4bit, path: str) -> None:
    """Refuse weights that the layer was not quantized from.

    Raises:
        CheckpointError: naming the layer.
    """
    if tuple(weight.shape) != (base.out_features, base.in_features):
        raise CheckpointError(
            f"loftq_weights: {path}.weight is {tuple(weight.shape)}, but the model's is "
            f"{(base.out_features, base.in_features)}; give the checkpoint it was quantized from"
        )
    difference = torch.linalg.vector_norm(weight.float() - base.dequantize(torch.float32))
    # Rounding to 4 bits changes a matrix by about 9% of its norm, to 2 bits by less than 60%;
    # an unrelated matrix of the same size differs by about 140%.
    if difference > 0.8 * torch.linalg.vector_norm(weight.float()):
        raise CheckpointError(
            f"loftq_weights: {path}.weight is not what the model's layer was quantized from; "
            "give the checkpoint it was quantized from"
        )


def open_weights(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> WeightSource:
    """Weights from a folder of safetensors, one such file, or a mapping such as a state dict.

    Raises:
        FileNotFoundError: if there are no safetensors files.
        CheckpointError: for a broken index.
    """
    if isinstance(source, Mapping):
        return _FromMapping(source)
    return _FromFiles(Path(source))


class _FromMapping:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def weight(self, path: str) -> Tensor:
        name = f"{path}.weight"
        if name not in self.tensors:
            raise CheckpointError(f"loftq_weights has no tensor {name}")
        return _checked(self.tensors[name], name, "loftq_weights")


class _FromFiles:
    """Opens files at need, and keeps none open: a folder may have hundreds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _tensor_files(path)

    def weight(self, path: str) -> Tensor:
        name = f"{path}.weight"
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        file = self.files[name]
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                return _checked(opened.get_tensor(name), name, str(file))
        except SafetensorError as error:
            raise CheckpointError(f"{file}: {name} cannot be read: {error}") from None


def _tensor_files(path: Path) -> dict[str, Path]:
    index = path / "model.safetensors.index.json"
    single = path if path.is_file() else path / "model.safetensors"
    if index.is_file():
        try:
            entries: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of tensors: {error}") from None
        files = {}
        for name, file in entries:
            if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file:
                raise CheckpointError(f"{index}: {name} is in {file!r}, outside the folder")
            files[name] = path / file
        return files
    if not single.is_file():
        raise FileNotFoundError(
            f"{path} has no model.safetensors and no model.safetensors.index.json; "
            "give the folder of the 16-bit checkpoint that the model was quantized from"
        )
    try:
        with safe_open(single, framework="pt", device="cpu") as opened:
            return dict.fromkeys(opened.keys(), single)
    except SafetensorError as error:
        raise CheckpointError(f"{single} cannot be read: {error}") from None


def _checked(tensor: Tensor, name: str, where: str) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{where}: {name} is {tensor.dtype}; LoftQ needs the weights before quantization"
        )
    return tensor


def _dense(quantized: QuantizedTensor) -> Tensor:
    dense: Tensor = quantized.dequantize(torch.float32)
    return dense


def _best_rank(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, n] and B [m, r] with ``B A`` the best approximation of a matrix [m, n] of rank r."""
    size = min(matrix.shape)
    candidates = _OVERSAMPLING * r
    if 4 * r >= size:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        # Random, but the same each time, and without a trace in the caller's generator.
        devices = [matrix.device] if matrix.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=candidates, niter=_ITERATIONS)
        vh = v.T
    root = s[:r].sqrt()
    a = matrix.new_zeros(r, matrix.shape[1])
    b = matrix.new_zeros(matrix.shape[0], r)
    # A rank above the matrix's size leaves rows of zeros.
    a[: len(root)] = root[:, None] * vh[:r]
    b[:, : len(root)] = u[:, :r] * root
    return a, b
