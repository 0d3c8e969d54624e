"""Optimizers whose state takes a quarter of the memory, and on a GPU may leave the card.

`adamw` is the optimizer as ``torch.optim`` knows it: groups, closures, state dicts. `state` is
what it remembers of a parameter: names, shapes and dtypes, and the check of what is loaded.
`update` calls the core. `sharded` is the little that distributed parameters ask for. `files` keeps
an optimizer in a safetensors file.
"""

from fourbit.optim.adamw import PagedAdamW
from fourbit.optim.files import load_optimizer, save_optimizer

__all__ = ["PagedAdamW", "load_optimizer", "save_optimizer"]
