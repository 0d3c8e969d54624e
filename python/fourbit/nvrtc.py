"""NVRTC, which compiles the CUDA kernels when they are first used: where it is.

It comes with torch's CUDA builds, in packages of NVIDIA's, and is found there whether or not torch
has been imported. The one of torch's own CUDA version is taken and no other: a driver that runs
torch loads what it compiles, which may not be so for a newer one that lies about.
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

_PATTERNS = ("lib/libnvrtc.so.*", "bin/**/nvrtc64_*.dll")
# Other files that begin alike: debug builds, and what NVRTC itself loads.
_OTHERS = re.compile(r"builtins|\.alt\.|static")


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


def candidates() -> list[str]:
    """Where NVRTC may be, the best first: paths, and names that the system looks up."""
    named = os.environ.get(VARIABLE)
    if named:
        return [named]
    cuda = torch_cuda()
    major = None if cuda is None else int(cuda.partition(".")[0])
    found = [
        path
        for path in (*_of_packages(), *_of_prefix())
        if major is None or _major(path) in (major, None)
    ]
    majors = [12, 13] if major is None else [major]
    if sys.platform == "win32":
        names = [f"nvrtc64_{m}0_0.dll" if m > 11 else "nvrtc64_112_0.dll" for m in majors]
    else:
        names = [f"libnvrtc.so.{m}" for m in majors]
    return [*map(str, found), *names]


def load() -> tuple[Path, tuple[int, int]]:
    """Open NVRTC, unless this process has already; its file and its version.

    Raises:
        CudaError: where it is not found, saying where it was looked for.
    """
    return _core.load_nvrtc(candidates())


def _of_packages() -> list[Path]:
    """In NVIDIA's packages (``nvidia/cu13``, ``nvidia/cuda_nvrtc``), and in torch's own folder."""
    nvidia = find_spec("nvidia")
    roots = (nvidia.submodule_search_locations or []) if nvidia else []
    folders = [folder for root in roots for folder in sorted(Path(root).glob("*/"))]
    torch = find_spec("torch")
    if torch is not None and torch.origin is not None:
        folders.append(Path(torch.origin).parent)
    return _in(folders)


def _of_prefix() -> list[Path]:
    """Where conda keeps it."""
    prefix = Path(sys.prefix)
    return _in([prefix, prefix / "Library"])


def _in(folders: list[Path]) -> list[Path]:
    return [
        path
        for folder in folders
        for pattern in _PATTERNS
        # The newest first, where one folder holds several.
        for path in sorted(folder.glob(pattern), reverse=True)
        if not _OTHERS.search(path.name)
    ]


def _major(path: Path) -> int | None:
    """Of libnvrtc.so.13, libnvrtc.so.12.8.93 or nvrtc64_130_0.dll; None where it does not say."""
    match = re.search(r"\.so\.(\d+)|nvrtc64_(\d\d)", path.name)
    return int(match[1] or match[2]) if match else None
