"""The versions of other libraries that fourbit works with.

pyproject.toml asks pip for the same oldest versions, and ``tests/oldest.sh`` runs tests on them;
the newest are those that all tests were last run on.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Versions that are supported.

    Attributes:
        oldest: nothing older works.
        newest: that was tried; later ones are expected to work, and are not refused.
        why: what the versions before the oldest lack.
    """

    oldest: str
    newest: str
    why: str


SUPPORTED = {
    "torch": Range("2.8", "2.15", "compiling without graph breaks, and fully_shard's options"),
    "transformers": Range("5.6", "5.23", "the table of what checkpoints call tensors of experts"),
    "peft": Range("0.18", "0.21", "adapters beside the transformers that is needed"),
    "trl": Range("1.9", "1.16", "datasets that say which tokens are learned"),
    "accelerate": Range("1.10", "1.15", "support of the transformers that is needed"),
}


FEATURES = {
    "target_parameters on 4-bit experts": (
        "peft",
        Range("0.21", "0.21", "adapters of experts that lie as the weights do"),
    ),
    "methods of PEFT other than LoRA on 4-bit layers": (
        "peft",
        Range("0.21", "0.21", "a table of what reads and writes quantized weights"),
    ),
}
"""What needs a later version of a library than the rest does."""


def installed(name: str) -> str | None:
    """The version of a library, or None if it is not installed. It is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_too_old(name: str, version: str) -> bool:
    """Whether a version of a library is older than those that fourbit works with."""
    return _numbers(version) < _numbers(SUPPORTED[name].oldest)


def is_untried(name: str, version: str) -> bool:
    """Whether a version of a library is newer than the newest that was tried."""
    newest = _numbers(SUPPORTED[name].newest)
    return _numbers(version)[: len(newest)] > newest


def require(name: str) -> None:
    """Refuse a library that is too old.

    Raises:
        ImportError: naming its version and the oldest one that works.
    """
    _require(name, SUPPORTED[name], "fourbit")


def require_feature(feature: str) -> None:
    """Refuse a library that is too old for one of the `FEATURES`.

    Raises:
        ImportError: naming its version and the oldest one that works.
    """
    name, known = FEATURES[feature]
    _require(name, known, feature)


def _require(name: str, known: Range, what: str) -> None:
    version = installed(name)
    if version is not None and _numbers(version) < _numbers(known.oldest):
        raise ImportError(
            f"{name} {version} is too old for {what}: {known.oldest} or later is needed "
            f"({known.why}); run pip install --upgrade {name}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """``"5.6.0.dev0+cpu"`` -> ``(5, 6, 0)``: what a version is ordered by here."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
