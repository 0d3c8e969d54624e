"""`add_lora`: put adapters on a model's layers, in place, and look after them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fourbit._core import NonFiniteError
from fourbit.experts import experts_layouts
from fourbit.linear import Linear4bit
from fourbit.lora import loftq
from fourbit.lora.config import AdapterConfig, TargetRule, named
from fourbit.lora.experts import ExpertsLora, LoraExperts, experts_shape
from fourbit.lora.layer import InitLora, LoraLinear
from fourbit.lora.targets import (
    ALL_LINEAR,
    check_each_name_matches,
    check_each_pattern_matches,
    experts_weights,
    find_experts,
    find_targets,
    names_of_experts,
    shortest_names,
)

Model = TypeVar("Model", bound=nn.Module)

LoraLayer: TypeAlias = LoraLinear | LoraExperts
"""What stands in a model in the place of a layer with an adapter."""

_STATE = "_fourbit_adapter"


@dataclass
class AdapterState:
    """What a model with an adapter remembers, beside its modules.

    Attributes:
        config: the adapter's settings; targets as a file names them.
        saved: the frozen modules that copies of `modules_to_save` replace, by path.
    """

    config: AdapterConfig
    saved: dict[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterSize:
    """How much is trained.

    Attributes:
        parameters: numbers that are trained.
        nbytes: their size.
        base_parameters: numbers of the frozen model; a 4-bit weight counts each of its numbers.
    """

    parameters: int
    nbytes: int
    base_parameters: int

    @property
    def share(self) -> float:
        """Trained numbers over all numbers."""
        return self.parameters / max(1, self.parameters + self.base_parameters)

    def __str__(self) -> str:
        """One line for a report."""
        return (
            f"{self.parameters:,} trainable parameters ({self.nbytes / 2**20:.1f} MiB), "
            f"{100 * self.share:.2f}% of the model"
        )


def add_lora(
    model: Model,
    *,
    r: int = 64,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    target_parameters: Sequence[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: InitLora | Literal["loftq"] = "default",
    modules_to_save: Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    loftq_iterations: int = 1,
    loftq_weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> Model:
    """Put a trainable low-rank adapter beside linear layers and freeze everything else, in place.

    The 3-D weights of mixtures of experts are linear layers too, one for each expert, and each
    expert gets an adapter of its own. "all-linear" has them, as QLoRA's paper has every linear
    layer of the transformer blocks; the router, which only chooses, is left as it is. Adapters of
    all experts are many numbers: see what `adapter_size` says, and take a lower rank for them
    (``rank_pattern={"experts.*": 8}``) or leave them out (``target_parameters=()``).

    Args:
        model: any module; its linear layers may be ``nn.Linear`` or `Linear4bit`, its weights of
            experts dense or in 4 bits.
        r: rank of the adapters.
        lora_alpha: the adapter's output is multiplied by ``lora_alpha / r``.
        lora_dropout: probability with which an input of the adapter is zeroed in training.
        target_modules: "all-linear" (every linear layer but the output head), a list of names
            (whole paths, or their last parts such as "q_proj"), or a regular expression that
            matches whole paths.
        target_parameters: names of 3-D weights of experts, whole or their last parts, such as
            "experts.down_proj". By default all of them with "all-linear", else none; with an
            empty list none.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead (arXiv 2312.03732).
        use_dora: learn the norm of each row apart from its direction (arXiv 2402.09353).
        init_lora_weights: "default" (or True) and "gaussian" leave the model's output as it is;
            "loftq" (arXiv 2310.08659) makes up for the rounding of a 4-bit base; False starts
            with random matrices (for tests).
        modules_to_save: names of modules that are trained whole and saved with the adapter, such
            as a classification head; they are copies, and `remove_lora` brings the originals back.
        rank_pattern: ``{regular expression at the end of a path: r}`` for layers of another rank.
        alpha_pattern: the same for `lora_alpha`.
        loftq_iterations: rounds of LoftQ. With more than one the base changes too, and the adapter
            then fits only this base: save it as well.
        loftq_weights: the weights before quantization, which LoftQ needs for a `Linear4bit`: the
            folder or file of the 16-bit checkpoint (read tensor by tensor), or a state dict.
            Dense layers have theirs, and become `Linear4bit` in NF4.
        adapter_dtype: of the adapter's parameters.
        seed: of the adapter's random numbers; by default torch's global generator is used.

    Returns:
        The model.

    Raises:
        ValueError: naming the option that makes no sense, or a target that does not exist; also if
            the model has an adapter already.
        CheckpointError: naming the tensor of `loftq_weights` that is missing or does not fit.
        NonFiniteError: for weights with NaN or infinity under LoftQ.
    """
    config = AdapterConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        target_parameters=_experts_option(model, target_modules, target_parameters),
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=_as_tuple(modules_to_save),
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
    )
    if not adapter_dtype.is_floating_point:
        raise ValueError(f"adapter_dtype is {adapter_dtype}; use float32, bfloat16 or float16")
    refuse_adapters(model)
    rule = TargetRule(
        config.target_modules,
        modules_to_save=config.modules_to_save,
        target_parameters=config.target_parameters,
    )
    targets = find_targets(model, rule)
    experts = find_experts(model, rule)
    check_each_name_matches(config.target_modules, targets, model)
    weights = [f"{path}.{name}" for path, names in experts.items() for name in names]
    for option in ("rank_pattern", "alpha_pattern"):
        check_each_pattern_matches(option, getattr(config, option), [*targets, *weights])
    if config.target_modules == ALL_LINEAR:
        config = replace(config, target_modules=shortest_names(targets, model))
    if init_lora_weights == "loftq":
        if experts:
            raise ValueError(
                f'init_lora_weights="loftq" is for linear layers, and {weights[0]} is a weight of '
                "experts; pass target_parameters=() to leave experts without adapters"
            )
        starts = _loftq_starts(model, targets, config, loftq_iterations, loftq_weights)
        layer_init: InitLora = "default"
    else:
        if loftq_weights is not None:
            raise ValueError('loftq_weights is only used with init_lora_weights="loftq"')
        starts, layer_init = {}, init_lora_weights
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    layers: dict[str, LoraLayer] = {
        **build_layers(
            targets,
            config,
            init=layer_init,
            dtype=adapter_dtype,
            generator=generator,
            starts=starts,
        ),
        **build_experts(
            model, experts, config, init=layer_init, dtype=adapter_dtype, generator=generator
        ),
    }
    install(model, config, layers, trainable=True)
    return model


def _experts_option(
    model: nn.Module, modules: str | Sequence[str], parameters: Sequence[str] | None
) -> tuple[str, ...]:
    if parameters is not None:
        return _as_tuple(parameters)
    return names_of_experts(experts_weights(model), model) if modules == ALL_LINEAR else ()


def build_layers(
    targets: Mapping[str, nn.Linear],
    config: AdapterConfig,
    *,
    init: InitLora = "default",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    starts: Mapping[str, loftq.Start] | None = None,
) -> dict[str, LoraLinear]:
    """The adapter of every target, not yet in the model."""
    layers: dict[str, LoraLinear] = {}
    for path, layer in targets.items():
        start = None if starts is None else starts.get(path)
        base = layer if start is None else _rebased(layer, start)
        built = LoraLinear(
            base,
            r=config.rank(path),
            lora_alpha=config.alpha(path),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=init,
            dtype=dtype,
            generator=generator,
        )
        if start is not None:
            with torch.no_grad():
                built.lora_A.weight.copy_(start.a)
                built.lora_B.weight.copy_(start.b)
            built.reset_magnitude()
        layers[path] = built
    return layers


def build_experts(
    model: nn.Module,
    targets: Mapping[str, Sequence[str]],
    config: AdapterConfig,
    *,
    init: InitLora = "default",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> dict[str, LoraExperts]:
    """The adapters of modules of experts, not yet in the model, given the names of weights."""
    layers: dict[str, LoraExperts] = {}
    for path, names in targets.items():
        base = model.get_submodule(path)
        adapters = {
            name: ExpertsLora(
                experts_shape(base, name),
                r=config.rank(f"{path}.{name}"),
                lora_alpha=config.alpha(f"{path}.{name}"),
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=init,
                dtype=dtype,
                device=getattr(base, name).device,
                generator=generator,
            )
            for name in names
        }
        layers[path] = LoraExperts(base, adapters)
    return layers


def install(
    model: nn.Module,
    config: AdapterConfig,
    layers: Mapping[str, LoraLayer],
    *,
    trainable: bool,
) -> AdapterState:
    """Freeze the model, put the adapters in and make copies of `modules_to_save`.

    Everything that can fail comes before the first change.
    """
    saved = {path: copy.deepcopy(module) for path, module in find_saved(model, config).items()}
    model.requires_grad_(False)
    state = AdapterState(config)
    # The module that is there, which a layer's base is not where LoftQ has made another.
    replacements = {model.get_submodule(path): layer for path, layer in layers.items()}
    _replace(model, replacements)
    for path, twin in saved.items():
        state.saved[path] = model.get_submodule(path)
        set_submodule(model, path, twin.requires_grad_(trainable))
    for layer in layers.values():
        # Dropout must not act in a model that is evaluated, whatever its layers' own flags say.
        layer.train(model.training)
        layer.base_layer.requires_grad_(False)
        for part in adapter_parameters(layer):
            part.requires_grad_(trainable)
    setattr(model, _STATE, state)
    return state


def find_saved(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names, by path.

    Raises:
        ValueError: naming one that does not exist, or whose weights are not floating point.
    """
    found: dict[str, nn.Module] = {}
    for name in config.modules_to_save:
        paths = [path for path, _ in model.named_modules() if path and named([name], path)]
        if not paths:
            raise ValueError(f"modules_to_save names {name!r}, which this model does not have")
        for path in paths:
            module = model.get_submodule(path)
            if any(not part.is_floating_point() for part in module.parameters()):
                raise ValueError(
                    f"modules_to_save names {path}, whose weights are quantized and cannot be "
                    "trained; leave it out of the quantization"
                )
            found[path] = module
    outermost = [p for p in found if not any(p.startswith(f"{other}.") for other in found)]
    return {path: found[path] for path in outermost}


def remove_lora(model: Model) -> Model:
    """Take the adapters out again, in place; everything stays frozen.

    The base is left as it is: a merged model (`fourbit.merge`) stays merged and cannot be unmerged
    any more. Copies made for `modules_to_save` give way to the originals.

    Raises:
        ValueError: if the model has no adapter.
    """
    state = adapter_state(model)
    _replace(model, {layer: layer.base_layer for layer in lora_modules(model).values()})
    for path, original in state.saved.items():
        twin = model.get_submodule(path)
        device = next((part.device for part in twin.parameters()), None)
        set_submodule(model, path, original if device is None else original.to(device))
    delattr(model, _STATE)
    model.requires_grad_(False)
    return model


def lora_modules(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers and modules of experts with an adapter, by path in the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(layer: LoraLayer) -> list[nn.Parameter]:
    """What is trained of a layer."""
    return [part for name, part in layer.named_parameters() if not name.startswith("base_layer.")]


def adapter_size(model: nn.Module) -> AdapterSize:
    """Count what is trained of a model, and what is frozen."""
    trained = [part for part in model.parameters() if part.requires_grad]
    frozen = sum(
        part.numel()
        for part in model.parameters()
        if not part.requires_grad and part.is_floating_point()
    )
    packed = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, Linear4bit)
    ) + sum(
        layout.shape.numel()
        for module in model.modules()
        for layout in experts_layouts(module).values()
    )
    return AdapterSize(
        parameters=sum(part.numel() for part in trained),
        nbytes=sum(part.numel() * part.element_size() for part in trained),
        base_parameters=frozen + packed,
    )


def adapter_state(model: nn.Module) -> AdapterState:
    """What `add_lora` or `load_adapter` left on a model.

    Raises:
        ValueError: if the model has no adapter, or it was put on another module of the model.
    """
    state = model.__dict__.get(_STATE)
    if isinstance(state, AdapterState):
        return state
    for path, module in model.named_modules():
        if _STATE in module.__dict__:
            raise ValueError(
                f"the adapter was put on the submodule {path or 'itself'}; pass that module"
            )
    raise ValueError("the model has no adapter; call fourbit.add_lora or load_adapter first")


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of the model has an adapter of ours."""
    return bool(lora_modules(model))


def has_peft_adapter(model: nn.Module) -> bool:
    """Whether PEFT put an adapter on the model. PEFT need not be installed to tell."""
    return any(type(module).__module__.split(".")[0] == "peft" for module in model.modules())


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model that has an adapter, ours or PEFT's.

    Raises:
        ValueError: saying which.
    """
    if has_adapter(model) or _STATE in model.__dict__:
        raise ValueError("the model has an adapter already; call fourbit.remove_lora first")
    if has_peft_adapter(model):
        raise ValueError("the model has an adapter of PEFT; unload it first")


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under every name they have (layers may be shared)."""
    new = set(replacements.values())
    for parent in list(model.modules()):
        if parent in new or isinstance(parent, LoraLayer):
            continue
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def _rebased(layer: nn.Linear, start: loftq.Start) -> Linear4bit:
    # A new layer even where only its bytes change: the model's own is untouched until all is built.
    new = Linear4bit.from_quantized(start.quantized, bias=layer.bias)
    new.transposed_when_dense = getattr(layer, "transposed_when_dense", False)
    return new.train(layer.training)


def _loftq_starts(
    model: nn.Module,
    targets: Mapping[str, nn.Linear],
    config: AdapterConfig,
    iterations: int,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None,
) -> dict[str, loftq.Start]:
    if iterations < 1:
        raise ValueError(f"loftq_iterations is {iterations}; at least one is needed")
    quantized = [path for path, layer in targets.items() if isinstance(layer, Linear4bit)]
    if quantized and weights is None:
        raise ValueError(
            f"LoftQ needs the weight of {quantized[0]} before it was quantized; "
            "give the 16-bit checkpoint as loftq_weights"
        )
    if any(part.is_meta for part in model.parameters()):
        raise ValueError("LoftQ needs weights, but the model is on the meta device; load it first")
    source = None if weights is None else loftq.open_weights(weights)
    starts: dict[str, loftq.Start] = {}
    for path, layer in targets.items():
        base = layer if isinstance(layer, Linear4bit) else None
        weight: Tensor = layer.weight.detach()
        if base is not None and source is not None:
            weight = base.in_dense_files(source.weight(path)).to(weight.device)
            loftq.check_same_weights(weight, base, path)
        try:
            starts[path] = loftq.loftq(
                weight,
                r=config.rank(path),
                scaling=config.scaling(path),
                iterations=iterations,
                base=base,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{path}.weight: {error}") from None
    return starts


def _as_tuple(names: Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
