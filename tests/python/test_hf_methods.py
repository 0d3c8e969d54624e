"""Parameters of transformers' models are counted as numbers, in 4 bits too."""

from transformers import PreTrainedModel

import fourbit
from fourbit.integrations.transformers import methods
from lora_models import llama


def test_a_quantized_model_has_as_many_parameters_as_before() -> None:
    dense = llama()
    quantized = fourbit.quantize_model(llama())
    assert sum(p.numel() for p in quantized.parameters()) < dense.num_parameters()
    assert quantized.num_parameters() == dense.num_parameters()
    assert quantized.num_parameters(exclude_embeddings=True) == dense.num_parameters(False, True)
    fourbit.add_lora(quantized, r=2)
    trained = sum(p.numel() for p in quantized.parameters() if p.requires_grad)
    assert trained > 0
    assert quantized.num_parameters(only_trainable=True) == trained
    assert quantized.num_parameters() == dense.num_parameters() + trained


def test_models_count_as_before_without_us() -> None:
    methods.register()  # it is registered already
    ours = PreTrainedModel.num_parameters
    model = fourbit.quantize_model(llama())
    methods.unregister()
    try:
        assert PreTrainedModel.num_parameters is ours.__wrapped__
        assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    finally:
        methods.register()
    assert model.num_parameters() == llama().num_parameters()
