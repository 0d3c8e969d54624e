"""`PagedAdamW`: AdamW with 32- or 8-bit state, as an optimizer of torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fourbit.distributed import is_distributed
from fourbit.operands import FLOAT_DTYPES
from fourbit.optim import state as state_of
from fourbit.optim.options import check_options
from fourbit.optim.paging import PagerName, PagingReport, Placement
from fourbit.optim.paging.pages import Wanted
from fourbit.optim.restore import read_state_dict
from fourbit.optim.sharded import placements, usable_everywhere
from fourbit.optim.update import Seen, Update, is_whole, run, shares_memory, update_of

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
    ``load_state_dict`` copies: optimizers never share state. ``state_dict()`` does not, as with
    every optimizer of torch: its tensors are the state itself, which the next step changes, and
    keep the memory of their pages.

    Args:
        params: parameters, named parameters or groups, as for every optimizer; float32, float16 or
            bfloat16, of any shape and layout.
        lr: learning rate; a number or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: of the parameter a step, times `lr`.
        state_bits: 8 or 32.
        pager: where the moments live; results do not depend on it. "unified": in managed memory,
            which the GPU's driver moves to the host when the GPU is full, and a step brings back.
            "pinned": on the host, copied to the GPU and back while they are stepped. "resident":
            beside the parameters. "auto": "unified" where the GPU can, else "pinned"; and on the
            CPU "resident", which is the only one there.
        maximize: whether to ascend.

    Attributes:
        pager: as given; `paging_report` says what "auto" chose.
        skipped_updates: updates of single tensors left out for NaN or infinity in the gradient.

    Raises:
        ValueError: for an option out of range, an unknown pager or one that the device cannot do,
            a parameter that stands twice, or one that is neither on the CPU nor on an NVIDIA GPU.
        TypeError: for a parameter of another dtype.
    """

    pager: PagerName
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
        pager: PagerName = "auto",
        maximize: bool = False,
    ) -> None:
        if pager not in get_args(PagerName):
            known = ", ".join(f'"{name}"' for name in get_args(PagerName))
            raise ValueError(f"unknown pager {pager!r}; use one of {known}")
        self.pager = pager
        self.skipped_updates = 0
        self._steps_with_skips = 0
        # The dtypes and devices that parameters had in their first step.
        self._homes: dict[Tensor, tuple[torch.dtype, torch.device]] = {}
        self._seen: dict[Tensor, Seen] = {}
        self._placement = Placement(pager)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "maximize": maximize,
        }
        check_options(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying; hooks stay behind, as with all optimizers of torch."""
        own = ("pager", "skipped_updates", "_steps_with_skips", "_homes")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's state is plain memory, which its next step puts into pages of its own."""
        super().__setstate__(state)
        # Torch also calls this to load a state dict.
        self._seen = {}
        if not hasattr(self, "_placement"):
            self._placement = Placement(self.pager)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it does not name are the optimizer's own.

        Raises:
            ValueError: for a bad option, a parameter that stands twice, or one that is neither on
                the CPU nor on an NVIDIA GPU.
            TypeError: for a parameter of another dtype.
        """
        super().add_param_group(param_group)
        try:
            check_options(param_group)
            params: list[Tensor] = param_group["params"]
            if len({id(param) for param in params}) < len(params):
                raise ValueError("a parameter stands twice in one parameter group")
            for param in params:
                # Meta tensors may be given memory later; `step` looks again.
                if not param.is_meta:
                    self._check_param(param)
                    self._placement.check(param)
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
            raise ValueError(
                f"{self._name(param)} is on {param.device}, and PagedAdamW has no kernels for it; "
                "use torch.optim.AdamW there, or keep the parameters on the CPU or an NVIDIA GPU"
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
            ValueError: for a parameter whose dtype, shape, device or `state_bits` has changed since
                its first step, parameters that share memory, or one that is neither on the CPU nor
                on an NVIDIA GPU.
            CudaError: where the kernels cannot be built or launched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan()
        everything = [update for _, updates in plan for update in updates]
        # The core sees a shard alone; the others must skip the tensor too.
        shards = [update.param for update in everything if is_distributed(update.param)]
        devices = {update.values.device for update in everything}
        on_cards = {device for device in devices if self._placement.card(device) is not None}
        widths = {update.bits for update in everything}
        # What one call steps, the core looks at by itself.
        one_call = sum(bool(updates) for _, updates in plan) * len(widths) == 1
        if shards or on_cards or not one_call:
            self._check_memory(everything)
        usable = usable_everywhere(shards)
        skipped = [param for param, is_usable in zip(shards, usable, strict=True) if not is_usable]
        left_out = {id(param) for param in skipped}
        if left_out:
            plan = [
                (group, [update for update in updates if id(update.param) not in left_out])
                for group, updates in plan
            ]
        for group, updates in plan:
            for bits in sorted(widths, reverse=True):
                chosen = [u for u in updates if u.bits == bits and u.values.device not in on_cards]
                if chosen:
                    try:
                        skipped += run(chosen, group, bits)
                    except ValueError:
                        self._check_memory(chosen)
                        raise
        if on_cards:
            skipped += self._step_on_cards(plan)
        if skipped:
            self._count_skipped(skipped)
        return loss

    def _check_memory(self, updates: list[Update]) -> None:
        sharer = shares_memory(updates)
        if sharer is not None:
            raise ValueError(
                f"{self._name(sharer)} shares memory with another parameter or gradient; "
                "give the optimizer one parameter for each tensor, or clone them"
            ) from None

    def _on_card(self, update: Update) -> bool:
        return self._placement.card(update.values.device) is not None

    def _step_on_cards(self, plan: list[tuple[dict[str, Any], list[Update]]]) -> list[Tensor]:
        devices = {u.values.device for _, updates in plan for u in updates if self._on_card(u)}
        if not devices:
            return []
        from fourbit.optim.cuda_update import CardStep, DamagedStateError

        skipped: list[Tensor] = []

        def finish(step: CardStep) -> None:
            try:
                skipped.extend(step.finish())
            except DamagedStateError as error:
                message = f"the optimizer state of {self._name(error.param)}: {error}"
                raise ValueError(message) from None

        with ExitStack() as under_way:
            # All cards step at the same time. What was begun is finished, though another fails.
            for device in sorted(devices, key=str):
                on_it = [
                    (group, [update for update in updates if update.values.device == device])
                    for group, updates in plan
                ]
                card, pager = self._placement.card(device), self._placement.pager(device)
                assert card is not None
                under_way.callback(finish, CardStep(on_it, card, pager))
        return skipped

    def _check_before_step(self, param: Tensor) -> None:
        state = self.state[param]
        # Whose state was taken away begins anew.
        home = self._homes.get(param) if state else None
        if home is None:
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
        if home is None:
            return
        dtype, device = home
        shape = state.get("exp_avg", param).shape
        if param.dtype != dtype or param.shape != shape:
            raise ValueError(
                f"{self._name(param)} was {dtype} {list(shape)} at its "
                f"first step and is {param.dtype} {list(param.shape)} now; cast the model first "
                "and make the optimizer then"
            )
        if param.device != device:
            raise ValueError(
                f"{self._name(param)} was on {device} at its first step and is on {param.device} "
                "now; move the model first and make the optimizer then, or give a new optimizer "
                "this one's state_dict()"
            )

    def _check_bits(self, update: Update, state_bits: int) -> None:
        if update.bits != state_of.bits_for(update.param, state_bits):
            raise ValueError(
                f"{self._name(update.param)} has {update.bits}-bit state and its group says "
                f"state_bits {state_bits!r} now; set it back, or make a new optimizer"
            )

    def _plan(self) -> list[tuple[dict[str, Any], list[Update]]]:
        """What is to be stepped in each group: checked, with state where its pager wants it.

        State that is elsewhere, as in a copied optimizer, or in other tensors than it should be,
        keeps its numbers.
        """
        stepped = []
        for group in self.param_groups:
            state_bits = group["state_bits"]
            known: list[tuple[Tensor, Update | None]] = []
            for param in group["params"]:
                if param.grad is None:
                    continue
                seen = self._seen.get(param)
                again = seen and seen.again(param, self.state[param], state_bits)
                if again is None:
                    self._check_before_step(param)
                known.append((param, again))
            stepped.append((group, known))
        plan: list[tuple[dict[str, Any], list[Update]]] = []
        wanted: list[tuple[Tensor, int]] = []
        for group, known in stepped:
            updates: list[Update] = []
            for param, again in known:
                if again is not None:
                    updates.append(again)
                    continue
                state = self.state[param]
                if not state:
                    wanted.append((param, state_of.bits_for(param, group["state_bits"])))
                    continue
                update = update_of(param, state)
                self._check_bits(update, group["state_bits"])
                updates.append(update)
                if not (is_whole(update) and self._placement.holds(param, update.moments)):
                    wanted.append((param, update.bits))
                elif not self._on_card(update):
                    self._see(update, group["state_bits"])
            plan.append((group, updates))
        if not wanted:
            return plan
        for param, fresh in self._new_states(wanted, self._placement).items():
            state = self.state[param]
            if state:
                state_of.fill_state(fresh, state, self._name(param))
            state.update(fresh)
            self._homes[param] = _home(param)
        return [
            (group, [update_of(param, self.state[param]) for param, _ in known])
            for group, known in stepped
        ]

    def _see(self, update: Update, state_bits: int) -> None:
        seen = Seen.of(update, state_bits)
        if seen is not None:
            self._seen[update.param] = seen

    def _new_states(
        self, wanted: list[tuple[Tensor, int]], placement: Placement
    ) -> dict[Tensor, state_of.State]:
        """State before the first step, of parameters with so many bits each: all, or none."""
        if not wanted:
            return {}
        bits_of = {
            param: state_of.bits_for(param, group["state_bits"])
            for group in self.param_groups
            for param in group["params"]
        }
        bits_of.update(wanted)
        everyone = [Wanted(param, state_of.moment_dtype(bits)) for param, bits in bits_of.items()]
        placement.keep(self.state)
        moments = placement.add(
            [Wanted(param, state_of.moment_dtype(bits)) for param, bits in wanted], everyone
        )
        return {
            param: state_of.new_state(param, bits, of_param)
            for (param, bits), of_param in zip(wanted, moments, strict=True)
        }

    def page_out(self) -> None:
        """Give the GPU memory that state takes back, ahead of work that needs it.

        The driver would do so by itself when the memory is asked for, but in the midst of the work.
        It holds the room ready for whoever asks next, which need not show as free memory. With the
        pager "unified"; the others have nothing to give. Waits until it is done.
        """
        self._placement.keep(self.state)
        self._placement.page_out()

    def page_in(self) -> None:
        """Begin to bring state back to the GPU, as far as there is room, ahead of a step.

        A step does so by itself. With the pager "unified"; with the others nothing has to come.
        Does not wait.
        """
        self._placement.keep(self.state)
        self._placement.page_in()

    def paging_report(self) -> PagingReport:
        """Where the state is, and what paging did so far."""
        self._placement.keep(self.state)
        params = [param for group in self.param_groups for param in group["params"]]
        return self._placement.report(
            [
                (param, state_of.local_moments(self.state[param]))
                for param in params
                if self.state.get(param)
            ]
        )

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
        placement = self._placement.renewed()

        # torch casts floating-point state to the parameter's dtype. It is given the groups alone;
        # hooks, before and after, see everything.
        def take(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            restored = read_state_dict(state_dict, self.param_groups, self._name)
            wanted = [(one.param, one.bits) for one in restored.states]
            states.update(self._new_states(wanted, placement))
            for one in restored.states:
                state_of.fill_state(states[one.param], one.fields, self._name(one.param))
            return {**state_dict, "param_groups": restored.groups, "state": restored.other}

        def put(_: torch.optim.Optimizer) -> None:
            self.state.update(states)
            self._placement = placement
            self._seen = {}
            self._homes = {param: _home(param) for param in states}

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _home(param: Tensor) -> tuple[torch.dtype, torch.device]:
    return param.dtype, param.device
