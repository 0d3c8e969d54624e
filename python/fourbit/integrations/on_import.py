"""Registration with other libraries when they are imported, and not before.

``import fourbit`` takes milliseconds and loads none of these libraries, and still
``AutoModelForCausalLM.from_pretrained`` knows folders of fourbit, whichever of the two libraries is
imported first: a finder on ``sys.meta_path`` sees the library's own module being imported, and
registers right after it has run. Nothing else about the import changes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fourbit.integrations.versions import require

# The module of a library: the module of ours whose `register()` follows it.
HOOKS = {
    "peft": "fourbit.integrations.peft.hook",
    "transformers.modeling_utils": "fourbit.integrations.transformers.methods",
    "transformers.quantizers.auto": "fourbit.integrations.transformers.registration",
}


def install() -> None:
    """Register with what is imported already, and with the rest when it is."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for library in HOOKS:
        if _is_ready(library):
            _register(library)


def _is_ready(library: str) -> bool:
    module = sys.modules.get(library)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def _register(library: str) -> None:
    try:
        require(library.partition(".")[0])
        import_module(HOOKS[library]).register()
    except Exception as error:
        # The library itself works, and someone may need it for something else.
        warnings.warn(
            f"fourbit is not registered with {library.partition('.')[0]}: {error}", stacklevel=2
        )


class _Finder(MetaPathFinder):
    """Finds what the finders behind it find, with our loader around theirs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in HOOKS:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(spec.loader)
                return spec
        return None


class _Registering(Loader):
    """Another loader, whose modules are registered with once they have run."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        # The module shall look as if it had been loaded without us.
        spec.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register(module.__name__)
