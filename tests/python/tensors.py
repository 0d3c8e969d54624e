"""Random and adversarial tensors that several tests quantize."""

import torch

from fourbit import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = (
    (1,),
    (2,),
    (31,),
    (33,),
    (63, 1),
    (65,),
    (64, 64),
    (7, 129),
    (3, 5, 77),
    (2, 64, 96),
    (4097,),
    (128, 8193 // 64),
    (1152, 43),
)
KINDS = ("normal", "heavy", "zeros", "midpoints", "tiny", "huge", "constant", "sparse")


def make(kind: str, shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A finite tensor of a kind that gives quantizers trouble."""
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return (normal * 0.02).to(dtype)
    if kind == "heavy":  # outliers, as trained weights have
        return (normal * torch.randn(shape, generator=generator).exp()).to(dtype)
    if kind == "zeros":  # of both signs
        return (normal * 0).to(dtype)
    if kind == "midpoints":  # decision boundaries of NF4 and their neighbours, one scale of 1
        values = torch.tensor(reference.NF4)
        middle = (values[1:] + values[:-1]) / 2
        toward = torch.tensor([float("-inf"), float("inf")])
        around = torch.cat([middle, *(torch.nextafter(middle, t) for t in toward), values])
        picks = torch.randint(len(around), (normal.numel(),), generator=generator)
        flat = around[picks]
        flat[::32] = 1.0
        return flat.reshape(shape).to(dtype)
    if kind == "tiny":  # far below 1, but with scales whose reciprocal is finite
        return (normal.abs().clamp(min=0.1) * (1e-4 if dtype == torch.float16 else 1e-37)).to(dtype)
    if kind == "huge":
        limit = torch.finfo(dtype).max
        return (normal.clamp(-3, 3) / 3 * limit).to(dtype).clamp(-limit, limit)
    if kind == "constant":
        return torch.full(shape, -0.3).to(dtype)
    if kind == "sparse":
        return (normal * (torch.rand(shape, generator=generator) < 0.02)).to(dtype)
    raise ValueError(kind)


def product_bound(operand: torch.Tensor, matrix: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """How far a product on a GPU may be from ``operand @ matrix + added``, in float64.

    The weight, or its value before scaling, is rounded to the operand's dtype, sums are in float32
    (a vendor's GEMM may round parts of a sum to the dtype instead), and the result is rounded once,
    and once more where the bias is added afterwards.
    """
    unit = torch.finfo(operand.dtype).eps / 2
    operand, matrix, added = operand.double(), matrix.double(), added.double()
    size = operand.abs() @ matrix.abs() + added.abs()
    exact = operand @ matrix + added
    return (unit + matrix.shape[0] * 2**-24) * size + 2 * unit * exact.abs()
