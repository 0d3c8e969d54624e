"""Weights of mixtures of experts in few bits: 3-D parameters [experts, rows, columns].

A quantized one is four parameters on the module that held the dense one, named as the parts of a
`Linear4bit` are. With NAME the dense parameter's:

======================  =====================================  ===============================
parameter               shape                                  meaning
======================  =====================================  ===============================
``NAME``                [bytes, 1]                             packed codes, row-major
``NAME_absmax``         [blocks] or [4 * blocks]               scales: codes, or float32
``NAME_nested_absmax``  [groups * 4 * ceil(blocks a group /    scales of the scales, one group
                        256)]                                  after the other
``NAME_nested_offset``  [4 * groups]                           means of the scales
======================  =====================================  ===============================

All are flat, frozen uint8, so that FSDP2 cuts them evenly and nothing can cast them. The last two
exist only with double quantization, whose `groups` are the tensors of the checkpoint: where it
holds each expert's matrices one by one, each has its own, and a file of one matrix holds exactly
the bytes that are in memory.

What a module of experts computes follows the protocol of transformers' experts classes:
`experts_forward` says which attributes it looks at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fourbit.codebook import Codebook, as_codebook
from fourbit.expert_ops import expert_linear, expert_matmul
from fourbit.layout import NESTED_BLOCK_SIZE, block_count, packed_bytes
from fourbit.quantized import QuantizedTensor, quantize

PARTS = ("", "_absmax", "_nested_absmax", "_nested_offset")
"""What the names of a quantized parameter's parts end in, in the order of `QuantizedTensor`."""


@dataclass(frozen=True)
class ExpertsLayout:
    """All that is known of a 3-D weight in few bits without its data.

    Attributes:
        shape: [experts, rows, columns] before quantization.
        dtype: before quantization.
        codebook: the map from codes to values.
        block_size: elements that share a scale; it divides a matrix, and each group.
        double_quant: whether the scales are quantized too.
        groups: parts of equal size whose scales are quantized each on its own.
    """

    shape: torch.Size
    dtype: torch.dtype
    codebook: Codebook
    block_size: int
    double_quant: bool
    groups: int = 1

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a shape that cannot be cut so."""
        if len(self.shape) != 3:
            raise ValueError(f"experts have 3-D weights, and this is {tuple(self.shape)}")
        elements = self.shape.numel()
        if not self.fits(self.shape, self.block_size) or (
            elements % self.groups or elements // self.groups % self.block_size
        ):
            raise ValueError(
                f"blocks of {self.block_size} cross the matrices of {tuple(self.shape)} in "
                f"{self.groups} groups; use a smaller block size or leave it in 16 bits"
            )

    @staticmethod
    def fits(shape: Sequence[int], block_size: int) -> bool:
        """Whether each matrix starts with a block, so that it can be decoded alone."""
        return shape[1] * shape[2] % block_size == 0

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        return block_count(self.shape.numel(), self.block_size)

    @property
    def group_shape(self) -> torch.Size:
        """Of each group: [rows of all / groups, columns], or all of them in 3-D."""
        experts, rows, columns = self.shape
        if self.groups == 1:
            return self.shape
        return torch.Size((experts * rows // self.groups, columns))

    def part_sizes(self) -> tuple[int, int, int, int]:
        """Bytes of the four parts; 0 for one that is not there."""
        packed = packed_bytes(self.shape.numel(), self.codebook.code_bits)
        if not self.double_quant:
            return packed, 4 * self.blocks, 0, 0
        nested = block_count(self.blocks // self.groups, NESTED_BLOCK_SIZE)
        return packed, self.blocks, 4 * nested * self.groups, 4 * self.groups


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """A 3-D weight [experts, rows, columns] in few bits.

    Attributes:
        layout: shapes, codebook, blocks.
        packed: uint8 [bytes, 1].
        absmax: uint8, flat.
        nested_absmax: uint8, flat; None without double quantization.
        nested_offset: uint8, flat; None without double quantization.
    """

    layout: ExpertsLayout
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The four tensors, in the order of `PARTS`."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.numel() for part in self.parts if part is not None)

    def group(self, index: int) -> QuantizedTensor:
        """One group, in shared memory: [rows of all groups / groups, columns], or all in 3-D.

        It is what a checkpoint holds as one tensor.
        """
        layout, groups = self.layout, self.layout.groups

        def cut(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            size = part.shape[0] // groups
            return part[index * size : (index + 1) * size]

        packed, absmax, nested_absmax, nested_offset = map(cut, self.parts)
        assert packed is not None
        assert absmax is not None
        return QuantizedTensor(
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            layout.codebook,
            layout.block_size,
            layout.group_shape,
            layout.dtype,
        )

    def to(self, device: torch.device | str) -> QuantizedExperts:
        """On another device."""
        parts = (None if part is None else part.to(device) for part in self.parts)
        return QuantizedExperts(self.layout, *parts)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[experts, rows, columns] in `dtype`, by default that before quantization."""
        output = torch.empty(
            self.layout.shape, dtype=dtype or self.layout.dtype, device=self.packed.device
        )
        flat = output.view(self.layout.groups, -1)
        for index in range(self.layout.groups):
            flat[index] = self.group(index).dequantize(output.dtype).view(-1)
        return output


def quantize_experts(
    weight: Tensor,
    *,
    codebook: str | Mapping[int, float] | Codebook = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    groups: int = 1,
) -> QuantizedExperts:
    """Quantize a 3-D weight, in `groups` parts of equal size each on its own.

    Args:
        weight: [experts, rows, columns], float32, float16 or bfloat16.
        codebook: as in `fourbit.quantize`.
        block_size: elements that share a scale; it divides a group.
        double_quant: whether to quantize the scales too.
        groups: how many tensors a checkpoint holds of it; each has the bytes that
            `fourbit.quantize` gives for it alone.

    Raises:
        NonFiniteError: naming the first element that is NaN or infinite.
        ValueError: if the weight is not 3-D, or blocks would cross its matrices.
        TypeError: for another dtype.
    """
    book = as_codebook(codebook)
    layout = ExpertsLayout(weight.shape, weight.dtype, book, block_size, double_quant, groups)
    pieces = weight.detach().reshape(groups, -1)
    return join_groups(
        [
            quantize(piece, codebook=book, block_size=block_size, double_quant=double_quant)
            for piece in pieces
        ],
        layout.shape,
    )


def join_groups(groups: Sequence[QuantizedTensor], shape: Sequence[int]) -> QuantizedExperts:
    """One 3-D weight of `shape` from tensors quantized each on its own, in order of elements.

    Raises:
        ValueError: if they are not quantized alike, or do not add up to the shape.
    """
    first = groups[0]
    layout = ExpertsLayout(
        torch.Size(shape),
        first.dtype,
        first.codebook,
        first.block_size,
        first.double_quant,
        len(groups),
    )
    for other in groups:
        if (other.codebook, other.block_size, other.double_quant, other.dtype) != (
            first.codebook,
            first.block_size,
            first.double_quant,
            first.dtype,
        ):
            raise ValueError(
                f"experts are quantized in two ways, {first} and {other}; convert them again"
            )
        if other.shape.numel() * len(groups) != layout.shape.numel():
            raise ValueError(
                f"{len(groups)} matrices of {tuple(other.shape)} do not make a weight of "
                f"{tuple(layout.shape)}"
            )

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.cat(there) if there else None

    packed = joined([group.packed.reshape(-1, 1) for group in groups])
    absmax = joined([group.absmax for group in groups])
    assert packed is not None
    assert absmax is not None
    return QuantizedExperts(
        layout,
        packed,
        absmax,
        joined([group.nested_absmax for group in groups]),
        joined([group.nested_offset for group in groups]),
    )


# --- modules --------------------------------------------------------------------------------------


def experts_layouts(module: nn.Module) -> dict[str, ExpertsLayout]:
    """The quantized 3-D parameters of a module, by name; empty for any other module."""
    layouts: dict[str, ExpertsLayout] = module.__dict__.get("_fourbit_experts", {})
    return layouts


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that hold quantized 3-D parameters, by path."""
    return {path: module for path, module in model.named_modules() if experts_layouts(module)}


def set_experts(module: nn.Module, name: str, quantized: QuantizedExperts) -> None:
    """Put a quantized weight in the place of the parameter `name`; its memory is shared.

    The module then has to be computed by `experts_forward`.
    """
    _lay_out(module, name, quantized.layout)
    for ending, part in zip(PARTS, quantized.parts, strict=True):
        value = None if part is None else nn.Parameter(part, requires_grad=False)
        module.register_parameter(name + ending, value)


def set_empty_experts(
    module: nn.Module,
    name: str,
    layout: ExpertsLayout,
    device: torch.device | str = "meta",
) -> None:
    """Make room for a quantized weight in the place of the parameter `name`, to be filled later."""
    _lay_out(module, name, layout)
    for ending, size in zip(PARTS, layout.part_sizes(), strict=True):
        shape = (size, 1) if ending == "" else (size,)
        value = None
        if layout.double_quant or not ending.startswith("_nested"):
            empty = torch.zeros(shape, dtype=torch.uint8, device=device)
            value = nn.Parameter(empty, requires_grad=False)
        module.register_parameter(name + ending, value)


def set_group(module: nn.Module, name: str, index: int, quantized: QuantizedTensor) -> None:
    """Fill one group of a quantized weight that `set_empty_experts` made room for.

    Raises:
        ValueError: if it is not quantized as the layout says, or of another size.
    """
    place = experts_weight(module, name).group(index)
    parts = (quantized.packed, quantized.absmax, quantized.nested_absmax, quantized.nested_offset)
    places = (place.packed, place.absmax, place.nested_absmax, place.nested_offset)
    for part, target in zip(parts, places, strict=True):
        if (part is None) != (target is None) or (
            part is not None and target is not None and part.numel() != target.numel()
        ):
            raise ValueError(f"{quantized} does not fit a group of {name}, which is {place}")
        if part is not None and target is not None:
            target.copy_(part.reshape(target.shape))


def part_of(module: nn.Module, leaf: str) -> str | None:
    """The quantized weight of a module that a parameter is a part of; None for any other one."""
    wholes = (name for name in experts_layouts(module) for end in PARTS if leaf == name + end)
    return next(wholes, None)


def _lay_out(module: nn.Module, name: str, layout: ExpertsLayout) -> None:
    if name not in module._parameters:
        raise ValueError(f"{type(module).__name__} has no parameter {name}")
    # A new dict: that of a shallow copy of the module shall not change.
    module.__dict__["_fourbit_experts"] = {**experts_layouts(module), name: layout}


def experts_weight(module: nn.Module, name: str) -> QuantizedExperts:
    """A quantized weight of a module, in shared memory.

    Raises:
        KeyError: if the parameter is not quantized.
    """
    packed, absmax, nested_absmax, nested_offset = (
        None if part is None else part.data
        for part in (getattr(module, name + ending) for ending in PARTS)
    )
    assert packed is not None
    assert absmax is not None
    layout = experts_layouts(module)[name]
    return QuantizedExperts(layout, packed, absmax, nested_absmax, nested_offset)


def remove_experts(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Put the dense weight back in the place of a quantized one."""
    dense = experts_weight(module, name).dequantize(dtype)
    for ending in PARTS[1:]:
        del module._parameters[name + ending]
    layouts = experts_layouts(module)
    module.__dict__["_fourbit_experts"] = {n: v for n, v in layouts.items() if n != name}
    # In its place: PEFT's adapters of experts stand in the order of the parameters.
    module.register_parameter(name, nn.Parameter(dense, requires_grad=False))


def experts_product(
    module: nn.Module, name: str, x: Tensor, counts: Tensor, *, transposed: bool
) -> Tensor:
    """The product of sorted rows with a 3-D parameter of a module, quantized or dense.

    Args:
        module: of experts.
        name: of the parameter [experts, rows, columns].
        x: rows sorted by expert.
        counts: int64 [experts], how many each has.
        transposed: whether rows of the weight are its inputs.
    """
    layout = experts_layouts(module).get(name)
    weight: Tensor = getattr(module, name)
    if layout is None:
        return expert_matmul(x.to(weight.dtype), counts, weight, transposed=transposed)
    _, rows, columns = layout.shape
    packed, absmax, nested_absmax, nested_offset = (getattr(module, name + p) for p in PARTS)
    return expert_linear(
        x,
        counts,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        layout.codebook.name,
        layout.block_size,
        rows,
        columns,
        layout.groups,
        transposed=transposed,
    )


class ExpertsAdapter(Protocol):
    """What is added to the products of experts: an adapter."""

    def __call__(
        self, name: str, x: Tensor, product: Tensor, counts: Tensor, *, transposed: bool
    ) -> Tensor:
        """The product [n, width] with what the adapter adds for the parameter `name`."""
        ...


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    adapter: ExpertsAdapter | None = None,
) -> Tensor:
    """The output of a module of experts: ``sum_k weight_k * expert_k(x)`` for every token.

    Of the module it takes, as transformers' experts classes have them: ``gate_up_proj`` and
    ``down_proj`` [experts, out, in], or [experts, in, out] where ``is_transposed``; ``up_proj``
    alone where not ``has_gate``; ``NAME_bias`` [experts, out] where ``has_bias``; ``act_fn`` and
    ``_apply_gate``; ``post_expert_norm`` where ``has_post_expert_norm``.

    Args:
        module: of experts.
        hidden_states: [tokens, hidden].
        top_k_index: int64 [tokens, k]: the experts of each token; one that the module does not
            have adds nothing.
        top_k_weights: [tokens, k].
        adapter: of the weights, if there is one.

    Returns:
        [tokens, hidden] in the dtype of `hidden_states`.
    """
    tokens, k = top_k_index.shape
    experts = module.num_experts
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    expert_of_row = top_k_index.reshape(-1)[order]
    # One more bin takes experts that are not here; sorted, their rows are the last.
    ids = expert_of_row.clamp(max=experts)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids, torch.ones_like(ids))[:experts]
    rows_of_none = (ids == experts)[:, None]
    ids = ids.clamp(max=experts - 1)

    def product(name: str, x: Tensor) -> Tensor:
        transposed = module.is_transposed
        out = experts_product(module, name, x, counts, transposed=transposed)
        if adapter is not None:
            out = adapter(name, x, out, counts, transposed=transposed)
        if module.has_bias:
            out = out + getattr(module, f"{name}_bias").to(out.dtype)[ids]
        return out

    x = hidden_states[order // k]
    if module.has_gate:
        x = module._apply_gate(product("gate_up_proj", x))
    else:
        x = module.act_fn(product("up_proj", x))
    x = product("down_proj", x)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    weighted = x * top_k_weights.reshape(-1)[order][:, None]
    weighted = weighted.masked_fill(rows_of_none, 0)
    # A gather and a sum, not index_add, which adds in any order on a GPU.
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    summed = weighted[back].view(tokens, k, weighted.shape[1]).sum(dim=1)
    return summed.to(hidden_states.dtype)
