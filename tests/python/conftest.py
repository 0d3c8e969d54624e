"""What all tests share."""

import os

# No test may reach for a hub; set before transformers is imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from functools import cache
from pathlib import Path

import pytest
import torch

from fourbit import _core

REPOSITORY = Path(__file__).resolve().parents[2]


@cache
def no_card() -> str | None:
    """What tests marked ``cuda`` lack on this machine; None where they can run."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(0)
    oldest = _core.OLDEST_CAPABILITY
    if 10 * major + minor < oldest:
        name, needed = torch.cuda.get_device_name(0), f"{oldest // 10}.{oldest % 10}"
        return f"{name} has compute capability {major}.{minor}, and the kernels need {needed}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``cuda`` with the reason, before any fixture of theirs looks for a card."""
    if item.get_closest_marker("cuda") is not None and (reason := no_card()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _card_is_done(request):
    """What a test's kernels do wrong is reported by that test, and not by a later one."""
    yield
    if request.node.get_closest_marker("cuda") is not None:
        torch.cuda.synchronize()


@pytest.fixture(params=[pytest.param("card", marks=pytest.mark.cuda), "emulated"])
def place(request, monkeypatch):
    """Where a paged optimizer is tested: on the card, and on the recording card."""
    import emulate
    from places import Place

    if request.param == "emulated":
        if emulate.unavailable():
            pytest.skip(emulate.unavailable())
    elif "unified" in request.node.callspec.params.values() and not _core.card_can_page(0):
        pytest.skip("the card and the processor share no memory")
    found = Place(request.param, monkeypatch)
    yield found
    if found.fake is not None:
        found.fake.finish()


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


@pytest.fixture
def scipy(monkeypatch):
    """PEFT makes no configuration of LoftQ without scipy, which ours does not use."""
    import importlib.util

    find_spec = importlib.util.find_spec
    found = find_spec("json")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: found if name == "scipy" else find_spec(name, *a),
    )


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
