"""Sizes of quantized tensors: the Python twin of the crate's ``layout`` module."""

from __future__ import annotations

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes of the format."""

NESTED_BLOCK_SIZE = 256
"""Scales that share one scale in double quantization."""


def packed_bytes(count: int, code_bits: int) -> int:
    """Bytes of `count` packed codes of `code_bits` bits."""
    codes_per_byte = 8 // code_bits
    return (count + codes_per_byte - 1) // codes_per_byte


def block_count(count: int, block_size: int) -> int:
    """Blocks of `count` elements.

    Raises:
        ValueError: for a block size outside the format.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    return (count + block_size - 1) // block_size
