"""What the operators of every device ask of their tensors, and the forms in which these travel."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def float_bytes(constants: Tensor) -> Tensor:
    """float32 [n] as its bytes, uint8 [4 n], without a copy."""
    return constants.contiguous().view(torch.uint8)


def float_values(stored: Tensor) -> Tensor:
    """The inverse of `float_bytes`; copies only where the bytes are not aligned."""
    if stored.data_ptr() % 4 or stored.storage_offset() % 4 or not stored.is_contiguous():
        stored = stored.clone(memory_format=torch.contiguous_format)
    return stored.view(-1).view(torch.float32)


def check_float(tensor: Tensor, what: str) -> None:
    """That a tensor is of a dtype that can be quantized and multiplied."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} is {tensor.dtype}; use float32, float16 or bfloat16")


def check_operand(operand: Tensor, features: int, name: str) -> None:
    """That the last dimension of an operand is the layer's."""
    check_float(operand, name)
    if operand.ndim == 0:
        raise ValueError(f"{name} is a single number, and the layer has {features} features")
    if operand.shape[-1] != features:
        raise ValueError(
            f"{name} has {operand.shape[-1]} features in its last dimension, "
            f"and the layer has {features}"
        )


def check_device(operand: Tensor, packed: Tensor) -> None:
    """That an operand is where the layer is."""
    # A layer that was never filled would otherwise give outputs without data.
    if operand.device != packed.device:
        raise RuntimeError(
            f"the input is on {operand.device} and the layer on {packed.device}; "
            "load the layer's weight, or move one of them"
        )


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` of a decoded weight, in memory of its own.

    torch's own product is a view of another tensor for inputs that are not 2-D, and torch up to
    2.12 lets nobody add to such an output of an operator in place.
    """
    if torch.is_grad_enabled() and x.requires_grad:  # torch records no graph of products into `out`
        return torch.nn.functional.linear(x, weight, bias)
    output = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, out = x.reshape(-1, weight.shape[1]), output.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias.detach(), rows, weight.T, out=out)
    return output
