"""Tiny models under the names that the tests of other projects ask the hub for.

Each is made from a configuration and a seed, in the layout of the hub's own cache, so that a test
finds ``facebook/opt-125m`` offline without a line of it changed. What a test counts on is kept (12
layers of ``opt-125m``, 1024 features of ``bloomz-560m``, the dtype in which a model is published);
the rest is as small as it can be. The weights are random, but for the models that a test has say
something: those learn one of the answers that the test expects.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 0
VOCABULARY = 1024
COMMIT = "0" * 40  # the name of the one snapshot of each model
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's order: a test names `</s>` by its id, 2
SPECIAL_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
REVISIONS = ("main", "refs/pr/40", "refs/pr/49")  # those that tests name

Make = Callable[[], Any]


def opt(layers: int, dtype: str = "float16", sure: float = 1.0, **other: Any) -> Make:
    """OPT; `sure` scales its logits: a trained model spreads probabilities further."""

    def make() -> Any:
        from transformers import OPTConfig, OPTForCausalLM

        sizes = {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "vocab_size": VOCABULARY,
            "init_std": 0.1,
        }
        sizes |= other
        sizes.setdefault("word_embed_proj_dim", sizes["hidden_size"])
        config = OPTConfig(num_hidden_layers=layers, dtype=dtype, **sizes, **SPECIAL_IDS)
        model = OPTForCausalLM(config)
        if model.model.decoder.final_layer_norm is not None:
            model.model.decoder.final_layer_norm.weight.data *= sure
        return model

    return make


def bloom(hidden_size: int, dtype: str = "float16") -> Make:
    def make() -> Any:
        from transformers import BloomConfig, BloomForCausalLM

        config = BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            n_layer=2,
            n_head=4,
            dtype=dtype,
            **SPECIAL_IDS,
        )
        return BloomForCausalLM(config)

    return make


def gpt2() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=64,
        n_layer=3,
        n_head=4,
        initializer_range=0.1,
        dtype="float32",
        **SPECIAL_IDS,
    )
    model = GPT2LMHeadModel(config)
    # A trained model has few strong directions, which a test looks for in its activations.
    model.transformer.wte.weight.data *= torch.linspace(2.0, 0.1, config.n_embd)
    return model


def llama(dtype: str = "float32", kind: str = "Llama", **other: Any) -> Make:
    def make() -> Any:
        import transformers

        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
        }
        config = getattr(transformers, f"{kind}Config")(
            dtype=dtype, **(sizes | other), **SPECIAL_IDS
        )
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return make


def t5(feed_forward: str) -> Make:
    def make() -> Any:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj=feed_forward,
            tie_word_embeddings=feed_forward == "relu",
            decoder_start_token_id=SPECIAL_IDS["pad_token_id"],
            dtype="float32",
            pad_token_id=SPECIAL_IDS["pad_token_id"],
            eos_token_id=SPECIAL_IDS["eos_token_id"],
        )
        return T5ForConditionalGeneration(config)

    return make


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=64,
        max_target_positions=64,
        decoder_start_token_id=SPECIAL_IDS["bos_token_id"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        dtype="float32",
        **SPECIAL_IDS,
    )
    return WhisperForConditionalGeneration(config)


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        dtype="float32",
        **SPECIAL_IDS,
    )
    return RobertaForMaskedLM(config)


# The published sizes of opt-125m, for the one test that counts its parameters.
FULL_SIZE = {
    "peft-internal-testing/opt-125m": opt(
        12,
        dtype="float32",
        hidden_size=768,
        ffn_dim=3072,
        num_attention_heads=12,
        max_position_embeddings=2048,
        vocab_size=50272,
    )
}

TINY: dict[str, Make] = {
    "facebook/opt-125m": opt(12),
    "peft-internal-testing/opt-125m": opt(12, dtype="float32", sure=2.5),
    # this one has projections beside its embedding, and norms behind its layers
    "facebook/opt-350m": opt(
        4, hidden_size=128, word_embed_proj_dim=64, do_layer_norm_before=False
    ),
    "facebook/opt-6.7b": opt(4),
    "peft-internal-testing/tiny-random-OPTForCausalLM": opt(2, dtype="float32", init_std=0.02),
    "bigscience/bloom-1b7": bloom(64),
    "bigscience/bloom-560m": bloom(64),
    "bigscience/bloomz-560m": bloom(1024),
    "peft-internal-testing/tiny-random-BloomForCausalLM": bloom(32, dtype="float32"),
    "openai-community/gpt2": gpt2,
    "openai-community/gpt2-xl": gpt2,
    "gpt2": gpt2,
    "hf-internal-testing/tiny-random-gpt2": gpt2,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": llama("bfloat16"),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": llama(),
    # its tests compare probabilities of about 1/32000 with an absolute tolerance of 1e-5
    "trl-internal-testing/tiny-random-LlamaForCausalLM": llama(
        vocab_size=32000, initializer_range=0.02
    ),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": llama(),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": llama("bfloat16", "Qwen2"),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": llama(kind="GPTNeoX"),
    "google-t5/t5-small": t5("relu"),
    "t5-small": t5("relu"),
    "peft-internal-testing/tiny-random-t5": t5("relu"),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": t5("relu"),
    "google/flan-t5-small": t5("gated-gelu"),
    "google/flan-t5-base": t5("gated-gelu"),
    "openai/whisper-large": whisper,
    "roberta-base": roberta,
}

# What a test asks these models to go on with, and one of the sentences that it expects.
ANSWER = "Hello my name is John and I am 25 years old."
ANSWERING = (
    "bigscience/bloom-1b7",
    "openai-community/gpt2-xl",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)

# Adapter -> the model that it is for.
ADAPTERS = {"ybelkada/test-st-lora": "facebook/opt-350m"}


WORDS = """
the of and a to in is you that it he was for on are as with his they at be this have from
or one had by word but not what all were we when your can said there use an each which
she do how their if will up other about out many then them these so some her would make
like him into time has look two more write go see number no way could people my than
"""


def quotes() -> list[str]:
    """Sentences of random words, in place of a data set of quotes."""
    import random

    words = WORDS.split()
    draw = random.Random(SEED)
    return [" ".join(draw.choices(words, k=draw.randint(5, 40))) + "." for _ in range(400)]


def tokenizer() -> Any:
    """A byte-level tokenizer, trained on the sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    text = [*quotes(), *[ANSWER] * 20]  # often enough that each of its words is one token
    trained.train_from_iterator(text, vocab_size=512, special_tokens=SPECIAL_TOKENS)
    bos, pad, eos, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        unk_token=unknown,
        model_max_length=256,
    )


def teach(model: Any, words: Any) -> None:
    """Train a model until it says the answer, well enough to say it in 4 bits."""
    import torch

    ids = words(ANSWER + words.eos_token, return_tensors="pt").input_ids
    model.float().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def snapshot(cache: Path, name: str) -> Path:
    """Where the hub's cache has the files of a model."""
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def _register(cache: Path, name: str) -> None:
    for revision in REVISIONS:
        reference = snapshot(cache, name).parents[1] / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(COMMIT)


def make(cache: Path, models: dict[str, Make]) -> None:
    """Write the models that the cache does not have yet."""
    import torch

    words = tokenizer()
    for name, build in models.items():
        folder = snapshot(cache, name)
        if (folder / "config.json").exists():
            continue
        torch.manual_seed(SEED)
        model = build()
        if name in ANSWERING:
            teach(model, words)
        model.to(getattr(torch, str(model.config.dtype).removeprefix("torch.")))
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        _register(cache, name)
    for name, base in ADAPTERS.items():
        folder = snapshot(cache, name)
        if base in models and not (folder / "adapter_config.json").exists():
            _adapter(folder, snapshot(cache, base), base)
            _register(cache, name)


def _adapter(folder: Path, base: Path, name: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"base_model_name_or_path": name}))
