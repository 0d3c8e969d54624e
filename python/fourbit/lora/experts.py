"""`LoraExperts`: a frozen module of experts with low-rank adapters beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.expert_ops import expert_matmul
from fourbit.experts import QuantizedExperts, experts_forward, experts_layouts, experts_weight
from fourbit.lora.config import scaling
from fourbit.lora.layer import DenseOriginal, InitLora, start_pair

_PROTOCOL = ("num_experts", "is_transposed", "has_gate", "has_bias")


def experts_parameters(module: nn.Module) -> tuple[str, ...]:
    """The 3-D weights of a module that can have adapters, in order of their use.

    It is empty for all but modules of experts as `fourbit.experts.experts_forward` takes them.
    """
    if not all(hasattr(module, name) for name in _PROTOCOL):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return names if all(name in module._parameters for name in names) else ()


def experts_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Experts, inputs and outputs of each, of a weight that may be quantized."""
    layout = experts_layouts(module).get(name)
    experts, rows, columns = getattr(module, name).shape if layout is None else layout.shape
    return (experts, rows, columns) if module.is_transposed else (experts, columns, rows)


def experts_side(x: Tensor, counts: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(x A_e^T) B_e^T`` [n, outputs], what adapters add to a product, before the scaling.

    Args:
        x: [n, inputs], sorted by expert; of the dtype in which the adapter computes.
        counts: int64 [experts], how many rows each has.
        a: [experts, r, inputs].
        b: [experts, outputs, r].
    """
    return expert_matmul(expert_matmul(x, counts, a), counts, b)


def add_experts_delta(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, *, transposed: bool
) -> Tensor:
    """``W_e + scaling * B_e A_e`` of every expert, in the memory of `weight`.

    Args:
        weight: float32 [experts, outputs, inputs], or [experts, inputs, outputs] if `transposed`.
        a: [experts, r, inputs].
        b: [experts, outputs, r].
        scaling: of the adapter.
        transposed: whether rows of the weight are its inputs.
    """
    a, b = a.detach().float(), b.detach().float()
    if transposed:
        return weight.baddbmm_(a.transpose(1, 2), b.transpose(1, 2), alpha=scaling)
    return weight.baddbmm_(b, a, alpha=scaling)


class ExpertsLora(nn.Module):
    """The adapters of all experts for one 3-D weight: ``scaling * B_e(A_e(dropout(x)))``.

    Attributes:
        lora_A: [experts, r, in_features].
        lora_B: [experts, out_features, r].
        lora_dropout: what rows of the input pass through.
        num_experts: how many.
        in_features: of each expert.
        out_features: of each expert.
        r: rank of each expert's adapter.
        lora_alpha: numerator of the scaling.
        scaling: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA.

    Args:
        shape: experts, inputs and outputs of each.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability with which an input of the adapter is zeroed in training; each
            expert that a token goes to has its own zeros.
        use_rslora: divide by ``sqrt(r)``.
        init_lora_weights: as in `LoraLinear`.
        dtype: of the adapter.
        device: of the adapter.
        generator: of the random numbers, on the CPU.

    Raises:
        ValueError: for another `init_lora_weights`, or a rank below 1.
    """

    lora_dropout: nn.Module

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        r: int,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLora = "default",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r is {r}; a rank is at least 1")
        self.num_experts, self.in_features, self.out_features = shape
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.scaling = scaling(lora_alpha, r, use_rslora=use_rslora)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        a = torch.empty(self.num_experts, r, self.in_features, dtype=dtype, device=device)
        b = torch.empty(self.num_experts, self.out_features, r, dtype=dtype, device=device)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self._original: QuantizedExperts | DenseOriginal | None = None
        self.reset_lora_parameters(init_lora_weights, generator=generator)

    @torch.no_grad()
    def reset_lora_parameters(
        self,
        init_lora_weights: InitLora = "default",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start every expert's A and B anew, as `LoraLinear` does. Nothing happens on meta.

        Raises:
            ValueError: for an unknown `init_lora_weights`.
        """
        # Expert by expert: in three dimensions torch would take the experts for inputs.
        for a, b in zip(self.lora_A, self.lora_B, strict=True):
            start_pair(a, b, init_lora_weights, generator)

    def forward(self, x: Tensor, product: Tensor, counts: Tensor) -> Tensor:
        """The product [n, out_features] of rows `x` [n, in_features], with the adapter's added."""
        dropped = self.lora_dropout(x.to(self.lora_A.dtype))
        side = experts_side(dropped, counts, self.lora_A, self.lora_B)
        return torch.add(product, side, alpha=self.scaling).to(product.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        merged = ", merged" if self._original is not None else ""
        return (
            f"{self.num_experts} experts, {self.in_features} -> {self.out_features}, r={self.r}, "
            f"scaling={self.scaling:g}{merged}"
        )


class LoraExperts(nn.Module):
    """A frozen module of experts with low-rank adapters on some of its 3-D weights.

    For each such weight and each expert ``e``, ``y = W_e x + scaling * B_e A_e dropout(x)``, in the
    adapter's own dtype (or autocast's, where that is on), rounded once to that of the product with
    the frozen weight. That product comes from `fourbit.experts.experts_forward`, whatever
    implementation of experts the model's configuration names.

    Attributes that it does not have are the frozen module's, so that code of models which looks at
    its experts finds what it looks for.

    Attributes:
        base_layer: the frozen module; its 3-D weights are dense or quantized.
        adapters: an `ExpertsLora` for each 3-D weight that has one, by its name, in order of use.

    Args:
        base_layer: the module to wrap; it is not changed and not frozen here.
        adapters: by name of the weight.

    Raises:
        ValueError: if the module has no 3-D weight of such a name and shape.
    """

    base_layer: nn.Module
    adapters: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, adapters: Mapping[str, ExpertsLora]) -> None:
        super().__init__()
        known = experts_parameters(base_layer)
        for name, lora in adapters.items():
            shape = (lora.num_experts, lora.in_features, lora.out_features)
            if name not in known or experts_shape(base_layer, name) != shape:
                raise ValueError(
                    f"{type(base_layer).__name__} has no weight {name} of {shape[0]} experts with "
                    f"{shape[1]} inputs and {shape[2]} outputs"
                )
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict({name: adapters[name] for name in known if name in adapters})
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        """As ``nn.Module``'s, and the frozen module's for all else."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                # Being copied or unpickled: nothing is there yet.
                raise
            return getattr(self.base_layer, name)

    def lora(self, name: str) -> ExpertsLora:
        """The adapters of one weight."""
        found = self.adapters[name]
        assert isinstance(found, ExpertsLora)
        return found

    @property
    def names(self) -> Sequence[str]:
        """The weights that have adapters, in order of use."""
        return tuple(self.adapters)

    @property
    def merged(self) -> bool:
        """Whether the frozen weights hold the adapters (`fourbit.merge`)."""
        return any(self.lora(name)._original is not None for name in self.names)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output [tokens, hidden], as `fourbit.experts.experts_forward` has it."""
        adapter = None if self.merged else self._add
        return experts_forward(
            self.base_layer, hidden_states, top_k_index, top_k_weights, adapter=adapter
        )

    def _add(
        self, name: str, x: Tensor, product: Tensor, counts: Tensor, *, transposed: bool
    ) -> Tensor:
        # The frozen weight's layout says nothing of the adapter's.
        del transposed
        if name not in self.adapters:
            return product
        total: Tensor = self.adapters[name](x, product, counts)
        return total


def stored_experts(base: nn.Module, name: str) -> QuantizedExperts | DenseOriginal:
    """A 3-D weight as the module has it, in shared memory.

    Raises:
        ValueError: for a weight that is sharded over processes.
    """
    weight: Any = getattr(base, name)
    if hasattr(weight, "to_local"):
        raise ValueError(
            f"{name} is sharded over processes (FSDP2); save the adapter with "
            "fourbit.save_adapter, and merge it in one process"
        )
    return experts_weight(base, name) if name in experts_layouts(base) else DenseOriginal(weight)


def dense_experts(stored: QuantizedExperts | DenseOriginal, device: torch.device) -> Tensor:
    """A stored 3-D weight as a new float32 tensor of its own shape."""
    if isinstance(stored, QuantizedExperts):
        return stored.dequantize(torch.float32).to(device)
    return stored.weight.detach().to(device, torch.float32, copy=True)


def original_experts(module: LoraExperts, name: str) -> Tensor:
    """The frozen 3-D weight before any merge, as a new float32 tensor of its own shape.

    Raises:
        ValueError: for a weight that is sharded over processes.
    """
    stored = module.lora(name)._original or stored_experts(module.base_layer, name)
    return dense_experts(stored, getattr(module.base_layer, name).device)


@torch.no_grad()
def merged_experts(module: LoraExperts, name: str) -> Tensor:
    """A 3-D weight with its adapters added, in float32, in the shape that the module stores.

    ``W_e + scaling * B_e A_e`` of every expert, where ``W`` is the weight that the adapter was
    trained on (a quantized one is dequantized). It is the same before and after `fourbit.merge`.
    """
    lora = module.lora(name)
    return add_experts_delta(
        original_experts(module, name),
        lora.lora_A,
        lora.lora_B,
        lora.scaling,
        transposed=bool(module.base_layer.is_transposed),
    )
