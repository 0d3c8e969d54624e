"""`Linear4bit`: a frozen ``nn.Linear`` whose weight stays in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fourbit import ops
from fourbit.codebook import Codebook, as_codebook
from fourbit.dense import weight_by_rows
from fourbit.integrations import is_conv1d
from fourbit.layout import NESTED_BLOCK_SIZE, block_count, packed_bytes
from fourbit.quantized import QuantizedTensor, quantize

Operands: TypeAlias = tuple[
    Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, str, int, int, int
]
"""A layer's bias, weight and layout, in the order of the arguments of `ops.linear`."""

_BYTES = torch.uint8  # one look-up less in a call that finds nothing in the cache


class Linear4bit(nn.Linear):
    """A linear layer with a frozen, quantized weight: ``x W^T + b``.

    It computes in the dtype of its input. All parts of the weight are plain, frozen uint8
    parameters, with float32 constants bit-cast to bytes, so that casts of the model, ``deepcopy``,
    ``state_dict``, DDP, FSDP2 and ``torch.compile`` leave them alone:

    ========================  ====================================  ===========================
    parameter                 shape                                 meaning
    ========================  ====================================  ===========================
    ``weight``                [bytes, 1]                            packed codes, row-major
    ``weight_absmax``         [blocks] or [4 * blocks]              scales: codes, or float32
    ``weight_nested_absmax``  [4 * ceil(blocks / 256)]              scales of the scales
    ``weight_nested_offset``  [4]                                   mean of the scales
    ``bias``                  [out_features]                        as in ``nn.Linear``
    ========================  ====================================  ===========================

    The weight is [out_features, in_features]. Where dense checkpoints hold its transpose, as those
    of GPT-2 do, `transposed_when_dense` is True, and dense checkpoints are written so.

    The last two of the weight exist only with double quantization. A state dict holds these bytes
    and no more: it goes into a layer made with the same codebook, block size and sizes. Folders of
    ``fourbit.save`` say these themselves.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether there is a bias.
        codebook: "nf4", "fp4", "int4", an ``{index: value}`` map or a `Codebook`.
        block_size: elements of the weight that share a scale.
        double_quant: whether the scales are quantized too.
        device: of the parameters; "meta" gives a layer to be filled by ``load_state_dict``.
        dtype: of the bias, and of the weight before quantization (what `dequantize` returns).
    """

    codebook: Codebook
    block_size: int
    double_quant: bool
    transposed_when_dense: bool = False
    weight_absmax: nn.Parameter
    weight_nested_absmax: nn.Parameter | None
    weight_nested_offset: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codebook: str | Mapping[int, float] | Codebook = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Linear would allocate and initialise the dense weight: 4 to 8 times our size.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.codebook = as_codebook(codebook)
        self.block_size = block_size
        self.double_quant = double_quant
        self.weight_dtype = dtype or torch.get_default_dtype()

        def frozen(*size: int) -> nn.Parameter:
            empty = torch.zeros(size, dtype=torch.uint8, device=device)
            return nn.Parameter(empty, requires_grad=False)

        count = in_features * out_features
        blocks = block_count(count, block_size)
        self.weight = frozen(packed_bytes(count, self.codebook.code_bits), 1)
        self.weight_absmax = frozen(blocks if double_quant else 4 * blocks)
        if double_quant:
            self.weight_nested_absmax = frozen(4 * block_count(blocks, NESTED_BLOCK_SIZE))
            self.weight_nested_offset = frozen(4)
        else:
            self.register_parameter("weight_nested_absmax", None)
            self.register_parameter("weight_nested_offset", None)
        if bias:
            zeros = torch.zeros(out_features, dtype=self.weight_dtype, device=device)
            self.bias = nn.Parameter(zeros)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        codebook: str | Mapping[int, float] | Codebook = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
    ) -> Linear4bit:
        """The quantized twin of a dense layer, which is left as it is; the bias is shared.

        Args:
            linear: ``nn.Linear``, or transformers' `Conv1D`.
            codebook: as for the class.
            block_size: as for the class.
            double_quant: as for the class.

        Raises:
            NonFiniteError: naming the first weight that is NaN or infinite.
            TypeError: for a weight that is not float32, float16 or bfloat16.
        """
        quantized = quantize(
            weight_by_rows(linear),
            codebook=codebook,
            block_size=block_size,
            double_quant=double_quant,
        )
        bias: Any = linear.bias
        layer = cls.from_quantized(quantized, bias=bias)
        layer.transposed_when_dense = is_conv1d(linear)
        return layer

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedTensor, *, bias: nn.Parameter | Tensor | None = None
    ) -> Linear4bit:
        """A layer around a quantized matrix [out_features, in_features], whose memory it shares.

        Raises:
            ValueError: unless the tensor is 2-D.
        """
        if len(quantized.shape) != 2:
            raise ValueError(f"a linear layer needs a 2-D weight, not {tuple(quantized.shape)}")
        out_features, in_features = quantized.shape
        layer = cls(
            in_features,
            out_features,
            bias=False,
            codebook=quantized.codebook,
            block_size=quantized.block_size,
            double_quant=quantized.double_quant,
            device="meta",
            dtype=quantized.dtype,
        )
        layer.set_quantized(quantized)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def quantized(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor` that shares this layer's memory."""
        _, packed, absmax, nested_absmax, nested_offset, *_ = self.operands()
        return QuantizedTensor(
            packed.data,
            absmax.data,
            None if nested_absmax is None else nested_absmax.data,
            None if nested_offset is None else nested_offset.data,
            self.codebook,
            self.block_size,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
        )

    def set_quantized(self, quantized: QuantizedTensor) -> None:
        """Put another quantized weight of the same shape in place; its memory is shared.

        Raises:
            ValueError: for another shape.
        """
        if tuple(quantized.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"a weight of {tuple(quantized.shape)} does not fit a layer of "
                f"{(self.out_features, self.in_features)}"
            )

        def frozen(part: Tensor | None) -> nn.Parameter | None:
            return None if part is None else nn.Parameter(part, requires_grad=False)

        self.codebook = quantized.codebook
        self.block_size = quantized.block_size
        self.double_quant = quantized.double_quant
        self.weight_dtype = quantized.dtype
        self.register_parameter("weight", frozen(quantized.packed))
        self.register_parameter("weight_absmax", frozen(quantized.absmax))
        self.register_parameter("weight_nested_absmax", frozen(quantized.nested_absmax))
        self.register_parameter("weight_nested_offset", frozen(quantized.nested_offset))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype`, by default the original one."""
        weight: Tensor = self.quantized().dequantize(dtype)
        return weight

    def in_dense_files(self, weight: Tensor) -> Tensor:
        """A dense weight of this layer as dense checkpoints hold it, or of those as it is here."""
        return weight.t().contiguous() if self.transposed_when_dense else weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in nn.Linear
        """``input`` [..., in_features] -> [..., out_features], in the dtype of `input`."""
        return ops.linear(input, *self.operands())

    def operands(self) -> Operands:
        """What `ops.linear` takes beside its input."""
        parameters: dict[str, Any] = self._parameters
        try:
            # One by one as attributes they would cost more than all else here: ``nn.Module`` finds
            # a parameter only when Python has given up looking for an attribute.
            bias = parameters["bias"]
            packed, absmax = parameters["weight"], parameters["weight_absmax"]
            nested_absmax = parameters["weight_nested_absmax"]
            nested_offset = parameters["weight_nested_offset"]
        except KeyError:  # replicas, shards and parametrizations keep plain attributes instead
            bias, packed, absmax = self.bias, self.weight, self.weight_absmax
            nested_absmax, nested_offset = self.weight_nested_absmax, self.weight_nested_offset
        if absmax.dtype is not _BYTES:
            self._keep_bytes()  # of the parameters themselves, in place
        return (
            bias,
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            self.codebook.name,
            self.block_size,
            self.out_features,
            self.in_features,
        )

    def _keep_bytes(self) -> None:
        # Scripts of old prepare a model by `param.data = param.data.to(torch.float32)` for every
        # parameter of one dimension, norms in mind. A byte is a number in every float type, so
        # what they have done to the scales is undone without loss.
        for name in ("weight_absmax", "weight_nested_absmax", "weight_nested_offset"):
            part = getattr(self, name)
            if part is not None:
                part.data = part.data.to(torch.uint8)

    def reset_parameters(self) -> None:
        """A frozen weight has no initialisation; libraries call this on every module."""

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"{super().extra_repr()}, codebook={self.codebook.name}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A dense weight under the name of the packed one would otherwise be reported as a wrong
        # shape, which does not tell a user what to do.
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.dtype != torch.uint8:
            raise ValueError(
                f"{prefix}weight is {weight.dtype} and not quantized; load it into the dense model "
                "and call fourbit.quantize_model, or convert the checkpoint with fourbit.convert"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
