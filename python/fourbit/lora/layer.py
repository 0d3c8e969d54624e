"""`LoraLinear`: a frozen linear layer with a low-rank adapter beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit import ops
from fourbit.linear import Linear4bit
from fourbit.lora.config import scaling
from fourbit.lora.dora import KeptNorms, add_dora, row_norms
from fourbit.quantized import QuantizedTensor

InitLora: TypeAlias = bool | Literal["default", "gaussian"]


@dataclass(frozen=True)
class DenseOriginal:
    """A dense weight out of use, wrapped, or ``nn.Module`` would take it for one in use.

    It is the parameter itself and not its data: it may be tied to an embedding's.
    """

    weight: Tensor


@torch.no_grad()
def start_pair(
    a: Tensor, b: Tensor, init_lora_weights: InitLora, generator: torch.Generator | None
) -> None:
    """Start A [r, in] and B [out, r] of one adapter, in place. Nothing happens on meta.

    Raises:
        ValueError: naming an unknown `init_lora_weights`.
    """
    if not (isinstance(init_lora_weights, bool) or init_lora_weights in ("default", "gaussian")):
        raise ValueError(
            f"init_lora_weights is {init_lora_weights!r}; "
            'use "default", "gaussian", "loftq", True or False'
        )
    if a.is_meta:
        return
    start = torch.empty(a.shape, dtype=torch.float32)
    if init_lora_weights == "gaussian":
        nn.init.normal_(start, std=1 / a.shape[0], generator=generator)
    else:
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    a.copy_(start)
    if init_lora_weights is False:
        start = torch.empty(b.shape, dtype=torch.float32)
        b.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
    else:
        nn.init.zeros_(b)


class LoraLinear(nn.Module):
    """``base(x) + scaling * B(A(dropout(x)))`` (arXiv 2106.09685), or its DoRA variant.

    The adapter computes in its own dtype, float32 unless asked otherwise (or in autocast's, where
    that is on); the sum is rounded once to the dtype of the base's output. With DoRA
    (arXiv 2402.09353) row ``i`` of the weight is ``m[i] (W + s B A)[i] / ‖(W + s B A)[i]‖``, the
    norm being a constant for the gradient as in the paper's section 4.3.

    Attributes:
        base_layer: the frozen layer, ``nn.Linear`` or `Linear4bit`.
        lora_A: ``nn.Linear`` without bias, weight [r, in_features].
        lora_B: ``nn.Linear`` without bias, weight [out_features, r].
        lora_dropout: what the adapter's input passes through.
        lora_magnitude_vector: ``m``, [out_features]; None without DoRA.
        r: rank.
        lora_alpha: numerator of the scaling.
        scaling: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA.

    Args:
        base_layer: the layer to wrap; it is not changed and not frozen here.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability with which an input of the adapter is zeroed in training.
        use_rslora: divide by ``sqrt(r)`` (arXiv 2312.03732).
        use_dora: learn magnitudes.
        init_lora_weights: "default" or True: A as ``nn.Linear``'s, B zero; "gaussian": A normal
            with deviation 1/r, B zero; False: both as ``nn.Linear``'s, so that the adapter changes
            the output at once (for tests).
        dtype: of the adapter.
        generator: of the random numbers, on the CPU, so that every device starts alike.

    Raises:
        ValueError: for another `init_lora_weights`, or a rank below 1.
    """

    lora_dropout: nn.Module
    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        r: int,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: InitLora = "default",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r is {r}; a rank is at least 1")
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.scaling = scaling(lora_alpha, r, use_rslora=use_rslora)
        self.base_layer = base_layer
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_A = _empty_linear(self.in_features, r, base_layer.weight.device, dtype)
        self.lora_B = _empty_linear(r, self.out_features, base_layer.weight.device, dtype)
        self.register_parameter("lora_magnitude_vector", None)
        self._original: QuantizedTensor | DenseOriginal | None = None
        self._norms = KeptNorms()
        self.reset_lora_parameters(init_lora_weights, generator=generator)
        if use_dora:
            magnitude = torch.empty(self.out_features, dtype=dtype, device=base_layer.weight.device)
            self.lora_magnitude_vector = nn.Parameter(magnitude)
            self.reset_magnitude()
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight; model code looks at its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the base holds the adapter (`fourbit.merge`)."""
        return self._original is not None

    def reset_lora_parameters(
        self,
        init_lora_weights: InitLora = "default",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start A and B anew. Nothing happens on the meta device.

        Raises:
            ValueError: for an unknown `init_lora_weights`.
        """
        start_pair(self.lora_A.weight, self.lora_B.weight, init_lora_weights, generator)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set DoRA's magnitudes to the present row norms, so that DoRA starts as plain LoRA."""
        magnitude = self.lora_magnitude_vector
        if magnitude is not None and not magnitude.is_meta:
            magnitude.copy_(row_norms(direction_weight(self)))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] -> [..., out_features], in the dtype of the base's output."""
        result: Tensor = self.base_layer(x)
        if self._original is not None:
            return result
        a, b = self.lora_A.weight, self.lora_B.weight
        dropped, dropout = cast(x, a.dtype), self.lora_dropout
        if type(dropout) is not nn.Identity:
            dropped = dropout(dropped)
        down = F.linear(dropped, a)
        if self.lora_magnitude_vector is None:
            return cast(add_side(result, down, b, self.scaling), result.dtype)
        side = F.linear(down, b) * self.scaling
        # Dropout acts on the whole input of the direction, that of the frozen weight included.
        if self.training and isinstance(self.lora_dropout, nn.Dropout):
            direction = base_product(self.base_layer, dropped)
        else:
            direction = result if self.bias is None else result - self.bias
        factor: Tensor = self.lora_magnitude_vector / self.weight_norm()
        return add_dora(result, direction, side, factor).to(result.dtype)

    def weight_norm(self) -> Tensor:
        """Row norms of ``W + scaling * B A``, float32 [out_features], detached.

        In eval mode without gradients they are kept between calls, see `KeptNorms`.
        """
        parts = (*self.base_layer.parameters(), self.lora_A.weight, self.lora_B.weight)
        return self._norms.get(
            parts, self.scaling, lambda: direction_weight(self), training=self.training
        )

    def train(self, mode: bool = True) -> LoraLinear:
        """As ``nn.Module.train``; forgets kept norms."""
        self._norms.forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        kind = "DoRA" if self.lora_magnitude_vector is not None else "LoRA"
        state = ", merged" if self.merged else ""
        return f"{kind}, r={self.r}, scaling={self.scaling:g}{state}"


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in that dtype; one that has it is not even looked at, which for one row counts."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def add_side(result: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """``result + scaling * down up^T``, in the wider dtype of `result` and `down`.

    The product adds itself into the output, which is the layer's own memory: of all tensors as
    large as the output there is one where the dtypes agree, and three passes over it are saved.

    Args:
        result: [..., out_features]; written to where it has the wider dtype.
        down: [..., r].
        up: [out_features, r].
        scaling: of the product.
    """
    dtype = result.dtype
    if down.dtype is not dtype:
        dtype = torch.promote_types(dtype, down.dtype)
    out_features, r = up.shape
    total = cast(result, dtype).reshape(-1, out_features)
    up = cast(up, dtype)  # operators in place know no autocast
    total = total.addmm_(cast(down, dtype).reshape(-1, r), up.t(), alpha=scaling)
    return total.view_as(result)


def base_product(base: nn.Linear, x: Tensor) -> Tensor:
    """``x W^T`` with the frozen weight and without the bias, in the dtype of `x`."""
    if isinstance(base, Linear4bit):
        return ops.linear(x, None, *base.operands()[1:])
    return F.linear(x, base.weight.to(x.dtype))


def base_weight(base: nn.Linear) -> Tensor:
    """A layer's weight as a new float32 tensor [out_features, in_features].

    Raises:
        TypeError: for a weight in another library's format.
        ValueError: for a weight that is sharded over processes.
    """
    if hasattr(base.weight, "to_local"):
        raise ValueError(
            "the weight is sharded over processes (FSDP2); save the adapter with "
            "fourbit.save_adapter, and merge it in one process"
        )
    if isinstance(base, Linear4bit):
        return ops.dequantize(
            base.weight,
            base.weight_absmax,
            base.weight_nested_absmax,
            base.weight_nested_offset,
            base.codebook.name,
            base.block_size,
            (base.out_features, base.in_features),
            torch.float32,
        )
    if not base.weight.is_floating_point():
        raise TypeError(
            f"a {type(base).__name__} holds its weight as {base.weight.dtype}, which cannot be "
            "read; use nn.Linear or fourbit.Linear4bit"
        )
    return base.weight.detach().to(torch.float32, copy=True)


def original_weight(module: LoraLinear) -> Tensor:
    """The frozen weight before any merge, as a new float32 tensor [out_features, in_features]."""
    original = module._original
    if original is None:
        return base_weight(module.base_layer)
    if isinstance(original, QuantizedTensor):
        weight: Tensor = original.dequantize(torch.float32)
        return weight.to(module.lora_A.weight.device)
    dense = original.weight.detach()
    return dense.to(module.lora_A.weight.device, torch.float32, copy=True)


def direction_weight(module: LoraLinear) -> Tensor:
    """``W + scaling * B A`` in float32, a new tensor [out_features, in_features]."""
    a, b = module.lora_A.weight.detach().float(), module.lora_B.weight.detach().float()
    # In place: of matrices as large as the weight there is one, not three.
    return original_weight(module).addmm_(b, a, alpha=module.scaling)


@torch.no_grad()
def merged_weight(module: LoraLinear) -> Tensor:
    """The weight of one layer with its adapter added, in float32 [out_features, in_features].

    ``W + scaling * B A``, where ``W`` is the weight that the adapter was trained on (a 4-bit one
    is dequantized), or DoRA's weight. It is the same before and after `fourbit.merge`.
    """
    weight = direction_weight(module)
    magnitude = module.lora_magnitude_vector
    if magnitude is not None:
        weight *= (magnitude.float() / row_norms(weight))[:, None]
    return weight


def _empty_linear(
    in_features: int, out_features: int, device: torch.device, dtype: torch.dtype
) -> nn.Linear:
    # On the meta device first: nn.Linear would draw random numbers that nobody uses.
    layer = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
    return layer if device.type == "meta" else layer.to_empty(device=device)
