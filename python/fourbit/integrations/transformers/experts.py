"""The experts interface of transformers, and `fourbit.experts.experts_forward` in it.

transformers exchanges the forward of its experts classes by a name in the configuration,
``config._experts_implementation``. Ours is "fourbit"; it computes with packed weights and, where a
model has both, with dense ones.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from fourbit.experts import experts_forward, experts_layouts

IMPLEMENTATION = "fourbit"
"""The name of our forward."""


def register() -> None:
    """Make our forward known to transformers under its name; a second call changes nothing.

    Raises:
        ImportError: naming the version, for a transformers without such an interface.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise ImportError(
            f"transformers {transformers.__version__} has no experts interface, which 4-bit "
            "experts need; install a version that fourbit supports"
        ) from None
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def use_fourbit(module: nn.Module) -> None:
    """Have a module of experts computed by our forward, and refuse others as long as it is packed.

    Args:
        module: of a class that follows the interface; the configuration that it shares with the
            rest of the model is changed.
    """
    register()
    config: Any = module.config
    config._experts_implementation = IMPLEMENTATION
    if _refuse_others not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_refuse_others)


def _refuse_others(module: Any, args: Any) -> None:
    """Say what is wrong before another forward takes codes for numbers."""
    name = module.config._experts_implementation
    if name != IMPLEMENTATION and experts_layouts(module):
        raise ValueError(
            f"the experts of this model are in few bits, which the implementation {name!r} cannot "
            f"compute with; call model.set_experts_implementation({IMPLEMENTATION!r})"
        )
