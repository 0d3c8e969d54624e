"""What 4 bits cost on real trained weights: the shipped model on text it never saw."""

import json
import math

import pytest
import torch

import fourbit
from conftest import REPOSITORY
from fourbit.experts import experts_modules
from fourbit.lora import LoraExperts, lora_modules

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


def train(model, tokenizer, make_optimizer, *, seed=1, steps=60, r=64, learns=0.5):
    """The loss on all questions and answers after a LoRA fine-tune on them.

    It falls below `learns` times what it was, or nothing was learned.
    """
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
    # The adapter starts at zero.
    fourbit.add_lora(model, r=r, lora_alpha=r, lora_dropout=0.0, seed=seed)
    with torch.no_grad():
        before = loss_of(everything).item()
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
    assert after < learns * before, "it learns"
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


def mixture():
    """The shipped model with its MLPs as mixtures of four experts, each of them a little different.

    A Mixtral (of two experts a token) whose experts were all the same would be the shipped model.
    """
    base = dense()
    settings = {
        name: getattr(base.config, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            *("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "pad_token_id"),
        )
    }
    config = transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **settings)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    plain = {name: weight for name, weight in base.state_dict().items() if ".mlp." not in name}
    assert not model.load_state_dict(plain, strict=False).unexpected_keys
    for layer, of_base in zip(model.model.layers, base.model.layers, strict=True):
        mlp = of_base.mlp
        for parameter, weight in (
            (layer.mlp.experts.gate_up_proj, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
            (layer.mlp.experts.down_proj, mlp.down_proj.weight),
        ):
            parameter.data = weight.data + 0.1 * weight.data.std() * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize(
    ("seed", "steps"),
    [(1, 8), *(pytest.param(seed, 40, marks=pytest.mark.slow) for seed in (1, 2, 3))],
)
def test_qlora_of_a_mixture_of_experts_reaches_the_loss_of_16_bit_lora(seed, steps, tokenizer):
    """Within 1%, experts included, after the same steps with the same seed.

    The three seeds came within 0.2% when this was written.
    """
    options = {"seed": seed, "steps": steps, "r": 16, "learns": 0.6 if steps == 40 else 0.97}
    lora = train(mixture(), tokenizer, ours(32), **options)
    model = fourbit.quantize_model(mixture())
    assert len(experts_modules(model)) == 4
    qlora = train(model, tokenizer, ours(32), **options)
    assert sum(isinstance(layer, LoraExperts) for layer in lora_modules(model).values()) == 4
    print({"seed": seed, "steps": steps, "16-bit LoRA": lora, "QLoRA": qlora})
    assert qlora <= 1.01 * lora
