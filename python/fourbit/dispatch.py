"""Whether torch's dispatcher has anything to do but to call an operator's CPU kernel.

For one row of ``x`` its way there and back is cold code and cold data, since the weight has driven
all else out of the cache: 5 to 12 µs of the 400 that a layer of 4096 x 4096 takes on two cores.
Where nobody looks on or takes part, `only_cpu` lets `ops` call the kernel itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler

_PLAIN_TYPES = (Tensor, nn.Parameter)  # themselves: subclasses may have a say in what is called


def _missing(*_: Any) -> Any:
    raise RuntimeError("this torch does not tell its dispatch keys")


# Not public, and the only way to ask; where they are gone, every call takes torch's way.
_keys_of_thread: Callable[[], Any] = getattr(torch._C, "_dispatch_tls_local_include_set", _missing)
_keys_of_tensor: Callable[[Tensor], Any] = getattr(torch._C, "_dispatch_keys", _missing)
_is_compiling = torch.compiler.is_compiling
_has_function_mode: Callable[[], bool] = getattr(
    torch._C, "_is_torch_function_mode_enabled", _missing
)


def _plain_keys() -> tuple[frozenset[int], frozenset[int]]:
    """Keys of a thread in which nothing is on, and of CPU tensors of which nothing is special."""
    threads, tensors = set(), set()
    try:
        _has_function_mode(), profiler._is_profiler_enabled, forward_ad._current_level
        for mode in (False, True):
            with torch.inference_mode(mode=mode):
                threads.add(_keys_of_thread().raw_repr())
                tensors.add(_keys_of_tensor(torch.empty(0, device="cpu")).raw_repr())
    except (AttributeError, RuntimeError):
        return frozenset(), frozenset()
    return frozenset(threads), frozenset(tensors)


_plain_threads, _plain_tensors = _plain_keys()


def only_cpu(x: Tensor, packed: Tensor) -> bool:
    """Whether an operator on these would come to its CPU kernel, and to nothing else.

    Not where torch traces, compiles, records a profile or a tangent, or maps over a dimension; not
    for subclasses, fake tensors, views with a sign, and any mode that is told of operators. That
    neither tensor is to have a gradient is for the caller to know.
    """
    # These first: what follows is not for graphs, and may not be there.
    if _is_compiling() or not _plain_threads:
        return False
    return (
        type(x) in _PLAIN_TYPES
        and type(packed) in _PLAIN_TYPES
        and packed.is_cpu
        and _keys_of_tensor(x).raw_repr() in _plain_tensors
        and _keys_of_thread().raw_repr() in _plain_threads
        and not _has_function_mode()
        and not profiler._is_profiler_enabled
        and forward_ad._current_level < 0
    )
