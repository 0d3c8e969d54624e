"""`NF4Config`: how transformers quantizes a model with fourbit, or did."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

from fourbit import _core
from fourbit._core import CheckpointError
from fourbit.codebook import Codebook, as_codebook, by_name

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ModuleNotFoundError as error:
    raise ImportError(
        f'NF4Config needs {error.name}; install it with pip install "fourbit[hf]"'
    ) from None

METHOD = "fourbit"
"""Our name among transformers' methods of quantization."""
_VERSION = "fourbit_format_version"
# Of BitsAndBytesConfig: options of its 8-bit method, and the values that ask for nothing.
_EIGHT_BIT_OPTIONS = {
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
}
_said: set[str] = set()


class NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How ``from_pretrained`` of transformers quantizes a model: its ``quantization_config=``.

    The defaults are those of ``fourbit.convert`` and `fourbit.quantize_model`, and the same weights
    become the same bytes; GPT-2's `Conv1D` layers, which ``fourbit.convert`` leaves, become 4-bit
    layers too. Output heads, routers of experts, tied weights, layers smaller than a
    block, and what the model's class wants in float32 are not quantized. A layer computes in the
    dtype of its input, so that there is no dtype to choose here: ``dtype=`` of ``from_pretrained``
    decides.

    ``save_pretrained`` writes NF4 and FP4 in bitsandbytes' layout, which transformers also loads
    where fourbit is not imported, with bitsandbytes then; other codebooks, and models whose experts
    are quantized (``skip=["*experts*"]`` leaves them), are read by fourbit only.

    Args:
        codebook: "nf4", "fp4", "int4", an ``{index: value}`` map or a `fourbit.Codebook`.
        block_size: elements of a weight that share a scale: 32, 64, ... 4096.
        double_quant: whether the scales are quantized too.
        skip: glob patterns over paths of layers that stay as they are, as
            ``fourbit convert --skip`` takes them.
        only: glob patterns over paths of layers; all others stay as they are.

    Raises:
        ValueError: for an unknown codebook or block size.
        TypeError: for options of another type.
    """

    def __init__(
        self,
        *,
        codebook: str | Mapping[int, float] | Codebook = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        skip: Sequence[str] = (),
        only: Sequence[str] = (),
    ) -> None:
        book = as_codebook(codebook)
        for name, value, kind in (
            ("block_size", block_size, int),
            ("double_quant", double_quant, bool),
        ):
            if type(value) is not kind:
                raise TypeError(f"{name} is {value!r}, which is no {kind.__name__}")
        if block_size < 0:
            raise ValueError(f"block_size is {block_size}")
        _layout(book, block_size=block_size, double_quant=double_quant)
        self.quant_method = METHOD
        self.codebook = book.name
        self.block_size = block_size
        self.double_quant = double_quant
        self.skip = _patterns("skip", skip)
        self.only = _patterns("only", only)
        # Of a model that is quantized: the linear layers that are not, the dtype before, whether
        # experts are. In a request: names as BitsAndBytesConfig has them, of layers to leave.
        self.skip_modules: list[str] | None = None
        self.compute_dtype: str | None = None
        self._book: Codebook | None = book
        self.experts = False

    @property
    def book(self) -> Codebook:
        """The codebook.

        Raises:
            ValueError: for a config of a file whose codebook was not read yet.
        """
        return self._book or by_name(self.codebook)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config that a ``quantization_config`` of a ``config.json`` says.

        Keys that are not known are of a later version that older ones can read, and passed over.

        Args:
            config_dict: of quantization method "fourbit", or of bitsandbytes in 4 bits.
            return_unused_kwargs: whether to give back `kwargs` too.
            kwargs: none has a meaning.

        Raises:
            CheckpointError: for a later version of the format that we cannot read.
            ValueError: for another method, or bad values.
        """
        version = config_dict.get(_VERSION, _core.FORMAT_VERSION)
        if not isinstance(version, int) or not 1 <= version <= _core.FORMAT_VERSION:
            raise CheckpointError(
                f"the quantization_config is of format version {version}, and this version of "
                f"fourbit reads up to {_core.FORMAT_VERSION}; install a newer fourbit"
            )
        method = config_dict.get("quant_method")
        if config_dict.get("load_in_4bit") or config_dict.get("load_in_8bit"):
            config = cls.from_bitsandbytes(config_dict)
        elif method != METHOD:
            raise ValueError(f"quantization method {method!r} is not one that fourbit reads")
        else:
            config = cls._from_own(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def _from_own(cls, fields: Mapping[str, Any]) -> NF4Config:
        known = {
            name: fields[name]
            for name in ("block_size", "double_quant", "skip", "only")
            if name in fields
        }
        config = cls(**known)
        name = fields.get("codebook", config.codebook)
        if isinstance(name, str):
            # The map of a user's codebook stands in the files of weights, which are read later.
            config.codebook, config._book = name, None
        else:
            config._book = as_codebook(name)
            config.codebook = config._book.name
        config._set_facts(fields.get("skip_modules"), fields.get("compute_dtype"))
        return config

    @classmethod
    def from_bitsandbytes(cls, source: Any) -> NF4Config:
        """What a ``BitsAndBytesConfig``, or its dict, asks for in 4 bits.

        Its blocks have 64 elements. Its compute dtype and storage dtype are not needed: a layer
        computes in the dtype of its input, and bytes are stored as bytes. Options of the 8-bit
        method are named in a warning, once each.

        Raises:
            ValueError: if it asks for 8 bits, for none, or for an unknown type.
        """

        def option(name: str, default: Any = None) -> Any:
            if isinstance(source, Mapping):
                return source.get(name, default)
            return getattr(source, name, default)

        if option("load_in_8bit"):
            raise ValueError(
                "the config asks for 8 bits (load_in_8bit), and fourbit has 4; use load_in_4bit"
            )
        if not option("load_in_4bit"):
            raise ValueError("the config does not ask for 4 bits; set load_in_4bit=True")
        kind = option("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise ValueError(f'bnb_4bit_quant_type is {kind!r}; use "nf4" or "fp4"')
        for name, default in _EIGHT_BIT_OPTIONS.items():
            if option(name, default) != default and name not in _said:
                _said.add(name)
                warnings.warn(
                    f"{name} is an option of 8-bit quantization and changes nothing in 4 bits",
                    stacklevel=3,
                )
        config = cls(codebook=kind, double_quant=bool(option("bnb_4bit_use_double_quant", False)))
        config._set_facts(option("llm_int8_skip_modules"), None)
        return config

    def _set_facts(self, skip_modules: Sequence[str] | None, dtype: str | None) -> None:
        names = None if skip_modules is None else _patterns("skip_modules", skip_modules)
        self.skip_modules, self.compute_dtype = names, dtype

    def of_model(
        self,
        book: Codebook,
        *,
        block_size: int,
        double_quant: bool,
        skip_modules: Sequence[str],
        dtype: str,
        experts: bool,
    ) -> NF4Config:
        """The config of a model that is quantized: how, and which linear layers are not."""
        config = copy(self)
        config.codebook, config._book = book.name, book
        config.block_size, config.double_quant = block_size, double_quant
        config.skip, config.only = [], []
        config._set_facts(list(skip_modules), dtype)
        config.experts = experts
        return config

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``: of a quantized model, what ``fourbit.convert`` writes.

        That is a config of bitsandbytes for NF4 and FP4, and one of method "fourbit" for all other
        codebooks and for models whose experts are quantized. Before a model is loaded with it, it
        is always the latter.
        """
        if self.compute_dtype is not None:
            return _layout(
                self.book,
                block_size=self.block_size,
                double_quant=self.double_quant,
                dtype=self.compute_dtype,
                skipped=self.skip_modules or [],
                experts=self.experts,
            )
        fields: dict[str, Any] = {
            "quant_method": METHOD,
            "codebook": self.codebook,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "skip": list(self.skip),
            "only": list(self.only),
            _VERSION: _core.FORMAT_VERSION,
        }
        if self.skip_modules is not None:
            fields["skip_modules"] = list(self.skip_modules)
        return fields

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """``dict(config)`` is `to_dict`."""
        return iter(self.to_dict().items())

    def __eq__(self, other: object) -> bool:
        """Configs are equal if they say the same."""
        if not isinstance(other, NF4Config):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can be changed


def wrote(fields: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is one that we wrote, for whichever reader."""
    return _VERSION in fields or fields.get("quant_method") == METHOD


def _layout(
    book: Codebook,
    *,
    block_size: int,
    double_quant: bool,
    dtype: str = "bfloat16",
    skipped: Sequence[str] = (),
    experts: bool = False,
) -> dict[str, Any]:
    """What the converter writes; it raises ``ValueError`` for a block size that there is not."""
    text = _core.add_quantization_config(
        "{}",
        codebook=book.core,
        block_size=block_size,
        double_quant=double_quant,
        dtype=dtype,
        skipped=list(skipped),
        experts=experts,
    )
    fields: dict[str, Any] = json.loads(text)["quantization_config"]
    return fields


def _patterns(option: str, patterns: Any) -> list[str]:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(f"{option} is {patterns!r}; give a list of strings")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{option} has {pattern!r}; give a list of strings")
    return list(patterns)
