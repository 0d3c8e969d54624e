"""Optimizers whose state takes a quarter of the memory, and on a GPU may leave the card.

=============  =================================================================================
`adamw`        the optimizer as ``torch.optim`` knows it: groups, closures, state dicts
`options`      the options of a group
`state`        what it remembers of a parameter: names, shapes, dtypes
`restore`      the check of a state dict
`files`        an optimizer in a safetensors file
`update`       one step on the CPU
`cuda_update`  one step on a card
`paging`       where the moments live, and how they come to a step
`sharded`      the little that distributed parameters ask for
=============  =================================================================================
"""

from fourbit.optim.adamw import PagedAdamW
from fourbit.optim.files import load_optimizer, save_optimizer
from fourbit.optim.paging import PagingReport

__all__ = ["PagedAdamW", "PagingReport", "load_optimizer", "save_optimizer"]
