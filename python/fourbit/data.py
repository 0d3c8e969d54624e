"""Training data: read it, check it, and say in one sentence what is wrong before training starts.

Three kinds of example are known, as TRL names their fields (one kind a file):

===================  =====================================================  =======================
kind                 fields                                                 the model learns
===================  =====================================================  =======================
``messages``         ``messages``: [{"role": ..., "content": ...}, ...]     the assistant's turns
``prompt``           ``prompt`` and ``completion``: texts, or messages      the completion
``text``             ``text``                                               all of it
===================  =====================================================  =======================
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["messages", "prompt", "text"]
LossOn = Literal["assistant", "completion", "all"]

_FIELDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
# What chat templates read beside the messages.
_EXTRA_FIELDS = ("tools", "chat_template_kwargs")
_FILE_SUFFIXES = {".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv", ".parquet", ".gz", ".arrow"}
_TABLE_SUFFIXES = {".csv", ".tsv", ".parquet", ".arrow"}
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class DataError(ValueError):
    """Training data, or a tokenizer, that cannot be trained with; the message says what to do."""


@dataclass(frozen=True)
class TrainingData:
    """Examples that passed the checks.

    Attributes:
        source: the file, folder or datasets id they came from, for messages.
        kind: which of the three kinds they are.
        conversational: whether they are lists of messages, which need a chat template.
        dataset: a ``datasets.Dataset`` with the fields of `kind` only.
        left_out: how many examples were empty, and so left out.
        fingerprint: SHA-256 of the examples in order, to know them again.
    """

    source: str
    kind: Kind
    conversational: bool
    dataset: Any
    left_out: int
    fingerprint: str

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.dataset)


def load_training_data(source: str | Path | Iterable[Mapping[str, Any]]) -> TrainingData:
    """Read training data and check every example.

    Args:
        source: a JSONL file, a JSON file that holds an array, a datasets id (``name`` or
            ``name:split``; the split is "train" by default), a folder that ``datasets`` reads, or
            the examples themselves: dictionaries, or a ``datasets.Dataset``.

    Raises:
        DataError: in one sentence, naming the file and the line or example: a missing or empty
            file, a bad line, an example of no kind or of another kind than the first, or no
            example with anything to learn from.
    """
    import datasets

    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, "the dataset")
    if not isinstance(source, str | Path):
        rows = ((f"example {index + 1}", row) for index, row in enumerate(source))
        return _from_rows(rows, "the data")
    path = Path(source).expanduser()
    if path.is_file():
        return _from_rows(_read_file(path), str(source))
    return _from_dataset(_load_with_datasets(str(source), path), str(source))


def _from_rows(rows: Iterator[tuple[str, Any]], source: str) -> TrainingData:
    import datasets

    checker = _Checker(source)
    examples = [example for where, row in rows if (example := checker.check(where, row))]
    kind, conversational = checker.finish()
    try:
        dataset = datasets.Dataset.from_list(examples)
    except Exception as error:  # pyarrow's own hierarchy: a field with two types
        raise DataError(
            f"{source}: a field has different types in different examples ({error})"
        ) from error
    return TrainingData(
        source, kind, conversational, dataset, checker.left_out, checker.hash.hexdigest()
    )


def _from_dataset(dataset: Any, source: str) -> TrainingData:
    """The same checks without holding the examples in memory."""
    checker = _Checker(source)
    used = [
        index
        for index, row in enumerate(dataset)
        if checker.check(f"example {index + 1}", row) is not None
    ]
    kind, conversational = checker.finish()
    wanted = [name for name in (*_FIELDS[kind], *_EXTRA_FIELDS) if name in dataset.column_names]
    dataset = dataset.select_columns(wanted)
    if checker.left_out:
        dataset = dataset.select(used)
    return TrainingData(
        source, kind, conversational, dataset, checker.left_out, checker.hash.hexdigest()
    )


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a JSONL file or of a JSON array, each with where it stands."""
    if path.suffix.lower() in _TABLE_SUFFIXES:
        raise DataError(
            f"{path} is not JSON Lines; put it into a folder of its own and give that folder: "
            "datasets reads it"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): training data is JSON Lines, "
            "one example a line"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {_beyond_limits(error)}") from error
        for index, record in enumerate(records):
            yield f"example {index + 1}", record
        return
    # Not splitlines(): it also splits at U+2028, which JSON strings may hold as it is.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {_beyond_limits(error)}") from error


def _beyond_limits(error: ValueError | RecursionError) -> str:
    """What Python's reader will not take although JSON has no limit."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return "a number has too many digits"


def _load_with_datasets(source: str, path: Path) -> Any:
    import datasets

    name, split = source, "train"
    if not path.exists() and ":" in source:
        name, split = source.rsplit(":", 1)
    local = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~")) or local.suffix.lower() in _FILE_SUFFIXES
    if is_path and not local.exists():
        raise DataError(f"there is no data file {name}")
    try:
        if (local / "dataset_info.json").is_file() and (local / "state.json").is_file():
            return datasets.load_from_disk(str(local))
        return datasets.load_dataset(str(local) if local.is_dir() else name, split=split)
    except Exception as error:  # datasets has no common base for what can go wrong here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"there is no file {source}, and datasets cannot load {name!r} (split {split!r}): "
            f"{reason}"
        ) from error


class _Checker:
    """Checks examples one by one and keeps what they have in common."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.first: tuple[Kind, bool, str] | None = None
        self.seen = 0
        self.left_out = 0
        self.hash = hashlib.sha256()

    def check(self, where: str, record: Any) -> dict[str, Any] | None:
        """The fields that matter, or None for an example without anything to learn from."""
        self.seen += 1
        if not isinstance(record, Mapping):
            raise self._error(where, f"an example is a JSON object, not {_json_type(record)}")
        kind = self._kind(where, record)
        conversational = kind == "messages" or (
            kind == "prompt" and not isinstance(record["prompt"], str)
        )
        if self.first is None:
            self.first = (kind, conversational, where)
        elif self.first[:2] != (kind, conversational):
            raise self._error(
                where,
                f"{_describe(kind, conversational)}, but {self.first[2]} is "
                f"{_describe(*self.first[:2])}; a file holds one kind",
                verb="is",
            )
        usable = self._usable(where, kind, conversational, record)
        if not usable:
            self.left_out += 1
            return None
        example = {
            name: record[name]
            for name in (*_FIELDS[kind], *_EXTRA_FIELDS)
            if record.get(name) is not None
        }
        canonical = json.dumps(example, sort_keys=True, ensure_ascii=False, default=str)
        try:
            self.hash.update(canonical.encode() + b"\n")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(canonical[error.start]):04x}"
            raise self._error(
                where, f"{half}, half of a character without its other half", verb="has"
            ) from error
        return example

    def finish(self) -> tuple[Kind, bool]:
        """Kind and shape of the examples.

        Raises:
            DataError: if there was none to learn from.
        """
        if self.first is None:
            raise DataError(f"{self.source} holds no example")
        if self.left_out == self.seen:
            what = {
                "messages": "none has an assistant's message with text",
                "prompt": "every completion is empty",
                "text": "every text is empty",
            }[self.first[0]]
            raise DataError(f"{self.source} has no usable example: {what}")
        return self.first[0], self.first[1]

    def _kind(self, where: str, record: Mapping[str, Any]) -> Kind:
        present = {name for name, value in record.items() if value is not None}
        kinds: list[Kind] = [kind for kind, names in _FIELDS.items() if present.issuperset(names)]
        if len(kinds) == 1:
            return kinds[0]
        if kinds:
            names = " and ".join(f"`{name}`" for kind in kinds for name in _FIELDS[kind])
            raise self._error(where, f"{names} at once; keep one kind", verb="has")
        if "prompt" in present or "completion" in present:
            has, lacks = (
                ("prompt", "completion") if "prompt" in present else ("completion", "prompt")
            )
            raise self._error(where, f"a `{has}` but no `{lacks}`", verb="has")
        found = ", ".join(sorted(map(str, record))) or "nothing"
        raise self._error(
            where,
            f"none of `messages`, `prompt` with `completion`, or `text` (it has {found})",
            verb="has",
        )

    def _usable(
        self, where: str, kind: Kind, conversational: bool, record: Mapping[str, Any]
    ) -> bool:
        if kind == "text":
            if not isinstance(record["text"], str):
                found = _json_type(record["text"])
                raise self._error(where, f"`text` is {found}, not a string")
            return bool(record["text"].strip())
        if kind == "messages":
            return self._answers(where, "messages", record["messages"])
        if conversational:
            self._answers(where, "prompt", record["prompt"])
            return self._answers(where, "completion", record["completion"])
        if not isinstance(record["completion"], str):
            found = _json_type(record["completion"])
            raise self._error(where, f"`completion` is {found}, but `prompt` is a string")
        return bool(record["completion"].strip())

    def _answers(self, where: str, field: str, messages: Any) -> bool:
        """Whether a list of messages holds an assistant's; refuses anything else."""
        if not isinstance(messages, list) or not messages:
            found = "empty" if messages == [] else _json_type(messages)
            raise self._error(where, f"`{field}` is {found}, not a list of messages")
        answers = False
        for index, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str):
                raise self._error(
                    where, f'`{field}[{index}]` is not {{"role": ..., "content": ...}}'
                )
            content, calls = message.get("content"), message.get("tool_calls")
            if not isinstance(content, str) and not (content is None and calls):
                found = _json_type(content)
                raise self._error(where, f"`{field}[{index}].content` is {found}, not a string")
            if role == "assistant" and (calls or (content or "").strip()):
                answers = True
        return answers

    def _error(self, where: str, problem: str, verb: str | None = None) -> DataError:
        joint = f" {verb} " if verb else ": "
        return DataError(f"{self.source}, {where}{joint}{problem}")


def _describe(kind: Kind, conversational: bool) -> str:
    if kind == "prompt":
        return "`prompt`/`completion` of messages" if conversational else "`prompt`/`completion`"
    return f"`{kind}`"


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else "something else"
    )


def resolve_loss(
    data: TrainingData,
    tokenizer: Any,
    *,
    tokenizer_name: str,
    assistant_only: bool | None = None,
    completion_only: bool | None = None,
) -> LossOn:
    """Check that the tokenizer can serve the data, and decide which tokens are learned.

    Args:
        data: the examples.
        tokenizer: a transformers tokenizer.
        tokenizer_name: the folder it came from, for messages.
        assistant_only: for messages, whether to learn the assistant's turns only; None does so if
            the chat template marks them (``{% generation %}``), or is one that TRL can mark.
        completion_only: for prompts, whether to learn the completion only; None means yes.

    Raises:
        DataError: for a tokenizer without an end token or without a chat template that the data
            needs, and for a choice that does not fit the data.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {tokenizer_name} has no end token, so the model could never learn "
            "to stop; name one as `eos_token` in its tokenizer_config.json"
        )
    template = tokenizer.chat_template
    if data.conversational and not template:
        raise DataError(
            f"{data.source} holds messages, but the tokenizer in {tokenizer_name} has no chat "
            "template; give one with --chat-template FILE, or write the data as `prompt` and "
            "`completion`"
        )
    if assistant_only and not data.conversational:
        raise DataError(f"--assistant-only is for messages, and {data.source} holds none")
    if completion_only and data.kind != "prompt":
        raise DataError(
            f"--completion-only is for `prompt`/`completion` data, and {data.source} is "
            f"{_describe(data.kind, data.conversational)}"
        )
    if assistant_only and completion_only:
        raise DataError("--assistant-only and --completion-only exclude each other")
    if data.kind == "prompt" and not assistant_only:
        return "all" if completion_only is False else "completion"
    if assistant_only is False or not data.conversational:
        return "all"
    if _marks_assistant(tokenizer):
        return "assistant"
    if assistant_only:
        raise DataError(
            f"--assistant-only: the chat template of the tokenizer in {tokenizer_name} does not "
            "mark the assistant's turns; put {% generation %} ... {% endgeneration %} around "
            "them in a copy of it, and give that with --chat-template FILE"
        )
    return "all"


def _marks_assistant(tokenizer: Any) -> bool:
    """Whether the assistant's turns can be told from the rest of a rendered conversation."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else template.get("default", "")
    if _GENERATION_MARKER.search(text):
        return True
    # TRL has marked copies of the templates of well-known models, and uses them by itself.
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:  # none of those
        return False


def check_template(data: TrainingData, tokenizer: Any, *, tokenizer_name: str) -> None:
    """Render every conversation once, so that one the template refuses is named.

    Raises:
        DataError: naming the first example that the chat template cannot render.
    """
    if not data.conversational:
        return
    for index, row in enumerate(data.dataset):
        messages = [message for field in _FIELDS[data.kind] for message in row[field]]
        tools = row.get("tools")
        try:
            tokenizer.apply_chat_template(
                messages,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                tokenize=False,
                **(row.get("chat_template_kwargs") or {}),
            )
        except Exception as error:  # templates are programs: whatever they raise
            empty = " (those left out not counted)" if data.left_out else ""
            raise DataError(
                f"{data.source}, example {index + 1}{empty}: the chat template of the tokenizer in "
                f"{tokenizer_name} cannot render it: {' '.join(str(error).split())}"
            ) from error


@dataclass(frozen=True)
class TokenCounts:
    """What the tokenized examples hold.

    Attributes:
        examples: sequences that will be trained on (packed ones, with packing).
        tokens: tokens in all of them.
        learned: tokens whose prediction counts in the loss.
        notes: sentences that a user should see.
    """

    examples: int
    tokens: int
    learned: int
    notes: tuple[str, ...]


def check_tokens(
    tokenized: Iterable[Mapping[str, Any]],
    data: TrainingData,
    tokenizer: Any,
    *,
    embedding_rows: int,
    max_length: int,
    context: int | None = None,
    packing: bool = False,
) -> TokenCounts:
    """Check what the model will see, after tokenizing, masking and cutting.

    Args:
        tokenized: examples with ``input_ids`` and ``labels`` (-100 where nothing is learned).
        data: the examples they were made from.
        tokenizer: the tokenizer that made them.
        embedding_rows: tokens the model has embeddings for.
        max_length: where sequences are cut, in tokens.
        context: the longest sequence that the model was made for, in tokens, where known.
        packing: whether several examples share a sequence.

    Raises:
        DataError: if no token is left to learn, or a token has no embedding.
    """
    examples = tokens = learned = cut = ends = longest = 0
    largest = tokenizer.pad_token_id or 0
    for row in tokenized:
        ids, labels = row["input_ids"], row["labels"]
        examples += 1
        tokens += len(ids)
        longest = max(longest, len(ids))
        # The first label of a sequence has nothing before it to be predicted from.
        learned += sum(label != -100 for label in labels[1:])
        ends += sum(label == tokenizer.eos_token_id for label in labels)
        cut += len(ids) >= max_length
        largest = max(largest, *ids, 0)
    if learned == 0:
        raise DataError(
            f"{data.source}: no token is left to learn from; every answer lies beyond "
            f"--max-length {max_length} or is masked"
        )
    if largest >= embedding_rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"the tokenizer's token {largest} ({token!r}) has no row in the model's embedding of "
            f"{embedding_rows}; this tokenizer belongs to another model"
        )
    notes = []
    if data.left_out:
        what = "have no assistant's answer" if data.kind == "messages" else "are empty"
        notes.append(f"{data.left_out} of {len(data) + data.left_out} examples {what}: left out")
    if not packing:
        masked = len(data) - examples
        if masked:
            notes.append(
                f"{masked} of {len(data)} examples have nothing to learn within --max-length "
                f"{max_length}: left out"
            )
        if cut:
            notes.append(f"{cut} of {examples} examples reach --max-length {max_length}: cut there")
    if context is not None and longest > context:
        notes.append(
            f"the longest sequence has {longest} tokens, but the model was made for {context}: "
            f"--max-length {context} cuts there"
        )
    if ends == 0:
        notes.append(
            f"no example teaches the end token {tokenizer.eos_token!r}, so the model will not "
            "learn to stop"
        )
    return TokenCounts(examples, tokens, learned, tuple(notes))
