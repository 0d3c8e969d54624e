"""A stand-in for a card: what `fourbit.cuda_ops` launches is run by the emulator.

Tensors are on the CPU, and in place of a loaded program stands one that runs the kernel of the same
file, for the same specialisation, with the launch geometry of the register.
"""

import pytest

import emulate
from fourbit import _core, cuda_ops
from fourbit.codebook import by_name

CAPABILITY, PROCESSORS = 80, 3


class EmulatedProgram:
    """As ``_core.CudaProgram``."""

    processors = PROCESSORS

    def __init__(self, kernel, device, dtype, block_size, codebook, double_quant):
        assert device == 0
        book = by_name(codebook)
        self.file = kernel
        self.options = {
            "dtype": str(dtype).removeprefix("torch."),
            "block_size": block_size,
            "codebook": book.core,
            "double_quant": double_quant,
        }
        specialisation = emulate.Specialisation(dtype, block_size, book, double_quant)
        (self.kernels,) = emulate.load(kernel, [specialisation])

    def launch(self, kernel, stream, arguments):
        geometry = _core.kernel_geometry(
            self.file,
            kernel,
            arguments,
            capability=CAPABILITY,
            processors=PROCESSORS,
            **self.options,
        )
        if geometry is not None:
            grid, block, dynamic_bytes = geometry
            self.kernels.launch(
                kernel, *arguments, grid=tuple(grid), block=block, dynamic_bytes=dynamic_bytes
            )


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in place."""
    monkeypatch.setattr(cuda_ops, "_program", EmulatedProgram)
    monkeypatch.setattr(cuda_ops, "stream_of", lambda device: 0)
    monkeypatch.setattr(cuda_ops, "_ordinal", lambda device: 0)
    monkeypatch.setattr(cuda_ops, "_slots", {})
    monkeypatch.setattr(cuda_ops, "_capability", lambda device: CAPABILITY)
    monkeypatch.setattr(cuda_ops, "_is_capturing", lambda device: False)
