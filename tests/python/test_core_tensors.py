"""What the core takes as a tensor, and what it says of anything else."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fourbit import _core

NF4 = _core.Codebook.by_name("nf4")


def dequantize(packed=None, absmax=None, output=None) -> None:
    """With one argument that may be wrong."""
    _core.dequantize(
        torch.zeros(32, dtype=torch.uint8) if packed is None else packed,
        torch.ones(1) if absmax is None else absmax,
        NF4,
        64,
        torch.empty(64) if output is None else output,
        threads=1,
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"absmax": torch.ones(1, device="meta")}, ValueError, "on device meta, .* on the CPU"),
        ({"output": torch.empty(64, 2)[:, 0]}, ValueError, "not contiguous; call .contiguous"),
        ({"packed": torch.zeros(32)}, TypeError, "dtype float32 where uint8 is needed"),
        ({"packed": torch.zeros(32, dtype=torch.int8)}, TypeError, "dtype int8 where uint8"),
        ({"absmax": torch.ones(1, dtype=torch.bfloat16)}, TypeError, "bfloat16 where float32"),
        (
            {"output": torch.empty(64, dtype=torch.float64)},
            TypeError,
            "dtype float64 where float32, float16 or bfloat16 is needed",
        ),
        (
            {"output": torch.empty(64, dtype=torch.uint8)},
            TypeError,
            "dtype uint8 where float32, float16 or bfloat16 is needed",
        ),
        ({"packed": b"0" * 32}, AttributeError, "'bytes' object has no attribute"),
    ],
)
def test_what_is_no_such_tensor_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        dequantize(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_is_known(dtype):
    output = torch.full((64,), 3.0, dtype=dtype)
    dequantize(output=output)
    assert torch.equal(output, torch.full((64,), -1.0, dtype=dtype))


def test_views_parameters_and_empty_tensors_are_tensors():
    # One element is contiguous whatever its step, and bytes are aligned wherever they begin.
    dequantize(packed=torch.zeros(256, dtype=torch.uint8)[1:33], absmax=torch.ones(2)[::2])
    output = torch.nn.Parameter(torch.full((64,), 3.0))
    dequantize(output=output)
    assert torch.equal(output.detach(), torch.full((64,), -1.0))
    dequantize(
        packed=torch.empty(0, dtype=torch.uint8), absmax=torch.empty(0), output=torch.empty(0)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    packed, scales = torch.zeros(1 << 20, dtype=torch.uint8), torch.ones(1 << 15)
    output = torch.zeros(1 << 21)

    def decode():
        _core.dequantize(packed, scales, NF4, 64, output, threads=4)
        return bool((output[:: 1 << 15] == -1).all())

    assert decode()
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a child that waits
        os._exit(0 if decode() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_share_the_work_between_products_of_torch():
    packed, scales = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8), torch.rand(1 << 15)
    expected = torch.zeros(1 << 21)
    _core.dequantize(packed, scales, NF4, 64, expected, threads=1, backend="scalar")
    matrix = torch.randn(256, 256)

    def decode(threads):
        matrix @ matrix
        output = torch.zeros(1 << 21)
        _core.dequantize(packed, scales, NF4, 64, output, threads=threads)
        return output

    # As autograd's thread does, and several of a program's.
    with ThreadPoolExecutor(3) as pool:
        for output in pool.map(decode, [1, 2, 3, 8, 100, 2]):
            assert torch.equal(output, expected)
