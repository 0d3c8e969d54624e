"""`when_imported`: do something to a library as soon as it is there, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_waiting: dict[str, list[Callable[[], object]]] = {}


def when_imported(module: str, callback: Callable[[], object]) -> None:
    """Call `callback` once, when the module has been imported; at once if it is there already.

    Args:
        module: a top-level module. It need not be installed.
        callback: what to do. An error of it is an error of the import.
    """
    if module in sys.modules:
        callback()
        return
    _waiting.setdefault(module, []).append(callback)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds nothing itself: it puts a step of ours behind the loader that the others find."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        callbacks = _waiting.pop(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            # To look for a module is not to import it: libraries ask whether others are installed.
            _waiting[fullname] = callbacks
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Another loader, and then the callbacks."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        for callback in _waiting.pop(module.__name__, []):
            callback()
