"""`AdapterConfig`: what an adapter is made of, and PEFT's ``adapter_config.json`` both ways."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourbit._core import CheckpointError

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one adapter. Names and meanings are PEFT's.

    Attributes:
        r: rank of the adapter's two matrices.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability with which an input of the adapter is zeroed in training.
        target_modules: names of layers (whole, or the last parts of a path), or a regular
            expression that matches whole paths; none where only experts have adapters.
        target_parameters: names of 3-D weights of experts, whole or the last parts of a path.
        use_rslora: scaling ``lora_alpha / sqrt(r)`` (arXiv 2312.03732), not ``lora_alpha / r``.
        use_dora: learn the norm of each row apart from its direction (arXiv 2402.09353).
        modules_to_save: modules that are trained whole, by name.
        rank_pattern: ``{regular expression at the end of a path: r}`` for layers of another rank.
        alpha_pattern: the same for `lora_alpha`.

    Raises:
        ValueError: naming the setting that makes no sense.
    """

    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every setting."""
        for name, rank in (("r", self.r), *self.rank_pattern.items()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"{name} is {rank!r}; a rank is a whole number of at least 1")
        for name, alpha in (("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()):
            number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
            if not number or not 0 < alpha < math.inf:
                raise ValueError(f"{name} is {alpha!r}; it must be a positive number")
        dropout = self.lora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise ValueError(f"lora_dropout is {dropout!r}; it must be a number")
        if not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout is {dropout}; it must be at least 0 and below 1")
        if self.target_parameters:
            _check_pattern("target_parameters", self.target_parameters)
        if self.target_modules or not self.target_parameters:
            _check_pattern("target_modules", self.target_modules)
        if self.use_dora and self.target_parameters:
            raise ValueError(
                "use_dora is for linear layers, and target_parameters names weights of experts, "
                f"{', '.join(self.target_parameters)}; pass target_parameters=() to leave them out"
            )
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                _check_pattern(option, pattern)

    def rank(self, path: str) -> int:
        """The rank of the layer at that path."""
        rank: int = _by_pattern(self.rank_pattern, path, self.r)
        return rank

    def alpha(self, path: str) -> float:
        """The numerator of the scaling of the layer at that path."""
        alpha: float = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return alpha

    def scaling(self, path: str) -> float:
        """What the adapter's output is multiplied by in the layer at that path."""
        return scaling(self.alpha(path), self.rank(path), use_rslora=self.use_rslora)

    def to_peft(
        self, *, base_model_name_or_path: str | None, task_type: str | None
    ) -> dict[str, Any]:
        """The contents of ``adapter_config.json``.

        ``init_lora_weights`` is always true: the start of an adapter that was trained is of no
        interest, and other values make PEFT change the base when it loads the adapter. With
        `target_parameters`, ``lora_dropout`` is always 0: PEFT refuses to load another, though
        only training has dropout.
        """
        targets = self.target_modules
        return {
            "alpha_pattern": dict(self.alpha_pattern),
            "auto_mapping": None,
            "base_model_name_or_path": base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0 if self.target_parameters else self.lora_dropout,
            "modules_to_save": list(self.modules_to_save) or None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "revision": None,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "target_parameters": list(self.target_parameters) or None,
            "task_type": task_type,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }


@dataclass(frozen=True)
class TargetRule:
    """Which of a model's layers an adapter file is for, by PEFT's rules.

    Attributes:
        target_modules: as in `AdapterConfig`.
        exclude_modules: layers to leave out, named in the same two ways.
        modules_to_save: modules that are trained whole; layers inside get no adapter.
        layers_to_transform: numbers of the blocks to which a list of targets is limited.
        layers_pattern: names of the lists that hold the blocks; by default any.
        target_parameters: as in `AdapterConfig`; as in PEFT, `exclude_modules` and
            `layers_to_transform` do not limit them.
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()

    @property
    def limited(self) -> bool:
        """Whether `target_modules` alone says too much."""
        return bool(self.exclude_modules or self.layers_to_transform)

    def matches(self, path: str) -> bool:
        """Whether the layer at that path gets an adapter."""
        if named(self.exclude_modules, path):
            return False
        if any(within(saved, path) for saved in self.modules_to_save):
            return False
        if not named(self.target_modules, path):
            return False
        whole = isinstance(self.target_modules, str) or path in self.target_modules
        if whole or not self.layers_to_transform:
            return True
        return self._block(path) in self.layers_to_transform

    def _block(self, path: str) -> int | None:
        named_lists = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern]
        for pattern in named_lists or [r".*?\.[^.]*"]:
            match = re.match(rf"{pattern}\.(\d+)\.", path)
            if match:
                return int(match.group(1))
        return None


def scaling(lora_alpha: float, r: int, *, use_rslora: bool) -> float:
    """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def named(names: str | Sequence[str], path: str) -> bool:
    """Whether a regular expression matches the whole path, or a list names its last parts."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def within(name: str, path: str) -> bool:
    """Whether the path is a module of that name or lies in one."""
    return f".{name}." in f".{path}."


def fits(pattern: str, path: str) -> bool:
    """Whether a regular expression of `rank_pattern` matches the end of a path."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if fits(pattern, path):
            return value
    return default


def _check_pattern(option: str, names: str | Sequence[str]) -> None:
    if not isinstance(names, str):
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{option} is {names!r}; give names of layers, or one pattern")
        return
    try:
        re.compile(names)
    except re.error as error:
        raise ValueError(f"{option} {names!r} is not a regular expression: {error}") from None


# Fields that change what an adapter computes in ways we do not, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva"),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Fields that we read, or that say nothing about the adapter's arithmetic.
_KNOWN = {
    *_NEUTRAL,
    *("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters"),
    *("use_rslora", "use_dora"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "peft_type", "peft_version", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
}


def read_config(path: Path) -> tuple[AdapterConfig, TargetRule]:
    """An adapter's settings and targets from ``adapter_config.json``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: naming the file and the field that is broken or not supported.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {fields.get('peft_type')!r}; only LORA adapters are supported"
        )
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        # True == 1 in Python: types must agree too.
        if not any(value == known and type(value) is type(known) for known in neutral):
            raise CheckpointError(
                f"{path}: {name} is {value!r}, which is not supported; "
                f"train the adapter with {name} = {neutral[0]!r}"
            )
    unknown = [name for name in fields if name not in _KNOWN and fields[name]]
    if unknown:
        warnings.warn(f"{path}: unknown fields {', '.join(unknown)} are ignored", stacklevel=3)
    try:
        return _parse(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _parse(fields: Mapping[str, Any]) -> tuple[AdapterConfig, TargetRule]:
    targets = fields.get("target_modules") or fields.get("target_parameters")
    if "r" not in fields or not targets:
        missing = "target_modules" if "r" in fields else "r"
        raise ValueError(f"the field {missing} is missing")
    config = AdapterConfig(
        r=fields["r"],
        # PEFT's own defaults, for files that leave a field out.
        lora_alpha=fields.get("lora_alpha", 8),
        lora_dropout=fields.get("lora_dropout", 0.0),
        target_modules=_names(fields, "target_modules"),
        target_parameters=_name_list(fields, "target_parameters"),
        use_rslora=_flag(fields, "use_rslora"),
        use_dora=_flag(fields, "use_dora"),
        modules_to_save=_name_list(fields, "modules_to_save"),
        rank_pattern=_patterns(fields, "rank_pattern"),
        alpha_pattern=_patterns(fields, "alpha_pattern"),
    )
    exclude = _names(fields, "exclude_modules") if fields.get("exclude_modules") else ()
    _check_pattern("exclude_modules", exclude or "")
    layers_pattern = _name_list(fields, "layers_pattern")
    for pattern in layers_pattern:
        _check_pattern("layers_pattern", pattern)
    rule = TargetRule(
        config.target_modules,
        exclude,
        config.modules_to_save,
        _numbers(fields, "layers_to_transform"),
        layers_pattern,
        config.target_parameters,
    )
    return config, rule


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value


def _names(fields: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = fields.get(name)
    return value if isinstance(value, str) else _name_list(fields, name)


def _name_list(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name) or ()
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(item, str) for item in listed):
        raise ValueError(f"{name} is {value!r}; it must be a list of names")
    return tuple(listed)


def _numbers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = fields.get(name)
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
        raise ValueError(f"{name} is {value!r}; it must hold whole numbers")
    return tuple(listed)


def _patterns(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}; it must map names to numbers")
    return value
