"""`install` and `uninstall`: what PEFT is told about 4-bit layers. Private names of PEFT: here.

==============================================  ==================================================
what is touched                                 and why
==============================================  ==================================================
``LoraModel._create_and_replace``               gives a `Linear4bit` our layer, and LoftQ; and
                                                4-bit weights of experts our wrapper
``PeftModel.get_nb_trainable_parameters``       counts numbers, not bytes
``PeftMixedModel.get_nb_trainable_parameters``  the same
``prepare_model_for_kbit_training``             is `fourbit.prepare_for_training` for our models
``replace_lora_weights_loftq``                  is ours for our models
``resolve_quantization_backend``                gives BOFT, MiSS, OFT, SHiRA, VeRA our weights
``BaseTunerLayer._get_base_layer_device_...``   tells the dtype of weights that are bytes
``BaseTuner._check_merge_allowed``              refuses methods that would merge into bytes
``BaseTuner._replace_module``                   refuses methods that multiply with bytes
==============================================  ==================================================

Weights of experts come through ``_create_and_replace`` with ``parameter_name``.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from fourbit.experts import experts_layouts
from fourbit.integrations.patching import Patches
from fourbit.integrations.versions import require_feature
from fourbit.linear import Linear4bit
from fourbit.model import hidden_numbers

_patches = Patches()
_originals: dict[str, Callable[..., Any]] = {}
# Methods of PEFT that take the weight itself, or its dtype, for numbers while they compute. Others
# that do so fail in PEFT while the adapter is made.
_NEED_NUMBERS = ("hira", "loha", "lokr", "unilora")


def install() -> None:
    """Teach PEFT about `Linear4bit`. Importing fourbit does this as soon as PEFT is imported.

    Raises:
        ImportError: without PEFT, or with a version of it that this does not fit.
    """
    if _patches:
        return
    import peft
    from peft.tuners.lora import model as lora_model
    from peft.utils import loftq_utils, other

    _check_version(peft, lora_model)
    try:
        _install(peft, lora_model, loftq_utils, other)
    except BaseException:
        uninstall()
        raise


def _install(peft: Any, lora_model: Any, loftq_utils: Any, other: Any) -> None:
    """What LoRA needs, and then the rest."""
    _originals["create"] = lora_model.LoraModel._create_and_replace
    _patches.attribute(lora_model.LoraModel, "_create_and_replace", _create_and_replace)
    for owner in (peft.PeftModel, peft.PeftMixedModel):
        name = "get_nb_trainable_parameters"
        _patches.attribute(owner, name, _counting(getattr(owner, name)))
    for module, name, code in (
        (other, "prepare_model_for_kbit_training", _prepare),
        (loftq_utils, "replace_lora_weights_loftq", _replace_loftq),
    ):
        _originals[name] = _patches.function(inspect.unwrap(getattr(module, name)), code)
    _install_for_all_methods()


def _install_for_all_methods() -> None:
    """What methods other than LoRA need; `_check_method` refuses them where PEFT lacks it."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    name = "_get_base_layer_device_and_dtype"
    if hasattr(BaseTunerLayer, name):
        _patches.attribute(BaseTunerLayer, name, _with_weight_dtype(getattr(BaseTunerLayer, name)))
    for name, wrapped in (
        ("_check_merge_allowed", _checking_merge),
        ("_replace_module", _checking_method),
    ):
        _patches.attribute(BaseTuner, name, wrapped(getattr(BaseTuner, name)))
    try:
        from peft.utils import quantization_utils
    except ImportError:
        return
    name = "resolve_quantization_backend"
    _originals[name] = _patches.function(getattr(quantization_utils, name), _resolve)


def uninstall() -> None:
    """Leave PEFT as it was. Models that were made meanwhile keep their layers."""
    _patches.undo()
    _originals.clear()


def register() -> None:
    """What the import of PEFT calls."""
    install()


def has_4bit_weights(model: nn.Module) -> bool:
    """Whether any layer of a model is a `Linear4bit`, or any weight of experts in 4 bits."""
    return any(isinstance(m, Linear4bit) or experts_layouts(m) for m in model.modules())


def _check_version(peft: Any, lora_model: Any) -> None:
    touched: Any = getattr(lora_model.LoraModel, "_create_and_replace", None)
    wanted = ("lora_config", "adapter_name", "target", "target_name", "parent", "current_key")
    found = () if touched is None else tuple(inspect.signature(touched).parameters)
    if found[1:7] != wanted or not hasattr(peft.LoraConfig(), "_custom_modules"):
        raise ImportError(
            f"PEFT {peft.__version__} is built in another way than the versions that fourbit "
            "knows, so its adapters do not fit 4-bit layers; install another version of peft or "
            "fourbit, or use fourbit.add_lora"
        )


def _create_and_replace(
    self: Any,
    lora_config: Any,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
    **kwargs: Any,
) -> None:
    from fourbit.integrations.peft.experts import ParamWrapper
    from fourbit.integrations.peft.layer import LoraLinear4bit
    from fourbit.integrations.peft.support import check_experts, check_supported

    def create(config: Any) -> None:
        arguments = (config, adapter_name, target, target_name, parent, current_key)
        _originals["create"](self, *arguments, **kwargs)

    get_base: Any = getattr(target, "get_base_layer", None)
    base = get_base() if callable(get_base) else target
    if experts_layouts(base) and kwargs.get("parameter_name") is not None:
        require_feature("target_parameters on 4-bit experts")
        check_experts(lora_config, current_key)
        # Also for weights of the module that are dense: one forward has to know of all adapters.
        config = copy.copy(lora_config)
        config._custom_modules = {**(lora_config._custom_modules or {}), type(base): ParamWrapper}
        create(config)
        return
    if not isinstance(base, Linear4bit):
        create(lora_config)
        return
    if kwargs.get("parameter_name") is not None:
        raise ValueError(
            f"target_parameters names {current_key}, which is in 4 bits; "
            "name the layer in target_modules"
        )
    check_supported(lora_config, current_key)
    if lora_config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is for Conv1D and is set to False", stacklevel=2)
        lora_config.fan_in_fan_out = False
    # PEFT's own way to other layers, in a copy: what a user registered comes first.
    config = copy.copy(lora_config)
    config._custom_modules = {**(lora_config._custom_modules or {}), Linear4bit: LoraLinear4bit}
    if lora_config.init_lora_weights != "loftq":
        create(config)
        return
    config.init_lora_weights = True
    create(config)
    _start_loftq(self.model, getattr(parent, target_name), lora_config, adapter_name, current_key)


def _start_loftq(
    model: nn.Module, layer: Any, lora_config: Any, adapter_name: str, path: str
) -> None:
    from fourbit.integrations.peft.layer import LoraLinear4bit
    from fourbit.integrations.peft.loftq import start_loftq, weight_for

    if not isinstance(layer, LoraLinear4bit):
        raise ValueError(
            f'{path} has a layer of your own, which init_lora_weights="loftq" does not'
        )
    bits = lora_config.loftq_config.get("loftq_bits", 4)
    if bits != layer.get_base_layer().codebook.code_bits:
        raise ValueError(
            f"loftq_bits is {bits} and {path} has {layer.get_base_layer().codebook.code_bits} bits"
        )
    if layer.merged:
        raise ValueError(f"{path} holds a merged adapter; unmerge it before LoftQ")
    iterations = lora_config.loftq_config.get("loftq_iter", 1)
    start_loftq(layer, adapter_name, weight_for(model, path), path, iterations=iterations)


def _counting(original: Callable[[Any], tuple[int, int]]) -> Callable[[Any], tuple[int, int]]:
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """Numbers that are trained, and all numbers; those of 4-bit weights count one by one."""
        trained, total = original(self)
        return trained, total + hidden_numbers(self)

    return get_nb_trainable_parameters


def _with_weight_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_base_layer_device_and_dtype(self: Any, base_layer: nn.Module) -> Any:
        """Where adapters of a layer go, and the dtype in which they start."""
        if isinstance(base_layer, Linear4bit):
            _check_method(self)
            return base_layer.weight.device, base_layer.weight_dtype
        return original(self, base_layer)

    return _get_base_layer_device_and_dtype


def _method(layer: Any) -> str:
    return type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]


def _check_method(layer: Any) -> None:
    if _method(layer) in _NEED_NUMBERS:
        raise ValueError(
            f"PEFT's {_method(layer)} computes with the weight of a layer, which is in 4 bits "
            "here; use LoRA, or load the base in 16 bits"
        )
    if _method(layer) != "lora":
        require_feature("methods of PEFT other than LoRA on 4-bit layers")


def _checking_method(original: Callable[..., None]) -> Callable[..., None]:
    def _replace_module(self: Any, parent: Any, child_name: str, new: Any, child: Any) -> None:
        """Refuse methods that would compute with bytes."""
        get_base: Any = getattr(new, "get_base_layer", None)
        if callable(get_base) and isinstance(get_base(), Linear4bit):
            _check_method(new)
        original(self, parent, child_name, new, child)

    return _replace_module


def _checking_merge(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def _check_merge_allowed(self: Any) -> None:
        """Refuse methods that take a weight for numbers."""
        _check_mergeable(self.model)
        original(self)

    return _check_merge_allowed


def _check_mergeable(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from fourbit.integrations.peft.layer import LoraLinear4bit

    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, LoraLinear4bit):
            continue
        base = layer.get_base_layer()
        if isinstance(base, Linear4bit) and getattr(layer, "quantization_backend", None) is None:
            raise ValueError(
                f"{path} is in 4 bits, into which PEFT's {_method(layer)} cannot be merged; keep "
                "the adapter beside it, or load the base in 16 bits and merge there"
            )


def _prepare(*args, **kwargs):  # type: ignore[no-untyped-def]
    # Runs as a function of another module: it sees nothing of this one.
    from fourbit.integrations.peft.hook import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(*args, **kwargs)


def _replace_loftq(*args, **kwargs):  # type: ignore[no-untyped-def]
    from fourbit.integrations.peft.hook import replace_lora_weights_loftq

    return replace_lora_weights_loftq(*args, **kwargs)


def _resolve(*args, **kwargs):  # type: ignore[no-untyped-def]
    from fourbit.integrations.peft.hook import resolve_quantization_backend

    return resolve_quantization_backend(*args, **kwargs)


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
    """PEFT's function of that name, which knows `Linear4bit` too."""
    from fourbit.integrations.peft.backend import FourbitBackend

    if isinstance(base_layer, Linear4bit):
        return FourbitBackend()
    return _originals["resolve_quantization_backend"](base_layer, **kwargs)


def prepare_model_for_kbit_training(model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's function of that name, and for models with `Linear4bit` ``prepare_for_training``.

    PEFT's casts every 16-bit parameter to float32, embeddings and output head included, which takes
    more memory than the adapters do and gains nothing here: no parameter of our models is cast.
    """
    from fourbit.training import prepare_for_training

    original = _originals["prepare_model_for_kbit_training"]
    if not has_4bit_weights(model):
        return original(model, *args, **kwargs)
    options = inspect.signature(original).bind(model, *args, **kwargs).arguments
    return prepare_for_training(
        model,
        gradient_checkpointing=options.get("use_gradient_checkpointing", True),
        gradient_checkpointing_kwargs=options.get("gradient_checkpointing_kwargs"),
    )


def replace_lora_weights_loftq(peft_model: Any, *args: Any, **kwargs: Any) -> None:
    """PEFT's function of that name, and ours for models with `Linear4bit`."""
    from fourbit.integrations.peft import loftq

    if has_4bit_weights(peft_model):
        loftq.replace_lora_weights_loftq(peft_model, *args, **kwargs)
    else:
        _originals["replace_lora_weights_loftq"](peft_model, *args, **kwargs)
