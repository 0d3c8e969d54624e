"""Train the base model that the examples and the tests use, from nothing but a Python installation.

    python examples/train_base_model/train.py

writes a Llama of 3.7 million parameters with its tokenizer to ``examples/base_model`` and the text
it never saw to ``examples/data/heldout.txt``. It takes some 20 minutes on two cores with AMX and
longer without. The run is seeded, but another Python version has other text and another processor
rounds differently, so the weights are not the same bytes everywhere.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from corpus import gather
from tokenizer import END, PAD, VOCABULARY, chat, train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[1]
CONTEXT = 512
TOKENS_PER_STEP = 4096
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
SAMPLE_PROMPTS = ("The import statement ", "Return a list of ")
SAMPLE_QUESTION = "What does shutil.copyfile do?"


def main() -> None:
    """Gather the text, train tokenizer and model, and save both."""
    parser = argparse.ArgumentParser(description="Train the examples' base model.")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "base_model")
    parser.add_argument("--heldout", type=Path, default=EXAMPLES / "data" / "heldout.txt")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    started = time.monotonic()

    corpus = gather()
    held_out = "\n\n".join(corpus.held_out) + "\n"
    options.heldout.parent.mkdir(parents=True, exist_ok=True)
    options.heldout.write_text(held_out, encoding="utf-8")

    tokenizer = train_tokenizer(corpus.train, CONTEXT)
    chats = [chat(tokenizer, question, answer) for question, answer in corpus.questions]
    shuffled = random.Random(options.seed)
    documents = [text + END for text in corpus.train]
    shuffled.shuffle(documents)
    shuffled.shuffle(chats)
    stream = encode(tokenizer, END + "".join(documents) + "".join(chats))
    validation = encode(tokenizer, END + held_out)
    characters = sum(map(len, corpus.train))
    print(f"text: {characters:,} characters and {len(chats):,} questions, {len(stream):,} tokens")

    model = LlamaForCausalLM(model_config(tokenizer))
    print(f"model: {model.num_parameters():,} parameters")
    train_loss = fit(model, stream, validation, options.steps, options.seed)

    model = model.to(torch.bfloat16).eval()
    held_out_loss = loss_on(model, validation)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(options.model)
    tokenizer.save_pretrained(options.model)
    record = {
        "parameters": model.num_parameters(),
        "steps": options.steps,
        "tokens_seen": options.steps * TOKENS_PER_STEP,
        "tokens_of_text": len(stream),
        "final_train_loss": round(train_loss, 4),
        "held_out_loss": round(held_out_loss, 4),
        "held_out_tokens": len(validation),
        "seed": options.seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "text_sha256": hashlib.sha256("".join(corpus.train).encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (options.model / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    for prompt in (*SAMPLE_PROMPTS, chat(tokenizer, SAMPLE_QUESTION)):
        print("---\n" + continuation(model, tokenizer, prompt))


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Return the token ids of ``text``, int64 [tokens]."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the model's shape: 3.67 million parameters, 3.15 million of them in linear layers.

    Grouped-query attention and a wider MLP give the linear layers four different shapes.
    """
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


def fit(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    validation: torch.Tensor,
    steps: int,
    seed: int,
) -> float:
    """Train ``model`` in place; return the mean training loss of the last 100 steps.

    Args:
        model: any causal language model, float32.
        stream: training tokens, int64 [tokens].
        validation: held-out tokens, int64 [tokens]; only printed, never used to choose.
        steps: number of steps of ``TOKENS_PER_STEP`` tokens.
        seed: of the order of the batches.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    source = batches(stream, seed)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        tokens = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 250 == 0 or step == steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(
                f"step {step}/{steps}  train {recent:.3f}  "
                f"held out {loss_on(model, validation):.3f}  "
                f"{step * TOKENS_PER_STEP / (time.monotonic() - started):,.0f} tokens/s",
                flush=True,
            )
    return sum(losses[-100:]) / len(losses[-100:])


def batches(stream: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of ``TOKENS_PER_STEP`` tokens without end, int64 [rows, length].

    Each pass cuts the stream at a new offset and shuffles the pieces. Every second batch has rows
    of the whole context and the others of half of it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = TOKENS_PER_STEP // CONTEXT
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        count = (len(stream) - offset) // CONTEXT
        pieces = stream[offset : offset + count * CONTEXT].view(count, CONTEXT)
        order = torch.randperm(count, generator=generator)
        for i, chosen in enumerate(order.split(rows)):
            if len(chosen) == rows:
                yield pieces[chosen].view(-1, CONTEXT if i % 2 else CONTEXT // 2)


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean loss in nats a token over ``tokens`` in windows of the whole context."""
    total, count = 0.0, 0
    for window in tokens.split(CONTEXT):
        if len(window) > 1:
            loss = model(window[None], labels=window[None]).loss.item()
            total += loss * (len(window) - 1)
            count += len(window) - 1
    if not math.isfinite(total):
        raise FloatingPointError("the loss is not finite; lower PEAK_LEARNING_RATE")
    return total / count


@torch.no_grad()
def continuation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int = 60
) -> str:
    """Return ``prompt`` with the model's most likely continuation."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0])


if __name__ == "__main__":
    main()
