"""`PagedAdamW`: AdamW with 32- or 8-bit state, as an optimizer of torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fourbit.ops import FLOAT_DTYPES
from fourbit.optim import state as state_of
from fourbit.optim.sharded import is_distributed, local, placements, usable_everywhere
from fourbit.optim.update import Update, run, shares_memory

Pager: TypeAlias = Literal["auto", "unified", "pinned", "resident"]

WARN_EVERY = 100
"""Steps with skipped tensors between two warnings of them."""


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose state takes 8 or 2 bytes a parameter element.

    It steps as ``torch.optim.AdamW`` does, weight decay included: decoupled, and before the update.
    All arithmetic is in float32, whatever the dtype of the parameter, with one rounding at the end;
    with ``state_bits=8`` both moments are kept in 8 bits with a float32 scale for each 256 elements
    (arXiv 2110.02861), except for parameters of fewer than 4096 elements. Every option but `pager`
    may differ between parameter groups. The results do not depend on the number of threads.

    A parameter without a gradient is left alone. So is one whose gradient holds NaN, infinity or a
    number whose square overflows (2^63 and more), with its state, where torch would destroy both:
    such updates are counted in `skipped_updates`, and a ``RuntimeWarning`` names the parameter at
    the first and at each hundredth step where it happens. ``torch.amp.GradScaler`` works as with
    every optimizer: if it finds NaN or infinity it leaves out the step of all parameters before
    this class hears of it, so nothing is counted and no tensor is stepped alone.

    ``state_dict()`` is exact, and a run resumed from it goes on in the same bits. With
    ``state_bits=32`` it is also one of ``torch.optim.AdamW``, in both directions.
    ``load_state_dict`` copies: optimizers never share state.

    Args:
        params: parameters, named parameters or groups, as for every optimizer; float32, float16 or
            bfloat16, of any shape and layout.
        lr: learning rate; a number or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: of the parameter a step, times `lr`.
        state_bits: 8 or 32.
        pager: where the state lives. With "auto" and "resident", beside the parameters, on the CPU
            or the GPU; the others are not there yet.
        maximize: whether to ascend.

    Attributes:
        pager: as given.
        skipped_updates: updates of single tensors left out for NaN or infinity in the gradient.

    Raises:
        ValueError: for an option out of range, an unknown or impossible pager, or a parameter that
            stands twice.
        TypeError: for a parameter of another dtype.
        NotImplementedError: for parameters that are neither on the CPU nor on an NVIDIA GPU, and
            for a pager that moves state.
    """

    pager: Pager
    skipped_updates: int

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: Literal[8, 32] = 8,
        pager: Pager = "auto",
        maximize: bool = False,
    ) -> None:
        if pager not in get_args(Pager):
            known = ", ".join(f'"{name}"' for name in get_args(Pager))
            raise ValueError(f"unknown pager {pager!r}; use one of {known}")
        self.pager = pager
        self.skipped_updates = 0
        self._steps_with_skips = 0
        # The dtypes in which parameters took their first step.
        self._first_dtypes: dict[Tensor, torch.dtype] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "maximize": maximize,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying; hooks stay behind, as with all optimizers of torch."""
        own = ("pager", "skipped_updates", "_steps_with_skips", "_first_dtypes")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it does not name are the optimizer's own.

        Raises:
            ValueError: for a bad option, or a parameter that stands twice.
            TypeError: for a parameter of another dtype.
            NotImplementedError: for parameters that are neither on the CPU nor on an NVIDIA GPU.
        """
        super().add_param_group(param_group)
        try:
            _check_options(param_group)
            params: list[Tensor] = param_group["params"]
            if len({id(param) for param in params}) < len(params):
                raise ValueError("a parameter stands twice in one parameter group")
            for param in params:
                # Meta tensors may be given memory later; `step` looks again.
                if not param.is_meta:
                    self._check_param(param)
        except Exception:
            self.param_groups.pop()
            raise

    def _name(self, param: Tensor) -> str:
        """How errors call a parameter: by its index in a state dict, and by name if it has one."""
        index = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for position, other in enumerate(group["params"]):
                if other is param:
                    return f"parameter {index}" + (f" ({names[position]})" if names else "")
                index += 1
        raise AssertionError("the parameter is not in the optimizer")

    def _check_param(self, param: Tensor) -> None:
        if param.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{self._name(param)} is {param.dtype}; use float32, float16 or bfloat16"
            )
        if param.device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"{self._name(param)} is on {param.device}, and PagedAdamW has no kernels for it; "
                "use torch.optim.AdamW there, or keep the parameters on the CPU or an NVIDIA GPU"
            )
        if self.pager not in ("auto", "resident") and param.device.type == "cuda":
            raise NotImplementedError(
                f"pager {self.pager!r} is not there yet: state lives beside the parameters; use "
                '"resident"'
            )
        if self.pager not in ("auto", "resident"):
            raise ValueError(
                f"pager {self.pager!r} needs parameters on a GPU, and {self._name(param)} is on "
                'the CPU; use "resident"'
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient.

        All of them are checked before the first is written.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: for a sparse gradient.
            ValueError: for a parameter whose dtype or shape has changed since its first step, or
                parameters that share memory.
            NotImplementedError: for a parameter that is neither on the CPU nor on an NVIDIA GPU.
            CudaError: where the kernels cannot be built or launched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = [
            (group, [self._update(param, group) for param in group["params"] if _has_grad(param)])
            for group in self.param_groups
        ]
        everything = [update for _, updates in plan for update in updates]
        sharer = shares_memory(everything)
        if sharer is not None:
            raise ValueError(
                f"{self._name(sharer)} shares memory with another parameter or gradient; "
                "give the optimizer one parameter for each tensor, or clone them"
            )
        # The core sees a shard alone; the others must skip the tensor too.
        shards = [update.param for update in everything if is_distributed(update.param)]
        usable = usable_everywhere(shards)
        skipped = [param for param, is_usable in zip(shards, usable, strict=True) if not is_usable]
        left_out = {id(param) for param in skipped}
        kept = [
            (group, [update for update in updates if id(update.param) not in left_out])
            for group, updates in plan
        ]
        for group, updates in kept:
            for bits in (32, 8):
                chosen = [u for u in updates if u.bits == bits and not u.values.is_cuda]
                if chosen:
                    skipped += run(chosen, group, bits)
        skipped += self._step_on_cards(kept)
        if skipped:
            self._count_skipped(skipped)
        return loss

    def _step_on_cards(self, plan: list[tuple[dict[str, Any], list[Update]]]) -> list[Tensor]:
        devices = {u.values.device for _, updates in plan for u in updates if u.values.is_cuda}
        skipped = []
        for device in sorted(devices, key=str):
            on_it = [
                (group, [update for update in updates if update.values.device == device])
                for group, updates in plan
            ]
            from fourbit.optim.cuda_update import DamagedStateError, run_on_card

            try:
                skipped += run_on_card(on_it, device)
            except DamagedStateError as error:
                message = f"the optimizer state of {self._name(error.param)}: {error}"
                raise ValueError(message) from None
        return skipped

    def _update(self, param: Tensor, group: dict[str, Any]) -> Update:
        """What stepping `param` takes, its state made if it has none; checked."""
        self._check_param(param)
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{self._name(param)} has a sparse gradient, which PagedAdamW does not take; use "
                "torch.optim.SparseAdam, or sparse=False in the layer"
            )
        if placements(grad) != placements(param):
            raise ValueError(f"the gradient of {self._name(param)} is not sharded as it is")
        state = self.state[param]
        if not state:
            bits = state_of.bits_for(param, group["state_bits"])
            state.update(state_of.new_state(param, bits))
        first_dtype = self._first_dtypes.setdefault(param, param.dtype)
        if param.dtype != first_dtype or state["exp_avg"].shape != param.shape:
            raise ValueError(
                f"{self._name(param)} was {first_dtype} {list(state['exp_avg'].shape)} at its "
                f"first step and is {param.dtype} {list(param.shape)} now; cast the model first "
                "and make the optimizer then"
            )
        values = local(param).detach()
        # Autograd may hand out gradients as negative views, whose memory holds the other sign.
        local_grad = local(grad).detach().resolve_neg()
        return Update(param, values.contiguous(), local_grad.contiguous(), state)

    def _count_skipped(self, params: list[Tensor]) -> None:
        self.skipped_updates += len(params)
        self._steps_with_skips += 1
        if self._steps_with_skips % WARN_EVERY == 1:
            others = f" and {len(params) - 1} more" if len(params) > 1 else ""
            warnings.warn(
                f"skipped the update of {self._name(params[0])}{others} for NaN or infinity in the "
                f"gradient, {self.skipped_updates} updates so far; look at the loss and the "
                "learning rate, and with float16 use torch.amp.GradScaler",
                RuntimeWarning,
                stacklevel=5,  # past the wrappers of no_grad and of torch's hooks
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict of this class, or of ``torch.optim.AdamW`` with 32-bit state.

        Options come from the state dict, as with every optimizer of torch, `state_bits` included;
        options it does not name stay as they are. State is copied, and kept in its own dtypes.

        Raises:
            ValueError: for a state dict of other groups, parameters, shapes or dtypes, or a damaged
                one, naming the parameter's index and the field. The optimizer stays as it was.
        """
        states: dict[Tensor, state_of.State] = {}

        # torch casts floating-point state to the parameter's dtype. It is given the groups alone;
        # hooks, before and after, see everything.
        def take(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups, other = self._take_states(state_dict, states)
            return {**state_dict, "param_groups": groups, "state": other}

        def put(_: torch.optim.Optimizer) -> None:
            self.state.update(states)
            self._first_dtypes = {param: param.dtype for param in states}

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _take_states(
        self, state_dict: dict[str, Any], states: dict[Tensor, state_of.State]
    ) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
        """Fill `states` from a state dict; return its completed groups, and its further entries."""
        saved_states, saved_groups = state_dict.get("state"), state_dict.get("param_groups")
        if not isinstance(saved_states, Mapping) or not isinstance(saved_groups, list):
            raise ValueError("not an optimizer's state dict: it lacks state or param_groups")
        if not all(isinstance(group, Mapping) and "params" in group for group in saved_groups):
            raise ValueError("the state dict has a parameter group without params; it is damaged")
        if [len(group["params"]) for group in saved_groups] != [
            len(group["params"]) for group in self.param_groups
        ]:
            raise ValueError("the state dict is one of other parameter groups")
        indices = [index for group in saved_groups for index in group["params"]]
        if len(set(indices)) != len(indices):
            raise ValueError("the state dict names a parameter twice; it is damaged")
        groups, other = [], dict(saved_states)
        for saved_group, group in zip(saved_groups, self.param_groups, strict=True):
            kept = {name: value for name, value in group.items() if name != "params"}
            completed = {**kept, **saved_group}
            _check_options(completed)
            groups.append(completed)
            for index, param in zip(saved_group["params"], group["params"], strict=True):
                saved = other.pop(index, None)
                if saved is not None and saved != {}:
                    bits = state_of.bits_for(param, completed["state_bits"])
                    name = self._name(param)
                    states[param] = state_of.restored_state(param, saved, bits, name)
        strangers = [key for key in other if isinstance(key, int)]
        if strangers:
            raise ValueError(
                f"the state dict holds state of parameter {strangers[0]}, which no group names"
            )
        return groups, other


def _has_grad(param: Tensor) -> bool:
    return param.grad is not None


def _check_options(options: Mapping[str, Any]) -> None:
    """The options of a group.

    Raises:
        ValueError: naming the option that is out of range.
    """
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; it must have one")
    for name in ("lr", "eps", "weight_decay"):
        # YAML reads 1e-3 as a string, which schedulers would stumble over later.
        if not isinstance(options[name], Real | Tensor):
            raise ValueError(f"{name} is {options[name]!r}; it must be a number")
        if not 0 <= float(options[name]) < math.inf:
            raise ValueError(f"{name} is {options[name]}; it must be finite and not negative")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; they must be two numbers from 0 to below 1")
    if options["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits is {options['state_bits']!r}; use 8 or 32")
    if options.get("amsgrad"):
        raise ValueError("amsgrad is not supported; make the optimizer without it")
    # torch.optim.Adam, whose state is AdamW's, says here that its decay goes through the gradient.
    if options.get("decoupled_weight_decay") is False and float(options["weight_decay"]):
        raise ValueError("the weight decay is Adam's and not AdamW's; set it to 0 or use AdamW")
