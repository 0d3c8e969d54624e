"""One step of the parameters on a card: a launch that looks at gradients, then one a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit import _core, cuda_ops
from fourbit.distributed import local
from fourbit.operands import FLOAT_DTYPES
from fourbit.optim.options import options_of
from fourbit.optim.paging.card import Card
from fourbit.optim.paging.pager import Pager
from fourbit.optim.paging.round import Piece, Round
from fourbit.optim.sharded import local_scales
from fourbit.optim.state import BLOCK_SIZE, SCALES
from fourbit.optim.update import Update, finish, next_steps

_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES}

Plan = Sequence[tuple[Mapping[str, Any], list[Update]]]
"""Groups, and what of them is to be stepped."""


class DamagedStateError(ValueError):
    """8-bit state whose scales are not finite; nothing was stepped.

    Attributes:
        param: whose state it is.
        field: the scales.
    """

    def __init__(self, param: Tensor, field: str) -> None:
        super().__init__(f"{field} holds NaN or infinity; the state is damaged")
        self.param = param
        self.field = field


class CardStep:
    """The step of the parameters on one card, under way once this is made.

    The processor waits for the card in `finish`, so that several cards step at the same time. Once
    it is made it must be finished, whatever became of the others.

    Args:
        plan: what is to be stepped, all on that card.
        card: where it is.
        pager: where its moments are.
    """

    def __init__(self, plan: Plan, card: Card, pager: Pager) -> None:
        self._card = card
        self._updates = [update for _, chosen in plan for update in chosen]
        # The kernel takes no empty tensors; there is nothing in them to be skipped for.
        self._filled = [i for i, update in enumerate(self._updates) if update.values.numel()]
        self._launched: _Launched | None = None
        if self._filled:
            filled = [self._updates[index] for index in self._filled]
            self._launched = _launch(plan, filled, card, pager)

    def finish(self) -> list[Tensor]:
        """Wait for the card, and count the step of what was stepped.

        Returns:
            The parameters that were skipped, because their gradient is not finite or too large.

        Raises:
            DamagedStateError: for 8-bit state whose scales are not finite; nothing was stepped.
        """
        flags: list[int] = []
        if self._launched is not None:
            # The one moment of a step at which the processor waits for the card.
            flags = self._card.read(self._launched.flags)
            self._launched.round.finish()
            if flags.pop():
                raise _damage(self._updates)
        skipped = [index for index, flag in zip(self._filled, flags, strict=True) if flag]
        finish(self._updates, skipped)
        return [self._updates[index].param for index in skipped]


class _Launched(NamedTuple):
    """Launches that are under way, and what they use.

    Attributes:
        flags: one for each parameter that is not empty, and one for damaged state.
        segments: what the kernel is told.
        round: the launches.
    """

    flags: Tensor
    segments: Tensor
    round: Round


def _launch(plan: Plan, filled: list[Update], card: Card, pager: Pager) -> _Launched:
    round_ = pager.begin({update.param: update.moments for update in filled})
    table = _Table(plan, filled)
    slices = [table.add(pieces) for pieces in round_.visits]
    everything = _Slice(0, sum(part.segments for part in slices), 0, table.tiles)
    segments = table.on(card.device)
    flags = torch.zeros(len(filled) + 1, dtype=torch.int32, device=card.device)
    program = cuda_ops.general_program("adamw", card.device)
    stream = cuda_ops.stream_of(card.device)

    def launch(kernel: str, part: _Slice) -> None:
        first = segments[part.first * _core.ADAMW_SEGMENT_BYTES :]
        verdicts = flags.data_ptr(), flags[len(filled) :].data_ptr()
        arguments = first.data_ptr(), part.segments, part.first_tile, part.tiles, *verdicts
        program.launch(kernel, stream, arguments)

    launch("fourbit_adamw_check", everything)
    round_.run(lambda index: launch("fourbit_adamw", slices[index]))
    return _Launched(flags, segments, round_)


class _Slice(NamedTuple):
    """Segments of the table that one launch takes.

    Attributes:
        first: the first one's number.
        segments: how many there are.
        first_tile: tiles of all segments before.
        tiles: tiles of these.
    """

    first: int
    segments: int
    first_tile: int
    tiles: int


class _Entry(NamedTuple):
    """What the table needs of a parameter.

    Attributes:
        update: its part in the step.
        number: of its flag.
        group: of its options.
        step: which one it is, counted from 1.
    """

    update: Update
    number: int
    group: int
    step: int


class _Table:
    """What the kernel is told of all pieces of parameters.

    Args:
        plan: what is to be stepped.
        filled: what of it is not empty; a parameter's place there is its flag's.
    """

    def __init__(self, plan: Plan, filled: Sequence[Update]) -> None:
        self.tiles = 0
        self._bytes = bytearray()
        self._options = [options_of(group) for group, _ in plan]
        groups = [
            group
            for group, (_, updates) in enumerate(plan)
            for update in updates
            if update.values.numel()
        ]
        steps = next_steps(filled)
        self._entries = {
            update.param: _Entry(update, number, group, step)
            for number, (update, group, step) in enumerate(zip(filled, groups, steps, strict=True))
        }

    def add(self, pieces: Sequence[Piece]) -> _Slice:
        """Append what one launch steps."""
        first, first_tile = len(self._bytes) // _core.ADAMW_SEGMENT_BYTES, self.tiles
        entries = [(self._entries[piece.param], piece) for piece in pieces]
        # One call takes as many as have the same options.
        for group, run in groupby(entries, key=lambda item: item[0].group):
            segments = [_segment(entry, piece) for entry, piece in run]
            written, self.tiles = _core.adamw_segments(
                segments, first_tile=self.tiles, **self._options[group]
            )
            self._bytes += written
        return _Slice(first, len(pieces), first_tile, self.tiles - first_tile)

    def on(self, device: torch.device) -> Tensor:
        """All of it: uint8 on a device."""
        table = torch.frombuffer(self._bytes, dtype=torch.uint8)
        if device.type != "cuda":
            return table
        # From other memory the copy would wait for the card.
        return table.pin_memory().to(device, non_blocking=True)


def _segment(
    entry: _Entry, piece: Piece
) -> tuple[tuple[int, ...], int, tuple[str, str], int, int, int]:
    (param, values, grad, state, bits, _), start = entry.update, piece.start
    scales = [0, 0]
    if bits == 8:
        offset = 4 * (start // BLOCK_SIZE)
        scales = [
            local_scales(state[field], param, BLOCK_SIZE).data_ptr() + offset for field in SCALES
        ]
    own = (
        values.data_ptr() + start * values.element_size(),
        grad.data_ptr() + start * grad.element_size(),
    )
    return (
        (*own, *piece.addresses, *scales),
        piece.stop - start,
        (_NAMES[values.dtype], _NAMES[grad.dtype]),
        bits,
        entry.step,
        entry.number,
    )


def _damage(updates: list[Update]) -> DamagedStateError:
    for update in updates:
        for field in SCALES:
            scales = update.state.get(field)
            if scales is not None and not bool(local(scales).isfinite().all()):
                return DamagedStateError(update.param, field)
    raise AssertionError("the kernel found damage that is not there")
