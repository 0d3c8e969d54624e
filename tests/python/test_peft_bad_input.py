"""PEFT's adapters on `Linear4bit`: what is refused, and how it is said."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import fourbit
from fourbit import NonFiniteError
from fourbit.integrations import on_import
from fourbit.integrations import peft as ours
from fourbit.integrations.peft import hook
from lora_models import llama, logits, quantize_linears

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def quantized() -> Any:
    model = llama()
    quantize_linears(model)
    return model


def adapted(model: Any, **options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj"], **options}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # bitsandbytes' layers silently become plain LoRA under the first two.
        ({"kasa_config": peft.KasaConfig()}, rf"{Q} is in 4 bits.* no kasa_config"),
        ({"use_qalora": True}, rf"{Q} is in 4 bits.* no use_qalora"),
        ({"velora_config": {"num_groups": 4}}, "velora_config"),
        ({"monteclora_config": peft.MontecloraConfig()}, "monteclora_config"),
        ({"init_lora_weights": "corda"}, rf"{Q} .*init_lora_weights='corda' is not possible"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' is not possible"),
        ({"init_lora_weights": "pissa_niter_x"}, "'pissa_niter_N'"),
        (
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            rf"target_parameters names {Q}.weight, which is in 4 bits",
        ),
    ],
    ids=str,
)
def test_what_four_bit_layers_cannot_have(
    quantized: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(quantized, **options)


def test_an_adapter_for_another_base(quantized: Any, tmp_path: Any) -> None:
    adapted(llama(hidden_size=128)).save_pretrained(tmp_path)
    shapes = r"q_proj\.lora_A.*\[4, 128\].*\[4, 64\]"
    with pytest.raises(RuntimeError, match=f"(?s){shapes}"):
        peft.PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path)


@pytest.mark.usefixtures("scipy")
def test_loftq_without_the_weights(quantized: Any, tmp_path: Any) -> None:
    options = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()}
    with pytest.raises(FileNotFoundError, match="LoftQ needs the weights before"):
        adapted(quantized, **options)
    model = copy.deepcopy(quantized)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        adapted(model, **options)
    llama(seed=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{Q}.weight is not what the model's layer was"):
        adapted(model, **options)
    options["loftq_config"] = peft.LoftQConfig(loftq_bits=2)
    with pytest.raises(ValueError, match=r"loftq_bits is 2 and .* has 4 bits"):
        adapted(model, **options)
    with pytest.raises(ValueError, match="no 4-bit layer with an adapter named 'other'"):
        peft.replace_lora_weights_loftq(adapted(quantized), tmp_path, adapter_name="other")


def test_a_merge_that_cannot_be(quantized: Any) -> None:
    model = adapted(quantized)
    layer = model.base_model.model.get_submodule(Q)
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="default gives NaN"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.unmerge_adapter()
    biased = adapted(llama_without_bias(), lora_bias=True)
    with pytest.raises(ValueError, match=r"default has a bias .* the layer has none"):
        biased.merge_adapter()


def llama_without_bias() -> Any:
    model = llama(attention_bias=False)
    quantize_linears(model)
    return model


@pytest.mark.filterwarnings("ignore:merging into 4 bits")
def test_starts_that_need_what_is_not_there(quantized: Any, tmp_path: Any) -> None:
    model = adapted(quantized, init_lora_weights=False)
    model.merge_adapter()
    pissa = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="holds a merged adapter; unmerge it first"):
        model.add_adapter("second", pissa)
    adapted(quantized, init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load without low_cpu_mem_usage"):
        peft.PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path, low_cpu_mem_usage=True)


def test_an_export_of_other_adapters(quantized: Any, tmp_path: Any) -> None:
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = peft.get_peft_model(copy.deepcopy(quantized), config)
    with pytest.raises(ValueError, match=rf"{Q} has a Linear of PEFT, which export_merged cannot"):
        fourbit.export_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_fan_in_fan_out_is_for_others(quantized: Any) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out is for Conv1D"):
        model = adapted(quantized, fan_in_fan_out=True)
    assert torch.equal(logits(model), logits(quantized))


def test_a_version_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    ours.uninstall()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(LoraModel, "_create_and_replace", lambda self, config: None)
            with pytest.raises(ImportError, match=f"PEFT {peft.__version__} is built in another"):
                ours.install()
            # An import of PEFT goes well all the same.
            with pytest.warns(UserWarning, match=r"not registered with peft: .*fourbit\.add_lora"):
                on_import._register("peft")
            assert not hook._patches
        # What is missing later than that leaves nothing half done.
        create = LoraModel._create_and_replace
        with monkeypatch.context() as patch:
            patch.delattr(BaseTuner, "_check_merge_allowed")
            with pytest.raises(AttributeError):
                ours.install()
        assert not hook._patches
        assert LoraModel._create_and_replace is create
    finally:
        ours.install()
