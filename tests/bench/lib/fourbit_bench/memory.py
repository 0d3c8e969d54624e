"""What a process took of memory."""

from __future__ import annotations

import ctypes
from pathlib import Path


def peak_memory() -> int:
    """The most memory this process ever had, in bytes.

    Not ``ru_maxrss``: a child process begins with its parent's.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:", 1)[1].split()[0])


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew, from what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def give_back_memory() -> None:
    """Return what the C library keeps of freed memory, as that of a model in 16 bits that was
    quantized; it would otherwise be there at every peak, or not, as chance has it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
