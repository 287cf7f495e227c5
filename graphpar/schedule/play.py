"""Orders found by playing a pipeline through with the times of its stages.

Used where devices hold several stages (interleaving) or do backwards in two halves (zero bubble), on
stages and devices of unlike speed. Whatever was played can be repeated, so an order found like this
cannot deadlock.

A rank takes microbatches through its stages in groups, about as large as there are ranks, so that later
stages start while a group is still under way (Narayanan et al., 2021, arXiv:2104.04473). It does
forwards while it has fewer than `ahead` microbatches between forward and backward, else a backward, and
waits for whichever is next: as in 1F1B, an order that ranks keep together is better than what is nearest
at hand. While it waits it makes gradients of weights that are still owed, unless what it waits for is
sure to come soon (Qi et al., 2023, arXiv:2401.10241). It must make some before a further forward when
`held` microbatches lack any of their gradients.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

from graphpar.partition.types import StagePace

Kind = Literal["F", "B", "I", "W"]
Work = tuple[Kind, int, int]
"""What, in which stage of the pipeline, for which of its microbatches."""

PATIENCE = 0.5
"""What arrives within this share of the time for gradients of weights is waited for."""


@dataclass(frozen=True)
class Game:
    """A pipeline to be played; everything is numbered from 0 within it.

    Attributes:
        routes: For each microbatch its rank at each stage.
        paces: The times of each stage.
        splits: For each stage whether its backward is done in two halves.
        ahead: For each rank how many microbatches may be between forward and backward, over all stages.
        held: For each rank how many may lack any of their gradients, over all its stages.
        groups: Of how many microbatches each, in order.
        training: Whether there are backwards.
    """

    routes: Sequence[Sequence[int]]
    paces: Sequence[StagePace]
    splits: Sequence[bool]
    ahead: Sequence[int]
    held: Sequence[int]
    groups: Sequence[int]
    training: bool


def play(game: Game) -> list[list[Work]]:
    """For each rank what it does, in order.

    >>> pace = StagePace(1.0, 1.0, 1.0)
    >>> rows = play(Game([(0, 1)] * 3, [pace, pace], [False, True], [2, 1], [2, 2], [3], True))
    >>> [f"{kind}{m}" for kind, _, m in rows[1]]
    ['F0', 'I0', 'F1', 'I1', 'W0', 'F2', 'I2', 'W1', 'W2']
    """
    return _Play(game).run()


@dataclass
class _Rank:
    """What a rank has yet to do, and what it did."""

    forwards: deque[Work]
    backwards: deque[Work]
    row: list[Work] = field(default_factory=list)
    owed: deque[Work] = field(default_factory=deque)
    at_hand: set[Work] = field(default_factory=set)
    due_s: dict[Work, float] = field(default_factory=dict)
    """When what it waits for is sure to arrive."""
    ahead: int = 0
    busy: bool = False


class _Play:
    def __init__(self, game: Game) -> None:
        self.game = game
        self.last = len(game.paces) - 1
        own: list[list[Work]] = [[] for _ in game.ahead]
        for microbatch, route in enumerate(game.routes):
            for stage, rank in enumerate(route):
                own[rank].append(("F", stage, microbatch))
        group_of = [number for number, size in enumerate(game.groups) for _ in range(size)]
        self.ranks = [_Rank(*_in_groups(works, group_of, game.training)) for works in own]
        self.events: list[tuple[float, int, int, Work, bool]] = []
        self.number = 0

    def run(self) -> list[list[Work]]:
        for microbatch, route in enumerate(self.game.routes):
            self.ranks[route[0]].at_hand.add(("F", 0, microbatch))
        touched: Iterable[int] = range(len(self.ranks))
        now = 0.0
        while True:
            for rank in sorted(touched):
                self._start(rank, now)
            if not self.events and not self._force(now):
                return [rank.row for rank in self.ranks]
            now, touched = self.events[0][0], set()
            while self.events and self.events[0][0] == now:
                _, _, rank, work, done = heappop(self.events)
                touched.add(rank)
                if done:
                    self._finish(self.ranks[rank], work)
                else:
                    self.ranks[rank].at_hand.add(work)

    def _start(self, rank: int, now: float) -> None:
        if not self.ranks[rank].busy:
            work = self._choose(rank, now)
            if work is not None:
                self._begin(rank, work, now)

    def _choose(self, rank: int, now: float) -> Work | None:
        """What to do now; None to wait."""
        state = self.ranks[rank]
        wanted = self._wanted(rank)
        full = state.ahead + len(state.owed) >= self.game.held[rank]
        if wanted is not None and wanted in state.at_hand and not (full and wanted[0] == "F"):
            return wanted
        if not state.owed:
            return None
        patience_s = PATIENCE * self.game.paces[state.owed[0][1]].weight_s
        due_s = state.due_s.get(wanted) if wanted is not None else None
        soon = due_s is not None and now < due_s < now + patience_s
        return None if soon else state.owed[0]

    def _wanted(self, rank: int) -> Work | None:
        """The next forward or backward in order."""
        state = self.ranks[rank]
        if state.forwards and (state.ahead < self.game.ahead[rank] or not state.backwards):
            return state.forwards[0]
        return state.backwards[0] if state.backwards else None

    def _begin(self, rank: int, work: Work, now: float) -> None:
        state = self.ranks[rank]
        kind, stage, microbatch = work
        if kind == "F":
            state.forwards.remove(work)
            state.ahead += self.game.training
        elif kind == "B":
            state.backwards.remove(work)
            work = ("I", stage, microbatch) if self.game.splits[stage] else work
        else:
            state.owed.popleft()
        state.row.append(work)
        state.busy = True
        end_s = now + self._seconds(work)
        self._at(end_s, rank, work, True)
        following = self._following(work)
        if following is not None:
            to = self.game.routes[microbatch][following[1]]
            if to != rank:
                end_s += self.game.paces[min(stage, following[1])].transfer_s
            self.ranks[to].due_s[following] = end_s
            self._at(end_s, to, following, False)

    def _at(self, time_s: float, rank: int, work: Work, done: bool) -> None:
        self.number += 1
        heappush(self.events, (time_s, self.number, rank, work, done))

    def _seconds(self, work: Work) -> float:
        kind, stage, _ = work
        pace = self.game.paces[stage]
        both = pace.backward_s + pace.weight_s
        return {"F": pace.forward_s, "B": both, "I": pace.backward_s, "W": pace.weight_s}[kind]

    def _following(self, work: Work) -> Work | None:
        """What can be done once this is."""
        kind, stage, microbatch = work
        if kind == "F" and stage < self.last:
            return "F", stage + 1, microbatch
        if kind == "F":
            return ("B", stage, microbatch) if self.game.training else None
        return ("B", stage - 1, microbatch) if kind != "W" and stage > 0 else None

    def _finish(self, state: _Rank, work: Work) -> None:
        kind, stage, microbatch = work
        state.busy = False
        state.ahead -= kind in "BI"
        if kind == "I":
            state.owed.append(("W", stage, microbatch))

    def _force(self, now: float) -> bool:
        """Where all wait for each other, let the oldest microbatch go on out of turn, if there is one."""
        ready = [
            (work[2], work[0] == "F", work[1], rank)
            for rank, state in enumerate(self.ranks)
            for work in state.at_hand.intersection((*state.forwards, *state.backwards))
        ]
        if not ready:
            return False
        microbatch, forward, stage, rank = min(ready)
        self._begin(rank, ("F" if forward else "B", stage, microbatch), now)
        return True


def _in_groups(
    works: Iterable[Work], group_of: Sequence[int], training: bool
) -> tuple[deque[Work], deque[Work]]:
    """A rank's forwards and backwards in the order in which it wants to do them."""
    ahead = sorted(works, key=lambda work: (group_of[work[2]], work[1], work[2]))
    back = sorted(ahead, key=lambda work: (group_of[work[2]], -work[1], work[2]))
    return deque(ahead), deque(("B", s, m) for _, s, m in back if training)
