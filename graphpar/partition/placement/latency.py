"""Placement for the latency of one sample: a serial dynamic programme, local search, and an ILP.

*First answer.* Over ideals (see `ideals`), g[J, a] is the least time in which ideal J can be
done one piece after the other by a accelerators, every other block alone on the CPUs:

    g[J, a] = min( min over I of g[I, a - 1] + accelerator load of J - I,
                   min over blocks b of g[J - b, a] + CPU time of b ).

CPUs really run side by side, so the true latency is at most g. Blocks are colour classes with the cycles
among them put together, which is more than the rules ask for; local search goes on with single classes
(`units`), together with what contiguity asks to come along. The bounds are those of
`paths`, `latency_bound` and of the ILP of `latency_program`.
"""

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import networkx as nx
import numpy as np

from graphpar.partition.answers import relative_gap
from graphpar.partition.placement.forks import forks
from graphpar.partition.placement.graph import Blocks, IntArray, contract, product
from graphpar.partition.placement.ideals import BoolArray, Ideals, Transfers, all_ideals, chain_ideals
from graphpar.partition.placement.latency_bound import IdealWalk, walk_ideals
from graphpar.partition.placement.latency_program import LatencyProgram, is_worth_writing
from graphpar.partition.placement.paths import path_bound
from graphpar.partition.placement.reach import Reach
from graphpar.partition.placement.simple import simple_placements
from graphpar.partition.placement.units import Devices, Units, units_of
from graphpar.partition.problems import NodeId, PlacementProblem
from graphpar.partition.solver import OPTIMALITY_TOLERANCE

_MOST_IDEALS = 5_000
"""Ideals up to which the serial dynamic programme looks at all pairs."""

_PATHS_SHARE, _IDEALS_SHARE, _SERIAL_SHARE, _SEARCH_SHARE = 0.2, 0.7, 0.4, 0.5
"""Most of the time left for bounds of paths, those over ideals, the serial programme, and local search
before the ILP."""

_LONGEST_SEARCH_S = 10.0
"""Seconds after which local search has mostly found what it finds."""

_FEW_ITEMS = 12
"""Items below which the ILP needs no bound from elsewhere."""

_MOST_SEARCHES = 100
"""Local searches before the ILP; small problems are done sooner than their share of the time."""

_COMPILER_S = 4.0
"""On an installation's first run the bound over ideals is compiled, which cannot be cut short."""

_MOST_KICKED = 4
"""Random moves between two local searches."""

_LEAST_S = 0.1
"""Seconds that no search or ILP is begun with."""

Tell = Callable[[str, float | None, float | None], None]


class LatencySearch:
    """The best placement so far, the time of one sample under it, and a bound on all.

    Attributes:
        value: That time, infinite before there is a placement.
        bound: A lower bound on every placement's time.
        finished: Whether the search was exhaustive.
    """

    def __init__(
        self, problem: PlacementProblem, left_s: Callable[[], float], gap: float, threads: int, tell: Tell
    ) -> None:
        self._problem, self._gap, self._threads, self._tell = problem, gap, threads, tell
        self._left_s = left_s
        self._units = units_of(problem)
        self._devices: Devices | None = None
        self.value, self.bound, self.finished = math.inf, 0.0, False

    @property
    def best(self) -> dict[NodeId, int] | None:
        """The best placement so far."""
        if not self._problem.operators:
            return {}
        return None if self._devices is None else self._units.placement(self._problem, self._devices)

    def search(self) -> None:
        """Simple and serial answers with bounds, local search, and an ILP where one can be written."""
        self.finished = not self._problem.operators
        if self.finished:
            return
        reach = Reach(self._units)
        self._begin(reach)
        if not self._is_done():
            self._improve(reach)
        if self._is_done():
            return
        if is_worth_writing(self._units):
            self._prove(reach)
        elif self._devices is not None:
            self._offer(*_search_around(reach, self._devices, self.value, self._is_over, math.inf))

    def _begin(self, reach: Reach) -> None:
        """First answers, and the bounds that come with them."""
        units, left_s = self._units, self._left_s
        blocks = contract(self._problem, forward_only=False)
        for placement in simple_placements(self._problem, blocks):
            self._try(
                [
                    placement[self._problem.operators[units.operators[items[0]][0]].node_id]
                    for items in units.items
                ]
            )
        self._say("simple")
        bound_s = (1.0 - _PATHS_SHARE) * left_s()
        self.bound = path_bound(reach, lambda: left_s() <= bound_s)
        walk = IdealWalk()
        if units.num_items >= _FEW_ITEMS and left_s() >= _COMPILER_S:
            walk = walk_ideals(reach, self.value, _IDEALS_SHARE * left_s(), min(2, os.cpu_count() or 1))
            self.bound = max(self.bound, walk.bound)
        serial = [walk.devices] if walk.devices else _serial_answers(self._problem, units, blocks, left_s)
        for devices in serial:
            self._try(devices)
        self._say("serial")

    def _improve(self, reach: Reach) -> None:
        """Paths side by side, then moves that help, then such moves from answers nearby."""
        if self._devices is None:
            return
        for devices in forks(self._units, self._devices):
            if self._is_over():
                break
            self._try(devices)
        if self._is_done():
            return
        self._offer(*_local_search(reach, self._devices, self.value, self._is_over))
        self._say("local")
        if self._units.num_items >= _FEW_ITEMS and not self._is_done():
            left_s = self._left_s()
            end_s = max(_LEAST_S, left_s - min(_LONGEST_SEARCH_S, _SEARCH_SHARE * left_s))
            self._offer(
                *_search_around(reach, self._devices, self.value, lambda: self._left_s() <= end_s)
            )
            self._say("search")

    def _prove(self, reach: Reach) -> None:
        """The ILP for what is better than the best answer."""
        model = LatencyProgram(self._units, self.value, self.bound)
        outcome = model.program.solve(
            time_limit_s=max(_LEAST_S, self._left_s()),
            relative_gap=self._gap,
            threads=self._threads,
            start=None,
        )
        if outcome.status == "infeasible":
            # Nothing beats the first answer; without one there is nothing at all.
            self.bound, self.finished = max(self.bound, self.value), True
            return
        if outcome.bound is not None:
            self.bound = max(self.bound, min(outcome.bound, self.value))
        if outcome.has_point and self._try(devices := model.devices(outcome.values)):
            self._offer(*_local_search(reach, devices, self.value, lambda: self._left_s() <= 0))
        self._say("prove")

    def _try(self, devices: Devices) -> bool:
        """Take these devices if one sample takes less time on them."""
        return self._offer(devices, self._units.latency(devices))

    def _offer(self, devices: Devices, value: float) -> bool:
        is_better = value < self.value
        if is_better:
            self._devices, self.value = devices, value
        return is_better

    def _is_over(self) -> bool:
        return self._left_s() <= _LEAST_S

    def _is_done(self) -> bool:
        close = self._devices is not None and (
            relative_gap(self.value, self.bound) <= max(self._gap, OPTIMALITY_TOLERANCE)
        )
        return self._is_over() or close

    def _say(self, phase: str) -> None:
        self._tell(phase, None if self._devices is None else self.value, self.bound)


def _serial_answers(
    problem: PlacementProblem, units: Units, blocks: Blocks, left_s: Callable[[], float]
) -> list[Devices]:
    ideals = all_ideals(blocks, _MOST_IDEALS)
    if ideals is None:
        order: nx.DiGraph[int] = nx.DiGraph()
        order.add_nodes_from(range(blocks.num_blocks))
        order.add_edges_from(blocks.edges)
        ideals = chain_ideals(blocks, [list(nx.topological_sort(order))])
    block_of = {v: b for b, members in enumerate(blocks.operators) for v in members}
    end_s = (1.0 - _SERIAL_SHARE) * left_s()
    return [
        [by_block[block_of[units.operators[items[0]][0]]] for items in units.items]
        for by_block in _serial(problem, blocks, ideals, lambda: left_s() - end_s)
    ]


def _serial(
    problem: PlacementProblem, blocks: Blocks, ideals: Ideals, left_s: Callable[[], float]
) -> list[Devices]:
    """The best serial schedule for every number of accelerators."""
    member, num = ideals.member, problem.num_accelerators
    finite = replace(
        blocks, accelerator=np.where(np.isfinite(blocks.accelerator), blocks.accelerator, 1e30)
    )
    work, size = product(member, finite.accelerator), product(member, blocks.size)
    transfers, outside = Transfers(blocks, member), ~member
    value = np.full((num + 1, len(member)), np.inf)
    value[0, 0] = 0.0
    origin = np.full((num + 1, len(member), 2), -1, dtype=np.int64)
    sizes = member.sum(axis=1)
    for j in range(1, len(member)):
        if left_s() <= 0:
            return []
        smaller = np.arange(int(np.searchsorted(sizes, sizes[j])))
        extra = product(member[smaller], outside[j].astype(np.float32))
        inside = smaller[extra == 0]
        load = (work[j] - work[inside]) + transfers.between(slice(j, j + 1), inside)[0]
        load[size[j] - size[inside] > problem.memory_limit * (1 + 1e-12)] = np.inf
        load[load > 1e29] = np.inf
        single = inside[sizes[inside] == sizes[j] - 1] if problem.num_cpus else inside[:0]
        alone = np.array([blocks.cpu[member[j] & outside[i]].sum() for i in single])
        for a in range(num + 1):
            if single.size:
                total = value[a, single] + alone
                k = int(total.argmin())
                if total[k] < value[a, j]:
                    value[a, j], origin[a, j] = total[k], (single[k], 1)
            if a:
                total = value[a - 1, inside] + load
                k = int(total.argmin())
                if total[k] < value[a, j]:
                    value[a, j], origin[a, j] = total[k], (inside[k], 0)
    return [_follow(member, origin, a) for a in range(num + 1) if np.isfinite(value[a, -1])]


def _follow(member: BoolArray, origin: IntArray, a: int) -> Devices:
    devices, j = [0] * member.shape[1], len(member) - 1
    while j:
        i, on_cpu = map(int, origin[a, j])
        for b in np.flatnonzero(member[j] & ~member[i]):
            devices[int(b)] = 0 if on_cpu else a
        a, j = (a, i) if on_cpu else (a - 1, i)
    return devices


def _search_around(
    reach: Reach,
    devices: Devices,
    value: float,
    should_stop: Callable[[], bool],
    most_searches: float = _MOST_SEARCHES,
) -> tuple[Devices, float]:
    """Local search, again and again from the best answer with a few classes moved at random."""
    units, draw = reach.units, random.Random(0)
    best, best_value = _local_search(reach, devices, value, should_stop)
    moves = list(itertools.islice(_moves(reach, best, draw), 4 * units.num_classes))
    searches = 0
    while searches < most_searches and not should_stop() and moves:
        searches += 1
        trial = list(best)
        for _ in range(draw.randint(1, _MOST_KICKED)):
            for c, d in draw.choice(moves).items():
                trial[c] = d
        found = units.latency(trial)
        if found < math.inf:
            trial, found = _local_search(reach, trial, found, should_stop, draw)
        if found < best_value:
            best, best_value = trial, found
            moves = list(itertools.islice(_moves(reach, best, draw), 4 * units.num_classes))
    return best, best_value


def _local_search(
    reach: Reach,
    devices: Devices,
    value: float,
    should_stop: Callable[[], bool],
    draw: random.Random | None = None,
) -> tuple[Devices, float]:
    """Take moves that help until none does."""
    improved = True
    while improved and not should_stop():
        improved = False
        for move in _moves(reach, devices, draw or random.Random(0)):
            if should_stop():
                break
            trial = list(devices)
            for c, d in move.items():
                trial[c] = d
            if (found := reach.units.latency(trial)) < value * (1 - 1e-12):
                devices, value, improved = trial, found, True
                if draw is not None:
                    break
    return devices, value


def _moves(reach: Reach, devices: Devices, draw: random.Random) -> Iterator[dict[int, int]]:
    """One class elsewhere, alone or with what it must not be parted from there, in random order.

    Joining a device it takes everything along that lies between it and the device's set; leaving one it
    takes what comes before or after it there.
    """
    units = reach.units
    classes = list(range(units.num_classes))
    draw.shuffle(classes)
    for c in classes:
        for d in range(units.num_accelerators + 1):
            if devices[c] == d:
                continue
            yield {c: d}
            if d:
                held = [e for e, present in enumerate(devices) if present == d]
                yield dict.fromkeys(reach.between([c, *held]), d)
            if devices[c]:
                for others in reach.beyond(c):
                    yield {c: d} | {e: d for e in others if devices[e] == devices[c]}
    for c in classes:
        for i in units.items[c]:
            for j in units.after[i]:
                other = units.class_of[j]
                if other != c:
                    yield from ({c: d, other: d} for d in range(units.num_accelerators + 1))
