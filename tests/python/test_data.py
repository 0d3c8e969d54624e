"""Training data: what is read, and one sentence for each way in which it can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from fourbit.data import (
    DataError,
    check_template,
    check_tokens,
    load_training_data,
    resolve_loss,
)

CHAT = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
PROMPT = {"prompt": "a?", "completion": "b"}
TEXT = {"text": "a b c"}


class Tokenizer:
    """What the checks ask a tokenizer for."""

    eos_token: str | None = "<end>"
    eos_token_id: int | None = 2
    pad_token_id: int | None = 2
    chat_template: Any = "{% generation %}{{ messages }}{% endgeneration %}"

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return str(messages)

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"t{token}"


def written(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*examples: Any) -> str:
    return "".join(json.dumps(example) + "\n" for example in examples)


@pytest.mark.parametrize(
    ("example", "kind", "fields"),
    [
        (CHAT, "messages", ["messages"]),
        (PROMPT, "prompt", ["prompt", "completion"]),
        (TEXT, "text", ["text"]),
        (
            {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
            "prompt",
            ["prompt", "completion"],
        ),
    ],
)
def test_kinds(tmp_path: Path, example: dict[str, Any], kind: str, fields: list[str]) -> None:
    source = written(tmp_path, lines({**example, "id": 7}, example))
    data = load_training_data(source)
    assert (data.kind, len(data), data.left_out) == (kind, 2, 0)
    assert data.dataset.column_names == fields
    assert data.conversational == (kind == "messages" or isinstance(example.get("prompt"), list))
    assert data.dataset[0] == example


def test_array_blank_lines_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    array = written(tmp_path, json.dumps([TEXT, {"text": "d"}], indent=1), "data.json")
    marked = written(tmp_path, b"\xef\xbb\xbf" + b"\n" + lines(TEXT, {"text": "d"}).encode())
    assert load_training_data(array).dataset["text"][:] == ["a b c", "d"]
    assert load_training_data(marked).fingerprint == load_training_data(array).fingerprint


def test_line_separators_inside_strings_are_text(tmp_path: Path) -> None:
    source = written(tmp_path, '{"text": "a\u2028b\u0085c"}\n')
    assert load_training_data(source).dataset[0]["text"] == "a\u2028b\u0085c"


def test_examples_in_memory_and_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([{**TEXT, "id": 1}, {"text": " ", "id": 2}])
    data = load_training_data(dataset)
    assert (len(data), data.left_out, data.dataset.column_names) == (1, 1, ["text"])
    assert load_training_data([TEXT]).fingerprint == data.fingerprint
    dataset.save_to_disk(tmp_path / "saved")
    assert load_training_data(tmp_path / "saved").fingerprint == data.fingerprint


def test_datasets_id_with_split(tmp_path: Path) -> None:
    """A folder is an id that `datasets` can load without a network."""
    folder = tmp_path / "repository"
    folder.mkdir()
    written(folder, lines(PROMPT), "train.jsonl")
    written(folder, lines(PROMPT, {"prompt": "c", "completion": "d"}), "test.jsonl")
    assert len(load_training_data(folder)) == 1
    assert len(load_training_data(f"{folder}:test")) == 2


def test_fingerprint_knows_order_and_content() -> None:
    one, two = {"text": "a"}, {"text": "b"}
    assert len({load_training_data(x).fingerprint for x in ([one, two], [two, one], [one])}) == 3


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", r"data.jsonl is empty"),
        (" \n\n", r"data.jsonl is empty"),
        (b"\x80\x81", r"data.jsonl is not UTF-8 text \(byte 0\)"),
        (lines(TEXT) + "{broken", r"data.jsonl, line 2: not valid JSON"),
        ('[{"text": "a"},\n oops]', r"data.jsonl, line 2: not valid JSON"),
        (lines(TEXT) + '{"text": ' + "1" * 5000 + "}", r"line 2: a number has too many digits"),
        (lines(TEXT) + '{"a":' * 200_000, r"data.jsonl, line 2: it is nested too deep"),
        ("[" * 200_000, r"data.jsonl: it is nested too deep"),
        (lines(TEXT, {"text": "a \ud83d b"}), r"line 2 has \\ud83d, half of a character"),
        ("[]", r"data.jsonl holds no example"),
        (lines(TEXT, "words"), r"data.jsonl, line 2: an example is a JSON object, not a string"),
        (lines(TEXT, {"body": "x"}), r"line 2 has none of `messages`.*\(it has body\)"),
        (lines({**TEXT, **PROMPT}), r"line 1 has .*`prompt`.*`text` at once"),
        (lines({"prompt": "a"}), r"line 1 has a `prompt` but no `completion`"),
        (lines({"prompt": None, "completion": "a"}), r"has a `completion` but no `prompt`"),
        (lines(TEXT, TEXT, CHAT), r"line 3 is `messages`, but line 1 is `text`; a file holds one"),
        (lines({"text": 5}), r"line 1: `text` is a number, not a string"),
        (lines({"prompt": "a", "completion": 5}), r"line 1: `completion` is a number, but"),
        (lines({"prompt": 5, "completion": "a"}), r"line 1: `prompt` is a number, not a list"),
        (lines({"messages": []}), r"line 1: `messages` is empty, not a list of messages"),
        (lines({"messages": "hi"}), r"line 1: `messages` is a string, not a list of messages"),
        (lines({"messages": [{"content": "x"}]}), r"line 1: `messages\[0\]` is not {\"role\""),
        (
            lines({"messages": [{"role": "user", "content": 5}]}),
            r"line 1: `messages\[0\].content` is a number, not a string",
        ),
        (lines({"text": " "}, {"text": ""}), r"no usable example: every text is empty"),
        (lines({"prompt": "a", "completion": ""}), r"no usable example: every completion is empty"),
        (
            lines({"messages": CHAT["messages"][:1]}),
            r"no usable example: none has an assistant's message",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: str | bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        load_training_data(written(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_is_not_looked_for_on_a_hub() -> None:
    with pytest.raises(DataError, match=r"there is no data file nothing/here\.jsonl"):
        load_training_data("nothing/here.jsonl")


def test_an_unknown_datasets_id_is_named() -> None:
    with pytest.raises(DataError, match=r"no file nobody/nothing, and datasets cannot load"):
        load_training_data("nobody/nothing")


def test_empty_examples_are_left_out_and_counted(tmp_path: Path) -> None:
    data = load_training_data(written(tmp_path, lines(TEXT, {"text": "\n"})))
    assert (len(data), data.left_out) == (1, 1)
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    counts = check_tokens([row], data, Tokenizer(), embedding_rows=3, max_length=9)
    assert counts.notes == ("1 of 2 examples are empty: left out",)
    data = load_training_data([CHAT, {"messages": CHAT["messages"][:1]}])
    counts = check_tokens([row], data, Tokenizer(), embedding_rows=3, max_length=9)
    assert counts.notes == ("1 of 2 examples have no assistant's answer: left out",)


def choose(example: dict[str, Any], tokenizer: Tokenizer, **choices: bool | None) -> str:
    data = load_training_data([example])
    return resolve_loss(data, tokenizer, tokenizer_name="base/", **choices)


def test_what_is_learned() -> None:
    plain = Tokenizer()
    plain.chat_template = "{{ messages }}"
    assert choose(TEXT, plain) == "all"
    assert choose(PROMPT, plain) == "completion"
    assert choose(PROMPT, plain, completion_only=False) == "all"
    assert choose(CHAT, Tokenizer()) == "assistant"
    assert choose(CHAT, Tokenizer(), assistant_only=False) == "all"
    assert choose(CHAT, plain) == "all"
    with pytest.raises(DataError, match="template of the tokenizer in base/ does not mark"):
        choose(CHAT, plain, assistant_only=True)


def test_templates_that_trl_knows_are_marked() -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    known = Tokenizer()
    known.chat_template = qwen2_5_chat_template
    assert "generation %}" not in qwen2_5_chat_template
    assert choose(CHAT, known) == "assistant"
    assert choose(CHAT, known, assistant_only=False) == "all"


def test_an_example_that_the_template_refuses_is_named() -> None:
    class Strict(Tokenizer):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            if messages[0]["role"] == "system":
                raise ValueError("no\nsystem")
            return ""

    odd = {"messages": [{"role": "system", "content": "x"}, *CHAT["messages"]]}
    check_template(load_training_data([CHAT]), Strict(), tokenizer_name="base/")
    check_template(load_training_data([TEXT]), Strict(), tokenizer_name="base/")
    sentence = r"the data, example 2: the chat template .* in base/ cannot render it: no system$"
    with pytest.raises(DataError, match=sentence):
        check_template(load_training_data([CHAT, odd]), Strict(), tokenizer_name="base/")


def test_tables_are_sent_to_datasets(tmp_path: Path) -> None:
    table = written(tmp_path, "text\none\ntwo\n", "data.csv")
    with pytest.raises(DataError, match=r"data\.csv is not JSON Lines; put it into a folder"):
        load_training_data(table)
    assert load_training_data(tmp_path).dataset["text"][:] == ["one", "two"]


@pytest.mark.parametrize(
    ("example", "change", "choices", "sentence"),
    [
        (TEXT, {"eos_token_id": None}, {}, "tokenizer in base/ has no end token"),
        (CHAT, {"chat_template": None}, {}, "base/ has no chat template; give one with"),
        (TEXT, {}, {"assistant_only": True}, "--assistant-only is for messages"),
        (CHAT, {}, {"completion_only": True}, "--completion-only is for `prompt`"),
    ],
)
def test_bad_tokenizers_and_choices(
    example: dict[str, Any], change: dict[str, Any], choices: dict[str, bool], sentence: str
) -> None:
    tokenizer = Tokenizer()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(DataError, match=re.escape(sentence)):
        choose(example, tokenizer, **choices)


def check(rows: list[dict[str, Any]], **options: Any) -> Any:
    data = load_training_data([TEXT] * 3)
    settings = {"embedding_rows": 10, "max_length": 4, **options}
    return check_tokens(rows, data, Tokenizer(), **settings)


def test_tokens_are_counted() -> None:
    rows = [
        {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
        # A first label has nothing before it, and does not count.
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]},
    ]
    counts = check(rows)
    assert (counts.examples, counts.tokens, counts.learned) == (2, 7, 5)
    assert counts.notes == (
        "1 of 3 examples have nothing to learn within --max-length 4: left out",
        "1 of 2 examples reach --max-length 4: cut there",
    )


def test_no_token_to_learn_is_refused() -> None:
    with pytest.raises(DataError, match="no token is left to learn from"):
        check([{"input_ids": [5, 6], "labels": [-100, -100]}])
    with pytest.raises(DataError, match="no token is left to learn from"):
        check([])


def test_a_token_without_embedding_is_refused() -> None:
    with pytest.raises(DataError, match=r"token 10 \('t10'\) has no row .* embedding of 10"):
        check([{"input_ids": [5, 10], "labels": [5, 10]}])


def test_sequences_beyond_the_model_are_noted() -> None:
    rows = [{"input_ids": [5, 6, 7, 2], "labels": [5, 6, 7, 2]}] * 3
    assert check(rows, max_length=9, context=4).notes == ()
    assert check(rows, max_length=9, context=3).notes == (
        "the longest sequence has 4 tokens, but the model was made for 3: --max-length 3 cuts "
        "there",
    )


def test_an_end_token_that_is_never_learned_is_noted() -> None:
    row = {"input_ids": [5, 6], "labels": [5, 6]}
    notes = check([row] * 3).notes
    assert any("no example teaches the end token '<end>'" in note for note in notes)
