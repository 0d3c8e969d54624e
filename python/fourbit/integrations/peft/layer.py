"""`LoraLinear4bit`: PEFT's LoRA layer on a `Linear4bit`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.lora.variants import ALoraLinearVariant, ArrowLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fourbit._core import NonFiniteError
from fourbit.integrations.peft.dora import DoraVariant
from fourbit.integrations.peft.support import LOSSY_MERGE
from fourbit.lora.dora import KeptNorms
from fourbit.lora.layer import add_side, base_weight
from fourbit.lora.loftq import requantize
from fourbit.quantized import QuantizedTensor


@dataclass(frozen=True)
class Unmerged:
    """What a layer held before any adapter was merged into it."""

    weight: QuantizedTensor
    bias: Tensor | None


class LoraLinear4bit(Linear):  # type: ignore[misc]
    """A frozen `Linear4bit` with PEFT's adapters beside it.

    It is ``peft.tuners.lora.Linear`` in everything but this:

    - The adapters' sums are made in the wider of the two dtypes, inside the layer's own output, and
      rounded once.
    - `merge` requantizes in the layer's own format, from the weight before all merges, and
      `unmerge` puts the bytes back that were there.
    - Initialisations that look at the weight see it dequantized, and what they change of it is
      quantized again in the layer's own format.
    - DoRA's norms are kept while nothing is trained.

    An adapter starts in the dtype that the weight had before it was quantized, as beside a dense
    layer; ``autocast_adapter_dtype`` (PEFT's default) then makes 16 bits float32.
    """

    _unmerged: Unmerged | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._norms: dict[str, KeptNorms] = {}

    def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant | None:
        """What an adapter is beside plain LoRA; `check_supported` has refused what is not here."""
        options = kwargs.get("config")

        def asked(name: str) -> Any:
            return kwargs.get(name) if options is None else getattr(options, name, None)

        if asked("use_dora"):
            return DoraVariant()
        if asked("use_alora") or asked("alora_invocation_tokens"):
            return ALoraLinearVariant()
        return ArrowLinearVariant() if asked("arrow_config") else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` [..., in_features] -> [..., out_features], in the dtype of the base's output."""
        if args or kwargs:  # batches of several adapters, offsets of aLoRA
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return result
        total = result
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            side = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            if name in self.lora_variant:
                variant = self.lora_variant[name]
                total = variant.forward(self, active_adapter=name, x=side, result=total)
                continue
            down = self.lora_A[name](self.lora_dropout[name](side))
            up = self.lora_B[name]
            if _is_plain(up):
                total = add_side(total, down, up.weight, self.scaling[name])
            else:
                total = total + up(down) * self.scaling[name]
        return total.to(result.dtype)

    def unmerged_weight(self) -> Tensor:
        """The weight without any adapter, as a new float32 tensor [out_features, in_features]."""
        if self._unmerged is None:
            return base_weight(self.get_base_layer())
        weight: Tensor = self._unmerged.weight.dequantize(torch.float32)
        return weight.to(self.get_base_layer().weight.device)

    @torch.no_grad()
    def weight_with(self, names: list[str]) -> Tensor:
        """The weight with these adapters added in that order, float32 [out_features, in_features].

        It is the same before and after `merge`.
        """
        weight = self.unmerged_weight()
        for name in names:
            if name in self.lora_variant:
                weight = self.lora_variant[name].merge_safe(self, name, weight)
            else:
                weight = self.add_delta(weight, name)
        return weight

    def add_delta(self, weight: Tensor, name: str) -> Tensor:
        """``weight + scaling * B A``, float32, in the memory of `weight`."""
        a, b = self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()
        return weight.addmm_(b.float(), a.float(), alpha=self.scaling[name])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight: it is dequantized, and the sum in float32 quantized again.

        Rounding to 4 bits loses part of a small change; ``fourbit.export_merged`` writes all of it.

        Args:
            safe_merge: makes no difference: numbers that are not finite are always refused.
            adapter_names: which; by default the active ones.

        Raises:
            NonFiniteError: for an adapter that gives NaN or infinity; the layer is as it was.
            ValueError: for an adapter with a bias on a layer without one.
        """
        wanted = check_adapters_to_merge(self, adapter_names) or []
        names = [name for name in wanted if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        before = self._unmerged or Unmerged(base.quantized(), base.bias)
        merged = [*(name for name in self.merged_adapters if name in self.lora_A), *names]
        weight, bias = self.weight_with(merged), self._bias_with(merged, before.bias)
        if not weight.isfinite().all() or not (bias is None or bias.isfinite().all()):
            raise NonFiniteError(
                f"the adapter {', '.join(names)} gives NaN or infinity; it cannot be merged"
            )
        warnings.warn(LOSSY_MERGE, stacklevel=2)
        # Requantizing moves even an unchanged weight a little where its scales are quantized too.
        if not torch.equal(weight, self.unmerged_weight()):
            base.set_quantized(requantize(weight, before.weight))
        if bias is not None and bias is not before.bias:
            base.bias = nn.Parameter(bias, requires_grad=False)
        self._unmerged = before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight back as it was before all merges, bit for bit."""
        if self._unmerged is None:
            warnings.warn("nothing is merged; there is nothing to undo", stacklevel=2)
            return
        base, before = self.get_base_layer(), self._unmerged
        device = base.weight.device
        base.set_quantized(before.weight.to(device))
        if before.bias is not None:
            bias = before.bias.to(device)
            base.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, False)
        self._unmerged = None
        self.merged_adapters.clear()

    def weight_norm(self, name: str) -> Tensor:
        """Row norms of ``W + scaling * B A``, float32 [out_features], detached; see `KeptNorms`."""
        parts = (
            *self.get_base_layer().parameters(),
            self.lora_A[name].weight,
            self.lora_B[name].weight,
        )

        def weight() -> Tensor:
            return self.add_delta(self.unmerged_weight(), name)

        kept = self._norms.setdefault(name, KeptNorms())
        return kept.get(parts, self.scaling[name], weight, training=self.training)

    def train(self, mode: bool = True) -> LoraLinear4bit:
        """As ``nn.Module.train``; forgets kept norms."""
        for kept in self._norms.values():
            kept.forget()
        super().train(mode)
        return self

    # --- initialisations that look at the weight ------------------------------------------------

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """PiSSA (arXiv 2404.02948): the adapter takes the largest singular values."""
        with self._dense_base(adapter_name, init_lora_weights):
            super().pissa_init(adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        """OLoRA (arXiv 2406.01775): the adapter takes the first columns of a QR decomposition."""
        with self._dense_base(adapter_name, "olora"):
            super().olora_init(adapter_name)

    def orthogonal_init(self, adapter_name: str) -> None:
        """Random orthogonal rows; PEFT looks at the weight's dtype for it."""
        with self._dense_base(adapter_name, "orthogonal", keeps_base=True):
            super().orthogonal_init(adapter_name)

    @contextmanager
    def _dense_base(
        self, adapter_name: str, init: str, *, keeps_base: bool = False
    ) -> Iterator[None]:
        """Let PEFT see a dense, float32 layer; then quantize the weight less the adapter."""
        base = self.get_base_layer()
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        if a.weight.is_meta or base.weight.is_meta:
            raise ValueError(
                f'init_lora_weights="{init}" needs weights, and these are on the meta device; '
                "load without low_cpu_mem_usage"
            )
        if self.merged:
            raise ValueError(
                f'init_lora_weights="{init}" looks at the weight, which holds a merged adapter; '
                "unmerge it first"
            )
        weight = base_weight(base)
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        # Not by assignment: PEFT may be putting every new parameter on the meta device.
        dense._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)
        parent = self
        while hasattr(parent.base_layer, "base_layer"):
            parent = parent.base_layer
        parent.base_layer = dense
        try:
            # The start must be the same each time: a saved adapter is loaded beside a base that
            # this has changed again.
            with torch.random.fork_rng(enabled=not keeps_base, devices=_devices(weight)):
                if not keeps_base:
                    torch.manual_seed(0)
                yield
        finally:
            parent.base_layer = base
        for part in (a, b):
            part.weight.data = part.weight.data.to(base.weight.device, base.weight_dtype)
        if not keeps_base:
            with torch.no_grad():
                delta = b.weight.float() @ a.weight.float()
                rest = weight.sub_(delta, alpha=self.scaling[adapter_name])
            base.set_quantized(requantize(rest, base.quantized()))

    def _bias_with(self, names: list[str], bias: Tensor | None) -> Tensor | None:
        for name in names:
            if not self.lora_bias.get(name):
                continue
            if bias is None:
                raise ValueError(
                    f"the adapter {name} has a bias (lora_bias=True) and the layer has none; "
                    "it cannot be merged"
                )
            change = self.lora_B[name].bias.float() * self.scaling[name]
            bias = (bias.detach().float() + change).to(bias.dtype)
        return bias


def _is_plain(up: nn.Module) -> bool:
    """Whether a layer does no more than its product; FSDP and others add hooks that must run."""
    hooks = up._forward_hooks or up._forward_pre_hooks
    return type(up) is nn.Linear and getattr(up, "bias", None) is None and not hooks


def _devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.is_cuda else []
