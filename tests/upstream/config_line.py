"""The config line, in our words, and the classes that tests name."""

from types import ModuleType
from typing import Any


def translate(original: type) -> Any:
    """A stand-in for ``BitsAndBytesConfig`` that makes a ``fourbit.NF4Config`` for 4 bits."""

    def config(**options: Any) -> Any:
        import fourbit

        if options.get("load_in_8bit"):
            return original(**options)
        return fourbit.NF4Config(
            codebook=options.get("bnb_4bit_quant_type", "fp4"),
            double_quant=options.get("bnb_4bit_use_double_quant", False),
        )

    return config


def accept_our_classes(module: ModuleType) -> None:
    """``isinstance`` with PEFT's or bitsandbytes' class of a 4-bit layer takes ours too."""
    from peft.tuners import ia3, randlora, road

    from fourbit import Linear4bit
    from fourbit.integrations.peft.layer import LoraLinear4bit

    # Methods without a layer of ours have PEFT's plain one on a `Linear4bit`.
    pairs = {
        "LoraLinear4bit": LoraLinear4bit,
        "IA3Linear4bit": ia3.layer.Linear,
        "RandLoraLinear4bit": randlora.layer.Linear,
        "RoadLinear4bit": road.layer.Linear,
    }
    for name, ours in pairs.items():
        theirs = getattr(module, name, None)
        if isinstance(theirs, type):
            setattr(module, name, (theirs, ours))
    library = getattr(module, "bnb", None)
    if library is not None and isinstance(library.nn.Linear4bit, type):
        module.bnb = _Library(library, (library.nn.Linear4bit, Linear4bit))  # type: ignore[attr-defined]


class _Library(ModuleType):
    """bitsandbytes as one test module sees it, with a pair of classes in place of one."""

    def __init__(self, library: Any, pair: tuple[type, type]) -> None:
        super().__init__("bitsandbytes")
        self._library = library
        self.nn = ModuleType("bitsandbytes.nn")
        self.nn.__dict__.update(vars(library.nn))
        self.nn.Linear4bit = pair  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)
