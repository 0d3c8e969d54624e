"""Codebooks: the maps from codes to values in [-1, 1] that a tensor is quantized with."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from numbers import Integral
from typing import Literal, TypeAlias

from fourbit import _core

Ties: TypeAlias = Literal["lower", "upper"]

BUILT_IN = ("nf4", "fp4", "int4")


class Codebook:
    """A map from codes to values in [-1, 1], and the rule that finds the code of a number.

    A number, normalised by its block's scale, takes the code of the nearest value. Where it lies
    exactly between two, it takes the lower one, or the upper one with ``ties="upper"``.

    Args:
        entries: ``{index: value}``; 2 to 256 entries, indices from 0 to 255, values in [-1, 1].
            Codes are stored in 2, 4 or 8 bits, the fewest that hold the largest index.
        ties: which of two equally near values a number takes.
        name: the name under which files record it; by default derived from the entries.

    Raises:
        ValueError: for a map that breaks these rules.
    """

    def __init__(
        self, entries: Mapping[int, float], *, ties: Ties = "lower", name: str | None = None
    ) -> None:
        if ties not in ("lower", "upper"):
            raise ValueError(f'ties is {ties!r}; use "lower" or "upper"')
        if name in BUILT_IN:
            raise ValueError(f"name {name!r} is that of a built-in codebook; choose another")
        if not all(isinstance(index, Integral) for index in entries):
            raise ValueError("a codebook's indices must be whole numbers")
        pairs = sorted((int(index), float(value)) for index, value in entries.items())
        if name is None:
            packed = b"".join(struct.pack("<qf", index, value) for index, value in pairs)
            name = f"map-{hashlib.sha256(packed + ties.encode()).hexdigest()[:12]}"
        core = _core.Codebook.from_entries(name, pairs, ties_upper=ties == "upper")
        self._set(core)

    def _set(self, core: _core.Codebook) -> None:
        self._core = core
        self._name = core.name
        self._values = tuple(core.values)
        known = _registry.setdefault(core.name, self)
        if known != self:
            raise ValueError(f"another codebook named {core.name!r} exists; choose another name")

    @classmethod
    def from_core(cls, core: _core.Codebook) -> Codebook:
        """The Python twin of a codebook that the core read from a file.

        Raises:
            ValueError: if another codebook of that name exists in this process.
        """
        codebook = cls.__new__(cls)
        codebook._set(core)
        return codebook

    @property
    def name(self) -> str:
        """``nf4``, ``fp4``, ``int4``, or the name of a user's map."""
        return self._name

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each code, as float32 numbers; NaN for a code the map does not define."""
        return self._values

    @property
    def ties(self) -> Ties:
        """Which of two equally near values a number takes."""
        return "upper" if self._core.ties_upper else "lower"

    @property
    def code_bits(self) -> int:
        """Bits of one stored code: 2, 4 or 8."""
        return self._core.code_bits

    @property
    def core(self) -> _core.Codebook:
        """The Rust twin, for calls into the core."""
        return self._core

    def __eq__(self, other: object) -> bool:
        """Codebooks are equal if they encode and decode alike."""
        if not isinstance(other, Codebook):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        # NaN is not equal to itself; undefined codes are.
        return (self.name, self.ties, *(None if math.isnan(v) else v for v in self._values))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled by content, so that it is known again in another process."""
        if self.name in BUILT_IN:
            return (by_name, (self.name,))
        entries = {i: v for i, v in enumerate(self._values) if not math.isnan(v)}
        return (_restore, (entries, self.ties, self.name))

    def __repr__(self) -> str:
        """Name, width and rule."""
        return f"Codebook({self.name!r}, {len(self.values)} codes, ties={self.ties!r})"


def _restore(entries: dict[int, float], ties: Ties, name: str) -> Codebook:
    return Codebook(entries, ties=ties, name=name)


_registry: dict[str, Codebook] = {}
for _name in BUILT_IN:
    Codebook.from_core(_core.Codebook.by_name(_name))


def by_name(name: str) -> Codebook:
    """The codebook of that name: a built-in one, or a user's map made in this process.

    Operators take codebooks by name, since ``torch.library`` schemas have no type for them.

    Raises:
        ValueError: if there is none.
    """
    try:
        return _registry[name]
    except KeyError:
        known = ", ".join(BUILT_IN)
        raise ValueError(f"unknown codebook {name!r}; use one of {known}, or a Codebook") from None


def as_codebook(codebook: str | Mapping[int, float] | Codebook) -> Codebook:
    """The codebook that a name, an ``{index: value}`` map or a codebook stands for.

    Raises:
        ValueError: for an unknown name or a bad map.
        TypeError: for anything else.
    """
    if isinstance(codebook, Codebook):
        return codebook
    if isinstance(codebook, str):
        return by_name(codebook)
    if isinstance(codebook, Mapping):
        return Codebook(codebook)
    raise TypeError(
        f"a codebook is a name, an {{index: value}} map or a Codebook, not a "
        f"{type(codebook).__name__}"
    )
