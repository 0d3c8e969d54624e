"""`ParamWrapper`: PEFT's LoRA on the 3-D weights of 4-bit experts (``target_parameters``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fourbit.experts import QuantizedExperts, experts_forward, experts_layouts
from fourbit.integrations.peft.support import LOSSY_MERGE
from fourbit.lora.experts import (
    add_experts_delta,
    dense_experts,
    experts_parameters,
    experts_side,
    stored_experts,
)
from fourbit.lora.experts_files import memory_a, memory_b
from fourbit.lora.layer import DenseOriginal
from fourbit.lora.merge import restore_experts, store_experts


class ParamWrapper(peft_layer.ParamWrapper):  # type: ignore[misc]
    """A module of experts, some of its weights in 4 bits, with PEFT's adapters for one of them.

    It is PEFT's class of that name, which PEFT also looks for by its name, in everything but this:

    - Adapters are computed beside the frozen weights, expert by expert, where PEFT adds their
      products to the weights in each forward.
    - `merge` requantizes in the weight's own format, from the weight before all merges, and
      `unmerge` puts the bytes back that were there.

    As in PEFT, wrappers of several weights of one module are each other's base. The outermost one
    computes, for all of them.
    """

    num_experts: int
    _unmerged: QuantizedExperts | DenseOriginal | None = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Rows and columns of each expert's weight as it is stored; PEFT swaps them at need."""
        base = self.get_base_layer()
        if self.parameter_name not in experts_parameters(base):
            raise ValueError(
                f"target_parameters names {self.parameter_name} of a {type(base).__name__}, whose "
                "experts are in 4 bits; only "
                f"{' and '.join(experts_parameters(base)) or 'none of its weights'} can have "
                "adapters"
            )
        layout = experts_layouts(base).get(self.parameter_name)
        shape = self.get_param().shape if layout is None else layout.shape
        self.num_experts, rows, columns = shape
        self._param_ndim = len(shape)
        return rows, columns

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        layout = experts_layouts(self.get_base_layer()).get(self.parameter_name)
        if layout is not None:
            # As beside a dense weight; PEFT makes 16 bits float32 later.
            for parts in (self.lora_A, self.lora_B):
                parts[adapter_name].to(layout.dtype)

    def _chain(self) -> Iterator[ParamWrapper]:
        """This wrapper and those inside it."""
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output [tokens, hidden], as `fourbit.experts.experts_forward` has it.

        Raises:
            ValueError: for a batch that names an adapter for each of its rows.
        """
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        wrappers = {wrapper.parameter_name: wrapper for wrapper in self._chain()}
        for wrapper in wrappers.values():
            if wrapper.disable_adapters and wrapper.merged:
                wrapper.unmerge()

        def add(
            name: str, x: Tensor, product: Tensor, counts: Tensor, *, transposed: bool
        ) -> Tensor:
            del transposed
            return wrappers[name]._add(x, product, counts) if name in wrappers else product

        return experts_forward(self.get_base_layer(), x, *args, adapter=add, **kwargs)

    def _add(self, x: Tensor, product: Tensor, counts: Tensor) -> Tensor:
        if self.disable_adapters or self.merged:
            return product
        total = product
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self._factors(name)
                side = experts_side(self._cast_input_dtype(x, a.dtype), counts, a, b)
                total = torch.add(total, side, alpha=self.scaling[name])
        return total.to(product.dtype)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [experts, r, inputs] and B [experts, outputs, r] of an adapter: views."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return memory_a(a, self.num_experts), memory_b(b, self.num_experts)

    @torch.no_grad()
    def weight_with(self, names: list[str]) -> Tensor:
        """The weight with these adapters added, float32, in the shape that it is stored in.

        It is the same before and after `merge`.
        """
        base = self.get_base_layer()
        original = self._unmerged or stored_experts(base, self.parameter_name)
        weight = dense_experts(original, self.get_param().device)
        for name in names:
            a, b = self._factors(name)
            add_experts_delta(weight, a, b, self.scaling[name], transposed=base.is_transposed)
        return weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight: it is dequantized, and the sum in float32 quantized again.

        Args:
            safe_merge: as in PEFT; a sum that is not finite is always refused.
            adapter_names: which; by default those that are active.

        Raises:
            NonFiniteError: if the sum has NaN or infinity; nothing is changed.
        """
        del safe_merge
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        base, weight_name = self.get_base_layer(), self.parameter_name
        original = self._unmerged or stored_experts(base, weight_name)
        weight = self.weight_with([*self.merged_adapters, *names])
        path = f"{type(base).__name__}.{weight_name}"
        warnings.warn(LOSSY_MERGE, stacklevel=2)
        store_experts(base, weight_name, weight, original, path=path)
        self._unmerged = original
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight back as it was before all merges, bit for bit."""
        if not self.merged:
            warnings.warn("nothing is merged; there is nothing to undo", stacklevel=2)
            return
        if self._unmerged is not None:
            restore_experts(self.get_base_layer(), self.parameter_name, self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()
