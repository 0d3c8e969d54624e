"""What 4 bits cost on real trained weights: the shipped model on text it never saw."""

import json
import math

import pytest
import torch

import fourbit
from conftest import REPOSITORY

transformers = pytest.importorskip("transformers")
EXAMPLES = REPOSITORY / "examples"
BASE = EXAMPLES / "base_model"


def dense():
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BASE)


@torch.no_grad()
def perplexity(model, tokenizer):
    """Of the held-out text, in windows of 256 tokens."""
    text = (EXAMPLES / "data" / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // 256 * 256].reshape(-1, 256)
    losses = [model(input_ids=part, labels=part).loss.item() for part in windows.split(16)]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_of_the_codebooks(tokenizer):
    quantized = {
        name: perplexity(
            fourbit.quantize_model(dense(), codebook=book, double_quant=double), tokenizer
        )
        for name, book, double in (
            ("nf4", "nf4", False),
            ("nf4 + double", "nf4", True),
            ("fp4", "fp4", False),
            ("int4", "int4", False),
        )
    }
    base = perplexity(dense().bfloat16(), tokenizer)
    print({"bf16": base, **quantized})
    # The order of the paper's table 2.
    assert base < quantized["nf4"] < min(quantized["fp4"], quantized["int4"])
    assert quantized["nf4 + double"] == pytest.approx(quantized["nf4"], rel=0.005)


def ours(bits):
    return lambda params: fourbit.PagedAdamW(params, lr=1e-3, weight_decay=0.0, state_bits=bits)


def theirs(params):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


def train(model, tokenizer, make_optimizer, *, seed=1, steps=60):
    """The loss on all questions and answers after a LoRA fine-tune on them."""
    lines = (EXAMPLES / "data" / "faq.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in lines
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)

    def loss_of(rows):
        return model(
            input_ids=batch.input_ids[rows],
            attention_mask=batch.attention_mask[rows],
            labels=labels[rows],
        ).loss

    everything = torch.arange(len(texts))
    with torch.no_grad():
        before = loss_of(everything).item()
    fourbit.add_lora(model, r=64, lora_alpha=64, lora_dropout=0.0, seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained)
    model.train()
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss_of(torch.randperm(len(texts), generator=order)[:8]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = loss_of(everything).item()
    assert after < 0.5 * before, "it learns"
    return after


def test_qlora_reaches_the_loss_of_16_bit_lora(tokenizer):
    """Within 1% after the same steps with the same seed, as the paper finds.

    The rank is the paper's, and the loss that of the whole set: a mean over the last few batches
    of eight wanders by 2% from one run to the next.
    """
    lora = train(dense(), tokenizer, ours(32))
    qlora = train(fourbit.quantize_model(dense()), tokenizer, ours(32))
    print({"16-bit LoRA": lora, "QLoRA": qlora})
    assert qlora <= 1.01 * lora


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 3))])
def test_8_bit_state_reaches_the_loss_of_torch(seed, tokenizer, threads):
    """Within 1%, in QLoRA fine-tunes all of whose moments are in 8 bits.

    The three seeds came within 0.04% when this was written, and 32-bit state within 1e-6.
    """
    # Several would wait for each other at every one of the small layers.
    threads(1)
    made = []

    def eight_bits(params):
        made.append(ours(8)(params))
        return made[0]

    expected = train(fourbit.quantize_model(dense()), tokenizer, theirs, seed=seed)
    loss = train(fourbit.quantize_model(dense()), tokenizer, eight_bits, seed=seed)
    print({"torch": expected, "8 bits": loss})
    assert {state["exp_avg"].dtype for state in made[0].state.values()} == {torch.uint8}
    assert loss == pytest.approx(expected, rel=0.01)
