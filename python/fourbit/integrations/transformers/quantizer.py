"""The quantizer: what transformers calls to load, save and dequantize a model of ours."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from fourbit._core import CheckpointError
from fourbit.distributed import is_sharded
from fourbit.integrations.conversions import Naming
from fourbit.integrations.transformers.checkpoints import checkpoint_folder, stored_rooms
from fourbit.integrations.transformers.config import NF4Config
from fourbit.integrations.transformers.models import (
    described,
    leave_files,
    make_dense,
    state_in_files,
)
from fourbit.integrations.transformers.rooms import ExpertsRoom, Room
from fourbit.integrations.transformers.targets import kept_in_float32, new_rooms
from fourbit.lora.attach import has_adapter

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
        # Of the model being loaded: weights that are not there yet, by name, and errors to be
        # raised when transformers can no longer hide them.
        self.unfilled: dict[str, Room] = {}
        self.problems: list[Exception] = []
        # Where there are experts: patterns of the conversions that put them together, and names of
        # parameters that the folder holds as they are.
        self._patterns: set[str] = set()
        self._leaves: set[str] = set()
        self._experts_before: str | None = None
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
        size: float = 1.0 if param_name in self.unfilled else param.element_size()
        return size

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        self._experts_before = getattr(model.config, "_experts_implementation", None)
        # transformers makes new tensors here on the meta device, of which nothing can be read.
        with torch.device("cpu"):
            if self.pre_quantized:
                rooms = stored_rooms(model, checkpoint_folder(checkpoint_files))
            else:
                rooms = new_rooms(model, self.config)
            self._note_experts(model, [r for r, _ in rooms if isinstance(r, ExpertsRoom)])
        for room, read_as in rooms:
            room.make(model, read_as)
            # Nothing initialises a weight that is not there; it is an error when all are loaded.
            setattr(room.module, _INITIALIZED, True)
            self.unfilled[room.name] = room

    def _note_experts(self, model: Any, experts: Sequence[ExpertsRoom]) -> None:
        """Note which conversions of transformers put quantized experts together."""
        no_conversions = not hasattr(HfQuantizer, "update_weight_conversions")
        if experts and self.pre_quantized and no_conversions:
            raise RuntimeError(
                f"transformers {transformers.__version__} cannot load quantized experts; use a "
                "newer one, or fourbit.from_pretrained"
            )
        naming = Naming(model)
        for room in experts:
            for name in [entry["name"] for entry in room.entries] or room.sources:
                pattern = naming.place(name)[1]
                if pattern is None:
                    self._leaves.add(room.name.rpartition(".")[2])
                else:
                    self._patterns.add(pattern)

    def filled(self, name: str) -> None:
        """Note that a weight is there; its module's bias may still be one that is not."""
        module = self.unfilled.pop(name).module
        if not any(room.module is module for room in self.unfilled.values()):
            setattr(module, _INITIALIZED, False)

    # --- while they are loaded --------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor is a weight that is yet to be quantized."""
        return not self.pre_quantized and param_name in self.unfilled

    def get_quantize_ops(self) -> Any:
        """What quantizes a weight that was read."""
        from fourbit.integrations.transformers.operations import Quantize

        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """What reads quantized weights."""
        from fourbit.integrations.transformers.collecting import reading_weights

        return [reading_weights(self)] if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """The conversions for a model, with ours for what the folder holds quantized."""
        from fourbit.integrations.transformers.collecting import quantizing_experts, reading_experts

        if not self.pre_quantized:
            return quantizing_experts(self, weight_conversions, self._patterns)
        return [
            *reading_experts(self, weight_conversions, self._patterns, self._leaves),
            *self.get_weight_conversions(),
        ]

    def dtype_in(self, model: Any, name: str) -> torch.dtype:
        """The dtype that a plain weight has in the model."""
        dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
        return torch.float32 if kept_in_float32(model, name, dtype) else dtype

    # --- after that -------------------------------------------------------------------------------

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Check that every layer has its weight, and write down how the model is quantized.

        Raises:
            NonFiniteError: naming the layer and the first weight that is NaN or infinite.
            CheckpointError: naming the weight that the checkpoint does not hold.
        """
        from fourbit.integrations.transformers.collecting import without_ours

        if self.problems:
            raise self.problems[0]
        if self.unfilled:
            first = min(self.unfilled)
            more = f" and {len(self.unfilled) - 1} more" if len(self.unfilled) > 1 else ""
            raise CheckpointError(f"the checkpoint does not hold {first}{more}")
        if not self.pre_quantized:
            leave_files(model)
        self._model = weakref.ref(model)
        model._weight_conversions = without_ours(getattr(model, "_weight_conversions", None))
        self.config = described(self.config, model)
        self.quantization_config = self.describe(self.config)
        return super().postprocess_model(model, **kwargs)

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

        With adapters of ours inside it is a Trainer's checkpoint, which is read back into a model
        with the same adapters: a state dict.

        Raises:
            ValueError: for a layer whose data is on the meta device, as offloaded ones are.
        """
        if has_adapter(model) and not is_sharded(model):
            return dict(model.state_dict()), {}
        return state_in_files(model), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        make_dense(model, dtype)
        if self._experts_before is not None:
            model.config._experts_implementation = self._experts_before
        return model

    def __getstate__(self) -> dict[str, Any]:
        """All but the model, which has this and not the other way round."""
        return {**self.__dict__, "_model": None}
