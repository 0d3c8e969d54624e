"""`prepare_for_training`, on models of transformers and on plain ones."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from fourbit.lora import add_lora
from fourbit.training import prepare_for_training
from lora_models import llama, quantize_linears, shake, tokens


def quantized(dtype: torch.dtype = torch.bfloat16) -> Any:
    model = llama(dtype)
    quantize_linears(model)
    return model


@pytest.mark.parametrize("adapter_first", [False, True])
def test_what_is_trained_and_nothing_is_cast(adapter_first: bool) -> None:
    model = quantized()
    dtypes = {name: part.dtype for name, part in model.named_parameters()}
    if adapter_first:
        add_lora(model, r=4, modules_to_save=["lm_head"])
        assert prepare_for_training(model) is model
    else:
        assert prepare_for_training(model) is model
        assert not any(part.requires_grad for part in model.parameters())
        add_lora(model, r=4, modules_to_save=["lm_head"])
    for name, part in model.named_parameters():
        assert part.requires_grad == ("lora_" in name or name.startswith("lm_head"))
        if "lora_" not in name:
            assert part.dtype == dtypes[name.replace("base_layer.", "")]
    assert model.config.use_cache is False


def test_adapters_of_peft_stay_trainable() -> None:
    model = peft.get_peft_model(quantized(), peft.LoraConfig(target_modules=["q_proj"]))
    trained = [name for name, part in model.named_parameters() if part.requires_grad]
    prepare_for_training(model)
    assert [name for name, part in model.named_parameters() if part.requires_grad] == trained
    assert trained


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_checkpointing_recomputes_the_same(use_reentrant: bool | None, use_dora: bool) -> None:
    gradients = []
    forwards = []
    for checkpointing in (False, True):
        model = quantized(torch.float32)
        options = None if use_reentrant is None else {"use_reentrant": use_reentrant}
        prepare_for_training(
            model,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=options if checkpointing else None,
        )
        add_lora(model, r=4, lora_dropout=0.1, use_dora=use_dora, seed=0)
        shake(model)
        calls: list[nn.Module] = []
        layer = model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        model.train()
        torch.manual_seed(5)
        model(tokens(), labels=tokens()).loss.backward()
        forwards.append(len(calls))
        gradients.append([part.grad for part in model.parameters() if part.requires_grad])
    assert forwards == [1, 2]
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    assert all(part.abs().sum() > 0 for part in gradients[0])


def test_a_few_steps_lower_the_loss() -> None:
    model = prepare_for_training(quantized(torch.float32))
    add_lora(model, r=8, lora_dropout=0.0, seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.fc = nn.Linear(16, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(self.embed(ids))
        return result


def test_plain_modules() -> None:
    model = Block()
    with pytest.warns(UserWarning, match="Block has no gradient_checkpointing_enable"):
        prepare_for_training(model)
    prepare_for_training(model, gradient_checkpointing=False)
    assert len(model.embed._forward_hooks) == 1
    assert not any(part.requires_grad for part in model.parameters())
    hidden = []
    model.fc.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    model(torch.arange(5))
    assert hidden[0].requires_grad


def test_modules_without_embeddings() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_for_training(model, gradient_checkpointing=False)
    assert not model[0].weight.requires_grad
