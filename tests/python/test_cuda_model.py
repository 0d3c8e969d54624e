"""A whole model on a GPU, against the same one on the CPU. How to run: see ``on_card.py``."""

import copy

import pytest
import torch
from torch import nn

import fourbit
from lora_models import llama, logits, relative, shake, tokens
from on_card import CARD, assert_same_bytes, assert_same_parts

pytestmark = pytest.mark.cuda

# Of the norm of the logits, after two blocks: sums of float32 and its functions in another order;
# with bfloat16, some tens of roundings of 2^-9 each. A wrong weight shows as 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def pair(dtype):
    """The same model, quantized on the CPU and on the card."""
    on_cpu = llama(dtype)
    on_card = copy.deepcopy(on_cpu).to(CARD)
    return fourbit.quantize_model(on_cpu), fourbit.quantize_model(on_card)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_model_of_the_cpu(dtype):
    on_cpu, on_card = pair(dtype)
    layers = 0
    for name, module in on_cpu.named_modules():
        if isinstance(module, fourbit.Linear4bit):
            assert_same_parts(on_card.get_submodule(name).quantized(), module.quantized())
            layers += 1
    assert layers == 14
    expected = logits(on_cpu)
    assert relative(logits(on_card, tokens().to(CARD)).cpu(), expected) <= TOLERANCE[dtype]
    # What was quantized on the CPU may be moved, and comes back as it was.
    moved = copy.deepcopy(on_cpu).to(CARD)
    assert torch.equal(logits(moved, tokens().to(CARD)), logits(on_card, tokens().to(CARD)))
    back = moved.to("cpu")
    for (name, part), (_, twin) in zip(back.named_parameters(), on_cpu.named_parameters()):  # noqa: B905
        assert torch.equal(part, twin), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_of_adapters_are_those_of_the_cpu(dtype):
    gradients = []
    for model in pair(dtype):
        device = model.lm_head.weight.device
        fourbit.add_lora(model, r=4, lora_dropout=0.0, seed=0)
        fourbit.prepare_for_training(model)
        shake(model)
        model.train()
        ids = tokens().to(device)
        model(ids, labels=ids).loss.backward()
        gradients.append(
            {name: part.grad.cpu() for name, part in model.named_parameters() if part.requires_grad}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert expected.norm() > 0
        # Twice the way of the logits: forward, and back.
        assert relative(gradients[1][name], expected) <= 4 * TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_lowers_the_loss(dtype):
    _, model = pair(dtype)
    fourbit.prepare_for_training(model)
    fourbit.add_lora(model, r=8, lora_dropout=0.0, seed=0).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = fourbit.PagedAdamW(trained, lr=1e-2)
    ids, losses = tokens().to(CARD), []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.skipped_updates == 0
    for name, part in model.named_parameters():
        if name in frozen:
            assert torch.equal(part, frozen[name]), name


def test_folders_do_not_tell_where_the_model_was(tmp_path):
    on_cpu, on_card = pair(torch.bfloat16)
    fourbit.save(on_cpu, tmp_path / "cpu")
    fourbit.save(on_card, tmp_path / "card")
    names = sorted(path.name for path in (tmp_path / "cpu").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "card").iterdir())
    assert any(name.endswith(".safetensors") for name in names)
    for name in names:
        written = (tmp_path / "card" / name).read_bytes()
        assert written == (tmp_path / "cpu" / name).read_bytes(), name
    loaded = fourbit.load(llama(torch.bfloat16, seed=1), tmp_path / "card")
    assert torch.equal(logits(loaded), logits(on_cpu))
    there = fourbit.load(llama(torch.bfloat16, seed=1).to(CARD), tmp_path / "cpu")
    for name, part in there.named_parameters():
        assert_same_bytes(part, loaded.get_parameter(name))
    assert torch.equal(logits(there, tokens().to(CARD)), logits(on_card, tokens().to(CARD)))


class Plain(nn.Module):
    """Without transformers: two layers, and a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(96, 256)
        self.down = nn.Linear(256, 96)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_model_with_autocast_and_checkpointing(checkpointing):
    model = fourbit.quantize_model(Plain().to(CARD))
    fourbit.add_lora(model, r=8, lora_dropout=0.0, seed=0)
    optimizer = fourbit.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 96, generator=generator).to(CARD)
    target = torch.randn(128, 96, generator=generator).to(CARD)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            if checkpointing:
                output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            else:
                output = model(x)
            loss = torch.nn.functional.mse_loss(output.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
