"""`generate`: the same tokens as transformers' own call, streamed, seeded, and ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fourbit
from fourbit.generation import load_for_generation


@pytest.fixture(scope="module")
def loaded(four_bit_folder: Path) -> tuple[Any, Any]:
    return load_for_generation(four_bit_folder)


def test_greedy_text_is_that_of_transformers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer("The import statement", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert (
        fourbit.generate(model, tokenizer, "The import statement", max_new_tokens=12, chat=False)
        == text
    )


def test_a_question_goes_through_the_chat_template(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    answers = {
        fourbit.generate(model, tokenizer, prompt, max_new_tokens=8, chat=chat)
        for prompt, chat in (
            ("What?", None),
            ("What?", True),
            ([{"role": "user", "content": "What?"}], None),
            ("<|user|>What?<|assistant|>", False),
        )
    }
    assert len(answers) == 1


def test_pieces_add_up_and_seeds_repeat(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 20}
    pieces: list[str] = []
    state = torch.get_rng_state()
    one = fourbit.generate(model, tokenizer, "What?", seed=1, stream=pieces.append, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert "".join(pieces) == one
    assert len(pieces) > 1
    assert fourbit.generate(model, tokenizer, "What?", seed=1, **options) == one
    assert fourbit.generate(model, tokenizer, "What?", seed=2, **options) != one


def test_an_answer_ends_at_the_end_token(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer("<|user|>What?<|assistant|>", return_tensors="pt").input_ids
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    # A token in the middle becomes one more of the model's ends.
    end = int(tokens[3])
    first = tokens.tolist().index(end)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [before, end]
    try:
        answer = fourbit.generate(model, tokenizer, "What?", max_new_tokens=9)
    finally:
        model.generation_config.eos_token_id = before
    assert answer == tokenizer.decode(tokens[: first + 1], skip_special_tokens=True)
    assert answer != tokenizer.decode(tokens, skip_special_tokens=True)


def test_training_mode_comes_back(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.train()
    fourbit.generate(model, tokenizer, "What?", max_new_tokens=1)
    assert model.training
    model.eval()


def test_an_adapter_brings_its_tokenizer(
    loaded: tuple[Any, Any], four_bit_folder: Path, tmp_path: Path
) -> None:
    model = fourbit.add_lora(fourbit.from_pretrained(four_bit_folder), r=2, lora_dropout=0.0)
    for layer in fourbit.lora.lora_modules(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(0))
    fourbit.save_adapter(model, tmp_path)
    tuned, tokenizer = load_for_generation(four_bit_folder, adapter=tmp_path)
    assert not any(parameter.requires_grad for parameter in tuned.parameters())
    question = "What?"
    assert fourbit.generate(tuned, tokenizer, question, max_new_tokens=8) != fourbit.generate(
        *loaded, question, max_new_tokens=8
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    _, own = load_for_generation(four_bit_folder, adapter=tmp_path)
    assert own.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ("", {}, "the prompt is empty"),
        (" \n", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ("x\udcff", {}, "the prompt is not UTF-8 text"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"temperature": -1.0}, r"temperature is -1\.0"),
        ("a", {"temperature": float("nan")}, "temperature is nan"),
        ("a", {"top_p": 0.0}, r"top_p is 0\.0"),
    ],
)
def test_bad_calls(
    loaded: tuple[Any, Any], prompt: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        fourbit.generate(*loaded, prompt, **options)


def test_a_chat_needs_a_template(loaded: tuple[Any, Any], four_bit_folder: Path) -> None:
    model, _ = loaded
    tokenizer = transformers.AutoTokenizer.from_pretrained(four_bit_folder)
    tokenizer.chat_template = None
    assert isinstance(fourbit.generate(model, tokenizer, "a", max_new_tokens=1), str)
    with pytest.raises(ValueError, match="no chat template"):
        fourbit.generate(model, tokenizer, "a", chat=True)
