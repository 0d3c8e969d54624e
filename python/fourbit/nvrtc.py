"""NVRTC, which compiles the CUDA kernels when they are first used: where it is.

It comes with torch's CUDA builds, in packages of NVIDIA's. NVIDIA's own ``cuda-pathfinder`` finds
it there, in conda environments and in toolkits, whether or not torch has been imported.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from fourbit import _core

VARIABLE = "FOURBIT_NVRTC"
"""The variable that names the library's file, for environments where it is not found."""


_ADVICE = (
    f"install a CUDA build of torch, which brings it, or set {VARIABLE} to the path of libnvrtc; "
    "`fourbit doctor` says more"
)


def torch_cuda() -> str | None:
    """The CUDA version that torch was built with, such as "13.2"; None for a build without.

    Does not import torch, which takes seconds.
    """
    if "torch" in sys.modules:
        return getattr(sys.modules["torch"].version, "cuda", None)
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        version = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    except OSError:
        return None
    return version if isinstance(version, str) else None


def load() -> tuple[Path, tuple[int, int]]:
    """Open NVRTC, unless this process has already; its file and its version.

    Raises:
        CudaError: where it is not found, or is of a newer CUDA than torch, saying what to do.
    """
    named = os.environ.get(VARIABLE)
    return _core.load_nvrtc(named or _found())


def _found() -> str:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    path: str | None
    try:
        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except (RuntimeError, OSError) as error:
        # Its text lists every place, on many lines.
        path, reason = None, str(error).partition("\n")[0]
    else:
        reason = "its file is not known"
    if path is None:
        raise _core.CudaError(
            f"NVRTC, which compiles the CUDA kernels, was not found ({reason}); {_ADVICE}"
        )
    built_for = torch_cuda()
    # A driver that runs torch may not load what a newer CUDA's compiler makes.
    if built_for is not None and _major(path) > int(built_for.partition(".")[0]):
        raise _core.CudaError(
            f"the NVRTC found, {path}, is newer than CUDA {built_for}, which torch was built for; "
            f"{_ADVICE}"
        )
    return path


def _major(path: str) -> int:
    """Of libnvrtc.so.13, libnvrtc.so.12.8.93 or nvrtc64_130_0.dll; 0 where it does not say."""
    match = re.search(r"\.so\.(\d+)|nvrtc64_(\d\d)", Path(path).name)
    return int(match[1] or match[2]) if match else 0
