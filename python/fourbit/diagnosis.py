"""`doctor`: what fourbit finds on this machine, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fourbit import _core, nvrtc
from fourbit._core import CudaError
from fourbit.integrations.versions import SUPPORTED, installed, is_too_old, is_untried

Status: TypeAlias = Literal["ok", "missing", "broken", "unknown"]

_PACKAGES = ("transformers", "peft", "trl", "accelerate", "bitsandbytes", "typer", "rich")
# What NVRTC is tried with where there is no card: the oldest with bfloat16.
_TRIED_CAPABILITY = 80


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        subject: what.
        status: "ok", "missing", "broken", or "unknown" where it could not be looked for.
        found: what there is, or why there is nothing.
        advice: what to do; None where there is nothing to be done.
    """

    subject: str
    status: Status
    found: str
    advice: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
        findings: one for each thing that was looked for.
        cuda_works: whether everything is there that the CUDA kernels need.
    """

    findings: tuple[Finding, ...]
    cuda_works: bool

    def as_dict(self) -> dict[str, Any]:
        """For programs: ``{"cuda_works": ..., "findings": [{"subject": ..., ...}, ...]}``."""
        findings = [asdict(finding) for finding in self.findings]
        return {"cuda_works": self.cuda_works, "findings": findings}


def doctor() -> Diagnosis:
    """Look for everything that fourbit may use on this machine: nothing is changed, none raises.

    With NVRTC there, one kernel is compiled to see that it works, which takes about a second.

    Returns:
        The findings, and whether CUDA tensors can be used.
    """
    versions = [_fourbit(), _torch()]
    driver = list(_driver())
    paging = [_paging(number) for number in _usable_cards()]
    compiler = [_nvrtc(), *_cache()]
    optional = [_package(name) for name in _PACKAGES]
    needed = [versions[1], *driver, compiler[0]]
    return Diagnosis(
        findings=(*versions, *driver, *paging, *compiler, *optional),
        cuda_works=all(finding.status == "ok" for finding in needed),
    )


def _fourbit() -> Finding:
    simd = _core.simd_backends()[-1]
    return Finding(
        "fourbit",
        "ok",
        f"{_core.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"SIMD: {simd}",
    )


def _torch() -> Finding:
    version = installed("torch")
    if version is None:
        return Finding("torch", "missing", "not installed", "pip install torch")
    if is_too_old("torch", version):
        return _too_old("torch", version)
    cuda = nvrtc.torch_cuda()
    if cuda is None:
        return Finding(
            "torch",
            "missing",
            f"{version}, built without CUDA",
            "for a GPU, install a CUDA build of torch; without one, nothing is needed",
        )
    return Finding("torch", "ok", f"{version}, built for CUDA {cuda}")


def _too_old(name: str, version: str) -> Finding:
    advice = f"{Path(sys.executable).name} -m pip install --upgrade {name}"
    return Finding(name, "broken", f"{version}; {SUPPORTED[name].oldest} is needed", advice)


def _driver() -> Iterator[Finding]:
    """The driver and the cards."""
    install = "with an NVIDIA GPU, install NVIDIA's driver; without one, nothing is needed"
    try:
        major, minor = _core.cuda_driver_version()
        cards = _core.cuda_devices()
    except CudaError as error:
        yield Finding("CUDA driver", "missing", str(error), install)
        yield Finding("GPU", "unknown", "without a driver, none can be seen")
        return
    built_for = nvrtc.torch_cuda()
    needed = 0 if built_for is None else int(built_for.partition(".")[0])
    if major < needed:
        yield Finding(
            "CUDA driver",
            "broken",
            f"for CUDA {major}.{minor}, and torch was built for CUDA {built_for}",
            f"install a driver for CUDA {needed} or later, or a torch built for CUDA {major}",
        )
    else:
        yield Finding("CUDA driver", "ok", f"for CUDA up to {major}.{minor}")
    if not cards:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        advice = None if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it"
        yield Finding("GPU", "missing", "the driver sees none", advice)
    for number, (name, memory, capability, processors) in enumerate(cards):
        what = (
            f"{name}, {memory / 2**30:.0f} GiB, compute capability {capability // 10}."
            f"{capability % 10}, {processors} multiprocessors"
        )
        if capability < _core.OLDEST_CAPABILITY:
            oldest = _core.OLDEST_CAPABILITY
            advice = f"the kernels need {oldest // 10}.{oldest % 10} or later; use another GPU"
            yield Finding(f"GPU {number}", "broken", what, advice)
        else:
            yield Finding(f"GPU {number}", "ok", what)


def _usable_cards() -> list[int]:
    """The numbers of the cards that the kernels run on."""
    try:
        cards = _core.cuda_devices()
    except CudaError:
        return []
    return [number for number, card in enumerate(cards) if card[2] >= _core.OLDEST_CAPABILITY]


def _paging(number: int) -> Finding:
    """Which pager state gets on a card; the other kernels work whatever the answer is."""
    subject = f"GPU {number} paging"
    try:
        shares = _core.card_can_page(number)
    except CudaError as error:
        return Finding(
            subject,
            "unknown",
            str(error),
            'until the driver answers, use PagedAdamW(..., pager="resident")',
        )
    if shares:
        found = 'it shares memory with the processor; pager "auto" takes "unified"'
    else:
        found = (
            'it shares no memory with the processor, as with Windows and WSL; pager "auto" takes '
            '"pinned"'
        )
    return Finding(subject, "ok", found)


def _nvrtc() -> Finding:
    try:
        path, (major, minor) = nvrtc.load()
    except CudaError as error:
        return Finding(
            "NVRTC",
            "missing",
            str(error),
            "for a GPU, install a CUDA build of torch, which brings it; without one, nothing is "
            "needed",
        )
    where = f"{major}.{minor}, {path}"
    try:
        capability = _core.cuda_devices()[0][2]
    except (CudaError, IndexError):
        capability = _TRIED_CAPABILITY
    name, dtypes, *_ = _core.kernel_register()[0]
    try:
        _core.compile_kernel(name, capability=capability, dtype=dtypes[0][0])
    except CudaError as error:
        return Finding(
            "NVRTC", "broken", f"{where}: {error}", "install torch and its packages again"
        )
    version = f"{capability // 10}.{capability % 10}"
    return Finding("NVRTC", "ok", f"{where}; compiles for compute capability {version}")


def _cache() -> Iterator[Finding]:
    variable = "set FOURBIT_CACHE_DIR to a folder that can be written"
    subject = "kernel cache"
    try:
        cache = _core.kernel_cache()
    except OSError as error:
        yield Finding(subject, "broken", str(error), variable)
        return
    if cache is None:
        yield Finding(subject, "missing", "there is no folder for it", variable)
        return
    folder, entries, size = cache
    what = f"{folder}: {entries} kernels, {size / 2**20:.1f} MiB"
    if _writable(folder):
        yield Finding(subject, "ok", what)
    else:
        yield Finding(
            subject, "broken", f"{what}; it cannot be written, so kernels are not kept", variable
        )


def _writable(folder: Path) -> bool:
    """Whether a file can be made there; a folder that is not there yet can be made first."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _package(name: str) -> Finding:
    version = installed(name)
    if version is not None and name not in SUPPORTED:
        return Finding(name, "ok", version)
    if version is not None:
        if is_too_old(name, version):
            return _too_old(name, version)
        known = SUPPORTED[name]
        tried = f"newer than {known.newest}, the newest that was tried; "
        note = tried if is_untried(name, version) else ""
        return Finding(name, "ok", f"{version} ({note}supported from {known.oldest})")
    extra = {"typer": "cli", "rich": "cli", "bitsandbytes": "bench"}.get(name, "hf")
    advice = f'where it is wanted: {Path(sys.executable).name} -m pip install "fourbit[{extra}]"'
    return Finding(name, "missing", "not installed; it is optional", advice)
