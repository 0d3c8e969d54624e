"""What `fourbit.export_merged` writes of a model with PEFT's adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from fourbit.experts import experts_layouts
from fourbit.export import Member, frozen_member, linear_member, paths_above
from fourbit.integrations.peft.experts import ParamWrapper
from fourbit.integrations.peft.layer import LoraLinear4bit
from fourbit.model_io import untied_state


def base_model(model: nn.Module) -> nn.Module:
    """The model that was adapted, its adapters inside, without PEFT's own modules around it."""
    get: Any = getattr(model, "get_base_model", None)
    found = get() if callable(get) else model
    return found if isinstance(found, nn.Module) else model


def peft_members(model: nn.Module) -> dict[str, Member]:
    """The tensors of a model without adapters, with those that are active added.

    Raises:
        ValueError: naming an adapter that is not LoRA, which cannot be added to a weight here.
    """
    everywhere = list(model.named_modules(remove_duplicate=False))
    adapters = {path: m for path, m in everywhere if isinstance(m, BaseTunerLayer)}
    copies = {path: m for path, m in everywhere if isinstance(m, AuxiliaryTrainingWrapper)}
    for path, module in (*adapters.items(), *copies.items()):
        if not isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            raise ValueError(
                f"{path} has a {type(module).__name__} of PEFT, which export_merged cannot add "
                "to the weight; only LoRA and modules_to_save can be exported"
            )
    modules = dict(model.named_modules())
    names = list(model.state_dict())
    # With its adapter added, a weight is tied to no other any more; nor is one that is left out.
    apart = {f"{path}.base_layer.weight" for path in adapters}
    apart |= {name for name in names for path in copies if name.startswith(f"{path}.original")}
    shells = {**dict.fromkeys(adapters, "base_layer."), **{p: _shell(m) for p, m in copies.items()}}
    found: dict[str, Member] = {}
    for name, tensor in untied_state(model, apart=apart).items():
        # From the outside: wrappers of several weights of experts are each other's base.
        wrappers = [path for path in paths_above(name) if path in shells]
        path, _, leaf = name.rpartition(".")
        if not wrappers:
            member = frozen_member(modules.get(path), leaf, tensor)
        elif wrappers[0] not in modules or not all(
            name.startswith(f"{wrapper}.{shells[wrapper]}") for wrapper in wrappers
        ):
            continue
        else:
            member = _member(adapters.get(wrappers[0]), modules.get(path), leaf, tensor)
            for wrapper in reversed(wrappers):
                name = f"{wrapper}.{name.removeprefix(f'{wrapper}.{shells[wrapper]}')}"
        if member is not None:
            found[name] = member
    return found


def _shell(copy: Any) -> str:
    """Where the module lies that a wrapper of ``modules_to_save`` computes with."""
    active = [name for name in copy.active_adapters if name in copy.modules_to_save]
    return (
        "original_module."
        if copy.disable_adapters or not active
        else (f"modules_to_save.{active[0]}.")
    )


def _member(layer: Any, owner: nn.Module | None, leaf: str, tensor: Tensor) -> Member | None:
    if layer is None:
        return frozen_member(owner, leaf, tensor)
    while isinstance(layer, ParamWrapper) and layer.parameter_name != leaf:
        layer = layer.base_layer
    if isinstance(layer, ParamWrapper):
        names, base = _active(layer), layer.get_base_layer()
        layout = experts_layouts(base).get(leaf)
        dtype, shape = (layout.dtype, layout.shape) if layout else (tensor.dtype, tensor.shape)
        return Member(dtype, shape, lambda dtype: layer.weight_with(names).to(dtype))
    if isinstance(layer, LoraLinear4bit) and leaf == "weight":
        names = _active(layer)
        return linear_member(
            layer.get_base_layer(), lambda dtype: layer.weight_with(names).to(dtype)
        )
    if not isinstance(layer, LoraLayer) or leaf not in ("weight", "bias") or layer.merged:
        return frozen_member(owner, leaf, tensor)
    return Member(tensor.dtype, tensor.shape, lambda dtype: _dense(layer, leaf, tensor).to(dtype))


def _active(layer: Any) -> list[str]:
    """The adapters that a layer computes with, in order."""
    if layer.disable_adapters:
        return []
    names = layer.merged_adapters or layer.active_adapters
    return [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]


@torch.no_grad()
def _dense(layer: Any, leaf: str, tensor: Tensor) -> Tensor:
    """A weight or bias of a layer of PEFT's own with its adapters added, in float32."""
    total = tensor.detach().float()
    for name in _active(layer):
        if leaf == "bias":
            if layer.lora_bias.get(name):
                total = total + layer.lora_B[name].bias.float() * layer.scaling[name]
        elif name in layer.lora_variant:
            total = layer.lora_variant[name].merge_safe(layer, name, total)
        else:
            total = total + layer.get_delta_weight(name).float()
    return total
