"""`Patches`: changes to other libraries that can be taken back, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from types import FunctionType
from typing import Any


class Patches:
    """What was put into other libraries, in order, and how it comes out again."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self._undo)

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Put `value` in the place of an attribute of a class or module."""
        before = vars(owner)[name]
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Put `value` in the place of an entry of a mapping."""
        before = mapping[key]
        mapping[key] = value
        self._undo.append(lambda: mapping.__setitem__(key, before))

    def function(self, function: Any, code_of: Any) -> FunctionType:
        """Let a function run the code of another, which must not be a closure.

        The function itself stays the same object, so that it also acts where a script has it by
        ``from library import function`` from before.

        Returns:
            What the function was, as a new function.
        """
        names = ("__code__", "__defaults__", "__kwdefaults__", "__globals__")
        code, defaults, keyword_defaults, variables = (getattr(function, name) for name in names)
        original = FunctionType(code, variables, function.__name__, defaults, function.__closure__)
        original.__kwdefaults__ = keyword_defaults
        function.__code__ = code_of.__code__
        function.__defaults__ = code_of.__defaults__
        function.__kwdefaults__ = code_of.__kwdefaults__
        # For ``inspect.signature``.
        function.__wrapped__ = original

        def undo() -> None:
            function.__code__ = code
            function.__defaults__ = defaults
            function.__kwdefaults__ = keyword_defaults
            del function.__wrapped__

        self._undo.append(undo)
        return original

    def undo(self) -> None:
        """Put everything back, the last change first."""
        while self._undo:
            self._undo.pop()()
