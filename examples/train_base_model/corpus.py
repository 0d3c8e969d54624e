"""The base model's text: real English that every CPython carries.

Three sources, all read from the running interpreter's own installation:

* ``pydoc_data.topics``, the language reference that ``help()`` shows;
* the docstrings of the standard library's Python modules, parsed with ``ast`` (nothing is imported,
  so no module can fail or act);
* the docstrings of the modules compiled into the interpreter or shipped as its extension modules,
  which have no source to parse (``builtins``, ``math``, ``itertools``, ...).

The order is fixed and every paragraph appears once. Whole documents are held out for validation,
and no paragraph of theirs is left in the training text.
"""

import ast
import importlib
import inspect
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Folders without prose of their own: installed packages, tests, demos, and the codecs' 80 copies
# of one generated docstring.
SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "encodings",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# Validation text: a mix of the language reference and of modules, each with its C or Python twin.
HELD_OUT = {
    "topic exceptions",
    "topic global",
    "topic import",
    "topic lambda",
    "topic numbers",
    "topic with",
    "bdb",
    "copyreg",
    "dbm",
    "pprint",
    "selectors",
    "statistics",
    "threading",
    "uuid",
    "venv",
    "wave",
}
SHORTEST_PARAGRAPH = 40  # characters; shorter ones ("See also:") may repeat


@dataclass(frozen=True)
class Entry:
    """One documented object.

    Attributes:
        kind: "module", "class" or "function".
        name: the dotted name, for example ``os.path.join``.
        signature: the arguments with their parentheses, or an empty string.
        doc: the docstring, dedented.
    """

    kind: str
    name: str
    signature: str
    doc: str


@dataclass(frozen=True)
class Corpus:
    """What the model is trained on and measured with.

    Attributes:
        train: documents to train on.
        held_out: documents that share no paragraph with ``train``.
        questions: (question, answer) pairs made from docstrings of training documents.
    """

    train: list[str]
    held_out: list[str]
    questions: list[tuple[str, str]]


def gather() -> Corpus:
    """Read the interpreter's documentation and split it into training and held-out text."""
    documents = {f"topic {name}": text for name, text in topics()}
    entries_of: dict[str, list[Entry]] = {}
    for entries in [*source_modules(), *compiled_modules()]:
        documents[entries[0].name] = "\n\n".join(
            f"{entry.name}{entry.signature}\n\n{entry.doc}" for entry in entries
        )
        entries_of[entries[0].name] = entries

    seen: set[str] = set()
    held_out = [unseen(text, seen) for name, text in documents.items() if is_held_out(name)]
    train = [unseen(text, seen) for name, text in documents.items() if not is_held_out(name)]
    questions = [
        pair
        for name, entries in entries_of.items()
        if not is_held_out(name)
        for pair in map(question_about, entries)
        if pair is not None
    ]
    return Corpus(
        train=[text for text in train if text],
        held_out=[text for text in held_out if text],
        questions=list(dict.fromkeys(questions)),
    )


def is_held_out(document: str) -> bool:
    """Say whether a document is validation text. Packages and C twins go with their module."""
    return document.split(".")[0].removeprefix("_") in HELD_OUT


def unseen(text: str, seen: set[str]) -> str:
    """Return the paragraphs of ``text`` that are not in ``seen``, and add them to it.

    Paragraphs are compared without regard to white space.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if not key or (len(key) >= SHORTEST_PARAGRAPH and key in seen):
            continue
        seen.add(key)
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def topics() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every topic of ``help()``, longest first.

    Long topics contain short ones, so this order keeps the text in one piece.
    """
    by_name = pydoc_data.topics.topics
    for name in sorted(by_name, key=lambda name: (-len(by_name[name]), name)):
        yield name, by_name[name].strip()


def source_modules() -> Iterator[list[Entry]]:
    """Yield the documented objects of each Python module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith(
            ("_sysconfigdata", "config-")
        ):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        entries = list(documented_nodes(tree, "module", name))
        if entries:
            yield entries


def documented_nodes(node: ast.AST, kind: str, name: str) -> Iterator[Entry]:
    """Yield an entry for ``node`` and for each class and function inside it, in source order."""
    doc = ast.get_docstring(node)  # type: ignore[arg-type]
    if doc and doc.strip():
        signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
        yield Entry(kind, name, signature, doc.strip())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from documented_nodes(child, "class", f"{name}.{child.name}")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from documented_nodes(child, "function", f"{name}.{child.name}")


def compiled_modules() -> Iterator[list[Entry]]:
    """Yield the documented objects of each module that has no Python source."""
    folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    shipped = {path.name.split(".")[0] for path in folder.glob("*.so")}
    for name in sorted(shipped | set(sys.builtin_module_names)):
        if name.startswith(("_test", "xx", "_xx")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # an extension whose system library is not installed
            continue
        entries = list(documented_members(module, name))
        if entries:
            yield entries


def documented_members(module: ModuleType, name: str) -> Iterator[Entry]:
    """Yield an entry for a compiled module, its functions, its classes and their methods."""
    if module.__doc__:
        yield Entry("module", name, "", inspect.cleandoc(module.__doc__))
    for member_name, member in sorted(vars(module).items()):
        if inspect.isclass(member):
            yield from documented_object("class", f"{name}.{member_name}", member)
            for method_name, method in sorted(vars(member).items()):
                if inspect.isroutine(method) and not method_name.startswith("__"):
                    yield from documented_object(
                        "function", f"{name}.{member_name}.{method_name}", method
                    )
        elif inspect.isroutine(member):
            yield from documented_object("function", f"{name}.{member_name}", member)


def documented_object(kind: str, name: str, thing: object) -> Iterator[Entry]:
    """Yield an entry for one compiled object, if it carries a docstring."""
    doc = getattr(thing, "__doc__", None)
    if isinstance(doc, str) and doc.strip():
        yield Entry(
            kind, name, getattr(thing, "__text_signature__", None) or "", inspect.cleandoc(doc)
        )


def question_about(entry: Entry) -> tuple[str, str] | None:
    """Return a question about a documented object and its docstring's first sentence.

    None where the docstring does not open with one plain sentence of 20 to 200 characters.
    """
    opening = " ".join(re.split(r"\n\s*\n", entry.doc)[0].split())
    sentence = re.match(r"[A-Z][^:`>|]{18,198}?\.(?= |$)", opening)
    name = entry.name.removeprefix("builtins.")
    if sentence is None or re.search(r"(^|\.)_", name):
        return None
    if entry.kind == "module":
        question = f"What is the {name} module for?"
    elif entry.kind == "class":
        question = f"What is {name}?"
    else:
        question = f"What does {name} do?"
    return question, sentence.group()
