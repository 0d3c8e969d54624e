"""The quantizer: what transformers calls to load, save and dequantize a model of ours."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fourbit._core import CheckpointError
from fourbit.file_groups import stored_parts
from fourbit.integrations.transformers.checkpoints import (
    StoredLayer,
    checkpoint_folder,
    stored_layers,
)
from fourbit.integrations.transformers.config import NF4Config
from fourbit.linear import Linear4bit
from fourbit.lora.attach import has_adapter
from fourbit.model import replace_module
from fourbit.targets import weights_to_quantize
from fourbit.tensor_file import TORCH_DTYPES

# The mark by which transformers knows what it need not initialise.
_INITIALIZED = "_is_hf_initialized"


class FourbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads models with 4-bit linear layers, quantized as they come or in the folder already.

    A subclass for another library's config overrides `settings` and `describe`.

    Args:
        quantization_config: the config that the user or the folder gives.
        kwargs: of transformers; ``pre_quantized`` says that the folder is quantized.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = self.settings(quantization_config)
        # Of the model being loaded: layers without their weight yet, what the folder holds of
        # them, and errors to be raised when transformers can no longer hide them.
        self.unfilled: set[str] = set()
        self.stored: dict[str, StoredLayer] = {}
        self.problems: list[Exception] = []
        self._model: weakref.ref[Any] | None = None

    def settings(self, quantization_config: Any) -> NF4Config:
        """The given config as an `NF4Config`."""
        config: NF4Config = quantization_config
        return config

    def describe(self, found: NF4Config) -> Any:
        """The config that a loaded model has and ``config.json`` gets.

        Args:
            found: how the model is quantized.
        """
        return found

    # --- before the weights are loaded ------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ``ValueError`` for a device map that would put layers on the disk."""
        places = device_map.values() if isinstance(device_map, Mapping) else ()
        if "disk" in [str(place) for place in places]:
            raise ValueError(
                "the device_map puts layers on the disk, which 4-bit layers do not support; "
                'put them on "cpu", where they are computed too'
            )

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element, for the estimates behind ``device_map="auto"``."""
        path, _, leaf = param_name.rpartition(".")
        if leaf.startswith("weight") and path in self.unfilled:
            return 1.0
        size: float = param.element_size()
        return size

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self.stored = stored_layers(model, checkpoint_folder(checkpoint_files))
            for path, stored in self.stored.items():
                self._make_room(
                    model,
                    path,
                    codebook=stored.codebook,
                    block_size=stored.block_size,
                    double_quant=stored.double_quant,
                    dtype=stored.dtype,
                    read_as=stored.storage,
                )
            return
        targets = weights_to_quantize(
            model,
            block_size=self.config.block_size,
            only=self.config.only,
            skip=self.config.skip,
            keep=lambda path: self._is_kept(model, path),
        )
        for path, layer in targets.layers.items():
            self._make_room(
                model,
                path,
                codebook=self.config.book,
                block_size=self.config.block_size,
                double_quant=self.config.double_quant,
                dtype=layer.weight.dtype,
                read_as=layer.weight.dtype,
            )

    def _make_room(
        self, model: Any, path: str, *, dtype: torch.dtype, read_as: torch.dtype, **layout: Any
    ) -> None:
        """Put an empty 4-bit layer in the place of a dense one."""
        layer = model.get_submodule(path)
        new = Linear4bit(
            layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype, **layout
        )
        new.bias = layer.bias
        # transformers casts what it reads to the dtype that the model has for it.
        new.weight = nn.Parameter(new.weight.to(read_as), requires_grad=False)
        # Nothing initialises a weight that is not there; it is an error when all are loaded.
        setattr(new, _INITIALIZED, True)
        replace_module(model, layer, new.train(layer.training))
        self.unfilled.add(path)

    def filled(self, path: str, layer: Linear4bit) -> None:
        """Note that a layer has its weight; its bias may still be one that is not in the folder."""
        self.unfilled.discard(path)
        setattr(layer, _INITIALIZED, False)

    def _is_kept(self, model: Any, path: str) -> bool:
        tied = getattr(model, "all_tied_weights_keys", {})
        if f"{path}.weight" in {*tied.keys(), *tied.values()}:
            return True
        if _names_one(_float32_modules(model, torch.float16), path):
            return True
        return not should_convert_module(path, self.config.skip_modules)

    # --- while they are loaded --------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor is the weight of a layer that is yet to be quantized."""
        path, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and path in self.unfilled

    def get_quantize_ops(self) -> Any:
        """What quantizes a weight that was read."""
        from fourbit.integrations.transformers.operations import Quantize

        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """What reads quantized weights."""
        from fourbit.integrations.transformers.operations import reading

        return [reading(self)] if self.pre_quantized else []

    def dtype_in(self, model: Any, name: str) -> torch.dtype:
        """The dtype that a plain weight has in the model."""
        dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
        return torch.float32 if _names_one(_float32_modules(model, dtype), name) else dtype

    # --- after that -------------------------------------------------------------------------------

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Check that every layer has its weight, and write down how the model is quantized.

        Raises:
            NonFiniteError: naming the layer and the first weight that is NaN or infinite.
            CheckpointError: naming the weight that the checkpoint does not hold.
        """
        from fourbit.integrations.transformers.operations import without_ours

        if self.problems:
            raise self.problems[0]
        if self.unfilled:
            first = min(self.unfilled)
            more = f" and {len(self.unfilled) - 1} more" if len(self.unfilled) > 1 else ""
            raise CheckpointError(f"the checkpoint does not hold {first}.weight{more}")
        self.stored = {}
        self._model = weakref.ref(model)
        model._weight_conversions = without_ours(getattr(model, "_weight_conversions", None))
        self.config = self._found(model)
        self.quantization_config = self.describe(self.config)
        return super().postprocess_model(model, **kwargs)

    def _found(self, model: Any) -> NF4Config:
        layers = quantized_layers(model)
        first = next(iter(layers.values()))
        return self.config.of_model(
            first.codebook,
            block_size=first.block_size,
            double_quant=first.double_quant,
            skip_modules=[
                path
                for path, module in model.named_modules()
                if isinstance(module, nn.Linear) and path not in layers
            ],
            dtype=str(first.weight_dtype).removeprefix("torch."),
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether there is something to train: adapters of ours, which PEFT does not know of.

        Without them, and without PEFT's, Trainer says that adapters are missing.
        """
        model = None if self._model is None else self._model()
        return model is None or has_adapter(model)

    @property
    def is_compileable(self) -> bool:
        """A model compiles without graph breaks."""
        return True

    def is_serializable(self) -> bool:
        """``save_pretrained`` works."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the tensors that ``fourbit.convert`` writes.

        Raises:
            ValueError: for a layer whose data is on the meta device, as offloaded ones are.
        """
        layers = quantized_layers(model)
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            path, _, leaf = name.rpartition(".")
            if path not in layers or leaf == "bias":
                state[name] = tensor
                continue
            if tensor.is_meta:
                raise ValueError(
                    f"{name} is offloaded; load the model with device_map={{'': 'cpu'}} to save it"
                )
            if leaf == "weight":
                for part in stored_parts(name, layers[path].quantized()):
                    data = part.tensor().view(TORCH_DTYPES[part.dtype])
                    state[part.name] = data.reshape(part.shape)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for path, layer in quantized_layers(model).items():
            weight = layer.dequantize(dtype)
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(weight)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.data.to(weight.dtype))
            replace_module(model, layer, dense.train(layer.training))
            _move_hook(model.get_submodule(path), layer)
        return model

    def __getstate__(self) -> dict[str, Any]:
        """All but the model, which has this and not the other way round."""
        return {**self.__dict__, "_model": None}


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """The quantized layers of a model, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def _float32_modules(model: Any, dtype: torch.dtype) -> set[str]:
    """Parts of names that a model's class keeps in float32 where the model is in `dtype`."""
    names: set[str] = set()
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return names


def _names_one(patterns: set[str], name: str) -> bool:
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def _move_hook(new: nn.Module, old: nn.Module) -> None:
    """Give a layer that takes another's place the hook that moves its inputs between devices."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
