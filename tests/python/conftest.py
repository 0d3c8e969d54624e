"""What all tests share."""

import os

# No test may reach for a hub; set before transformers is imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(20231105)


@pytest.fixture
def threads():
    """Set torch's thread count, and put it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory):
    """A random Llama of two blocks in bfloat16, with the tokenizer of the model that ships."""
    import transformers

    folder = tmp_path_factory.mktemp("models") / "plain"
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        # With tied or with small weights it would say one token for ever.
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    base = REPOSITORY / "examples" / "base_model"
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def four_bit_folder(plain_folder):
    """The same model converted."""
    from fourbit import convert

    folder = plain_folder.with_name("four-bit")
    convert(plain_folder, folder)
    return folder
