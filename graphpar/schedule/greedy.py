"""1F1B where stages have replicas: play the pipeline through and write down what each rank did.

A fixed order per stage would let a replica with a large share hold more microbatches than its
memory was planned for. So the order is found by playing: a rank runs a backward when it can, else
its next forward if it holds fewer microbatches than its limit. Whatever was played can be repeated,
so the order cannot deadlock; and the play itself never stops early, for forwards of a rank start in
ascending order, hence the oldest unfinished microbatch can always go on.

Stages are taken to be balanced: a replica with share m_r of m microbatches needs m / m_r periods
for each, a third of that forward and two thirds backward.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Literal

Work = tuple[Literal["F", "B"], int]
"""Forward or backward of a microbatch."""


def play_1f1b(routes: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[Work]]:
    """For each rank of one pipeline its forwards and backwards in order.

    Args:
        routes: For each microbatch its rank at each stage; ranks are numbered from 0.
        limits: For each rank how many microbatches it may hold between forward and backward.

    >>> play_1f1b([(0, 1), (0, 1), (0, 1)], [2, 1])[0]
    [('F', 0), ('F', 1), ('B', 0), ('F', 2), ('B', 1), ('B', 2)]
    """
    return _Play(routes, limits).run()


class _Play:
    def __init__(self, routes: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        self.routes = routes
        self.limits = limits
        self.rows: list[list[Work]] = [[] for _ in limits]
        self.stage_of = {rank: stage for route in routes for stage, rank in enumerate(route)}
        self.own: list[list[int]] = [[] for _ in limits]
        for microbatch, route in enumerate(routes):
            for rank in route:
                self.own[rank].append(microbatch)
        self.next_forward = [0 for _ in limits]
        self.held = [0 for _ in limits]
        self.busy = [False for _ in limits]
        self.arrived: list[set[int]] = [set() for _ in limits]
        self.returned: list[list[int]] = [[] for _ in limits]
        self.running: list[tuple[float, int, Work]] = []

    def run(self) -> list[list[Work]]:
        for microbatch, route in enumerate(self.routes):
            self.arrived[route[0]].add(microbatch)
        for rank in range(len(self.limits)):
            self._start(rank, 0.0)
        while self.running:
            now, rank, (kind, microbatch) = heappop(self.running)
            self.busy[rank] = False
            awakened = self._pass_on(rank, kind, microbatch)
            self._start(rank, now)
            if awakened is not None:
                self._start(awakened, now)
        return self.rows

    def _pass_on(self, rank: int, kind: str, microbatch: int) -> int | None:
        """Give a finished microbatch to the next rank on its way; None at the end of it."""
        route = self.routes[microbatch]
        stage = self.stage_of[rank]
        if kind == "F" and stage + 1 < len(route):
            self.arrived[route[stage + 1]].add(microbatch)
            return route[stage + 1]
        if kind == "F":
            heappush(self.returned[rank], microbatch)
            return None
        self.held[rank] -= 1
        if stage == 0:
            return None
        heappush(self.returned[route[stage - 1]], microbatch)
        return route[stage - 1]

    def _start(self, rank: int, now: float) -> None:
        if self.busy[rank]:
            return
        work = self._choose(rank)
        if work is None:
            return
        self.rows[rank].append(work)
        self.busy[rank] = True
        period = len(self.routes) / len(self.own[rank])
        share = 1 / 3 if work[0] == "F" else 2 / 3
        heappush(self.running, (now + period * share, rank, work))

    def _choose(self, rank: int) -> Work | None:
        if self.returned[rank]:
            return "B", heappop(self.returned[rank])
        at = self.next_forward[rank]
        if at == len(self.own[rank]) or self.held[rank] == self.limits[rank]:
            return None
        microbatch = self.own[rank][at]
        if microbatch not in self.arrived[rank]:
            return None
        self.next_forward[rank] += 1
        self.held[rank] += 1
        return "F", microbatch
