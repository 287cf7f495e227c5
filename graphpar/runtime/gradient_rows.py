"""ZeRO level 2: of the sum of gradients every replica of a stage holds its rows alone.

Replicas run unlike microbatches, at unlike times and maybe unlike numbers of them, so there is no moment
at which all of them could meet. Whoever has gradients gives the others their rows of them at once, while
its backward goes on from unit to unit, and lets go of them: at any time it holds whole gradients of one
unit. What arrives is added up by a thread for each of the others, whatever the rank itself is at.

Sums come in one order, that of `Scatter.order`, so that a step gives the same bits every time. That order
is one in which the backwards can end (`graphpar.schedule.backward_order`), which is why nobody waits in a
circle: the earliest that is not done waits for nothing but arrivals, which threads take.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from graphpar.errors import RunError
from graphpar.runtime.emulate import Pace
from graphpar.runtime.program import Scatter
from graphpar.runtime.transport import Arrival, Transport
from graphpar.runtime.zero import Shard, Shards

_FIRST_TAG = 2**28
"""Tags of messages between stages are below, those of meetings above."""
_TAGS = 2**20
"""Messages from one rank to another come in order; so many may be on their way."""
_POST_AHEAD = 2
"""Pieces from one rank that there is room for."""
_ARRIVING_BYTES = 8 * 2**20
"""Room for pieces from all ranks together, and the largest and the smallest size of one."""
_MOST_BYTES, _LEAST_BYTES = 2**20, 2**16


@dataclass
class _Parcel:
    """Parameters whose gradients travel together; all of one dtype.

    Attributes:
        labels: Which ones.
        shards: The same.
        is_last: Whether its unit ends with it.
        rows: Number of elements of each replica's rows.
        total: Sum of the own rows so far; None before there is any.
        turn: How many microbatches have been added.
    """

    labels: tuple[str, ...]
    shards: tuple[Shard, ...]
    is_last: bool
    rows: tuple[int, ...]
    total: torch.Tensor | None = None
    turn: int = 0


@dataclass(frozen=True)
class _Piece:
    """A part of what another replica gives of a parcel in one microbatch."""

    turn: int
    parcel: _Parcel
    start: int
    size: int
    ends: bool


@dataclass
class _Backward:
    """The backward at hand: its turn, labels whose gradients are there, and which parcel is next."""

    turn: int
    ready: set[str] = field(default_factory=set)
    next: int = 0


class GradientRows:
    """The gradients of one rank that are divided among the replicas of its stage.

    Args:
        scatter: Who gives whom what.
        shards: The rank's divided weights.
        transport: The way to the others.
        pace: Told of waiting for them.

    Attributes:
        labels: The parameters that are divided.
    """

    def __init__(self, scatter: Scatter, shards: Shards, transport: Transport, pace: Pace) -> None:
        self.scatter = scatter
        self.transport = transport
        self.pace = pace
        self._parcels: list[_Parcel] = []
        for unit in scatter.units:
            for labels in unit:
                own = tuple(shards.by_label[label] for label in labels)
                members = range(len(scatter.ranks))
                rows = tuple(sum(s.of(s.whole, k).numel() for s in own) for k in members)
                self._parcels.append(_Parcel(labels, own, labels is unit[-1], rows))
        self.labels = frozenset(label for parcel in self._parcels for label in parcel.labels)
        others = max(1, len(scatter.ranks) - 1)
        self._piece_bytes = min(_MOST_BYTES, max(_LEAST_BYTES, _ARRIVING_BYTES // (_POST_AHEAD * others)))
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._backward: _Backward | None = None
        self._sent = [0] * len(scatter.ranks)
        self._away: list[Callable[[], None]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take the others' rows while a step runs; `finish` must come before its end."""
        self._failure, self._sent = None, [0] * len(self.scatter.ranks)
        for parcel in self._parcels:
            parcel.total, parcel.turn = None, 0
        hooks = [
            shard.whole.register_post_accumulate_grad_hook(self._hook(label))  # type: ignore[no-untyped-call]
            for parcel in self._parcels
            for label, shard in zip(parcel.labels, parcel.shards, strict=True)
        ]
        givers = sorted({k for k in self.scatter.owners if k != self.scatter.own})
        self._threads = [
            threading.Thread(target=self._receive, args=(k,), name=f"graphpar-rows-{k}", daemon=True)
            for k in givers
        ]
        for thread in self._threads:
            thread.start()
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def backward(self, microbatch: int) -> Iterator[None]:
        """Gradients of backwards inside are those of a microbatch, all of which are given away."""
        self._backward = _Backward(self.scatter.order.index(microbatch))
        yield
        for parcel in self._parcels[self._backward.next :]:
            self._give(parcel, self._backward.turn)
        self._backward = None

    def finish(self) -> None:
        """Wait for the last rows and make them the gradients that the optimiser steps with."""
        with self.pace.waiting():
            for thread in self._threads:
                thread.join()
        self._raise_failure()
        for parcel in self._parcels:
            sizes = [shard.rows.numel() for shard in parcel.shards]
            total = parcel.total
            if total is None:
                total = parcel.shards[0].rows.new_zeros(sum(sizes))
            parcel.total = None
            for shard, rows in zip(parcel.shards, torch.split(total, sizes), strict=True):
                shard.rows.grad = rows.view_as(shard.rows)

    def _hook(self, label: str) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            running = self._backward
            if running is None:
                return
            running.ready.add(label)
            while running.next < len(self._parcels):
                parcel = self._parcels[running.next]
                if not running.ready.issuperset(parcel.labels):
                    return
                running.next += 1
                self._give(parcel, running.turn)

        return arrived

    def _give(self, parcel: _Parcel, turn: int) -> None:
        """Send everybody's rows, add the own ones, and let go of the whole."""
        gradients = [_taken(shard.whole) for shard in parcel.shards]
        for place, rank in enumerate(self.scatter.ranks):
            if place == self.scatter.own:
                continue
            rows = _rows(parcel, gradients, place)
            for piece in torch.split(rows, self._elements(rows)):
                tag = _FIRST_TAG + self._sent[place] % _TAGS
                self._sent[place] += 1
                self._away.append(self.transport.start_send(rank, piece, tag))
        with self.pace.waiting():
            self._await_turn(parcel, turn)
        self._add(_Piece(turn, parcel, 0, parcel.rows[self.scatter.own], True), gradients)
        if parcel.is_last:
            with self.pace.waiting():
                for wait in self._away:
                    wait()
            self._away.clear()

    def _add(self, piece: _Piece, given: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """Add rows to the sum; it is their turn."""
        parcel = piece.parcel
        rows = given if isinstance(given, torch.Tensor) else _rows(parcel, given, self.scatter.own)
        with torch.no_grad():
            if parcel.total is None:
                parcel.total = rows.new_empty(parcel.rows[self.scatter.own])
            place = parcel.total[piece.start : piece.start + piece.size]
            if piece.turn == 0:
                place.copy_(rows)
            else:
                place.add_(rows)
        if piece.ends:
            with self._changed:
                parcel.turn += 1
                self._changed.notify_all()

    def _await_turn(self, parcel: _Parcel, turn: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: parcel.turn == turn or self._failure is not None)
        self._raise_failure()

    def _receive(self, giver: int) -> None:
        """Take all that one replica gives in a step; a thread's work."""
        try:
            posted: deque[tuple[_Piece, Arrival]] = deque()
            expected = enumerate(self._expected(giver))
            while True:
                while len(posted) < _POST_AHEAD and (following := next(expected, None)) is not None:
                    posted.append((following[1], self._post(giver, *following)))
                if not posted:
                    return
                piece, arrival = posted.popleft()
                rows = arrival.wait()
                self._await_turn(piece.parcel, piece.turn)
                self._add(piece, rows)
        except BaseException as error:
            self._fail(error)

    def _expected(self, giver: int) -> Iterator[_Piece]:
        for turn, owner in enumerate(self.scatter.owners):
            if owner != giver:
                continue
            for parcel in self._parcels:
                whole = parcel.rows[self.scatter.own]
                step = self._elements(parcel.shards[0].rows)
                for start in range(0, whole, step):
                    size = min(step, whole - start)
                    yield _Piece(turn, parcel, start, size, start + size == whole)

    def _post(self, giver: int, number: int, piece: _Piece) -> Arrival:
        dtype = piece.parcel.shards[0].rows.dtype
        tag = _FIRST_TAG + number % _TAGS
        return self.transport.post(self.scatter.ranks[giver], (piece.size,), dtype, tag)

    def _elements(self, like: torch.Tensor) -> int:
        """Elements of a piece."""
        return self._piece_bytes // like.element_size()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RunError(f"Replicas could not give each other gradients: {self._failure}")


def _taken(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's gradient, which it has no more; zeros where backward did not reach it."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def _rows(parcel: _Parcel, gradients: Sequence[torch.Tensor], member: int) -> torch.Tensor:
    """A member's rows of a parcel in one line; of a single parameter where they lie."""
    rows = [
        shard.of(gradient, member).reshape(-1)
        for shard, gradient in zip(parcel.shards, gradients, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
