"""Placement for the latency of one sample: a serial dynamic programme, local search, and an ILP.

*First answer.* Over ideals (see `place_ideals`), g[J, a] is the least time in which ideal J can be
done one piece after the other by a accelerators, every other block alone on the CPUs:

    g[J, a] = min( min over I of g[I, a - 1] + accelerator load of J - I,
                   min over blocks b of g[J - b, a] + CPU time of b ).

CPUs really run side by side, so the true latency is at most g. Moving one block at a time improves it.

*Proof.* With x[b, d] = 1 if block b is on device d (0 the CPUs), e[b] the end of b, s[d] and f[d] start
and end of accelerator d, and for each bundle q (the output of one block u) in[q, d], out[q, d]:

    minimise T >= e[b]
    f[d] = s[d] + sum_b acc[b] x[b, d] + sum_q cost[q] (in[q, d] + out[q, d])
    e[b] >= e[u] + cpu[b] x[b, 0]                     for every edge (u, b)
    e[b] >= f[d] - M (1 - x[b, d]),  s[d] >= e[u] - M (1 - x[b, d] + x[u, d])
    in[q, d] >= x[b, d] - x[u, d],  out[q, d] >= x[u, d] - x[b, d]
    sum_b size[b] x[b, d] <= memory,  s[d] <= s[d + 1]
    T >= sum over the path of cpu[b] x[b, 0] + sum_d acc[b] x[b, d]      for some long paths

A path that leaves an accelerator and comes back would have it wait for itself, so contiguity needs no
rows; M is the best latency known, which every better answer's times stay below.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import networkx as nx
import numpy as np

from graphpar.partition.place_check import check_placement
from graphpar.partition.place_graph import Blocks, FloatArray, IntArray, contract
from graphpar.partition.place_ideals import BoolArray, Ideals, Transfers, all_ideals, chain_ideals
from graphpar.partition.place_simple import simple_placements
from graphpar.partition.problems import NodeId, PlacementProblem
from graphpar.partition.solver import Program, Term, Variable

_MOST_IDEALS = 5_000
"""Ideals up to which the serial dynamic programme looks at all pairs."""

_NUM_PATHS = 24
"""Long paths written into the ILP to lift its relaxation."""

Tell = Callable[[str, float | None, float | None], None]


def search_latency(
    problem: PlacementProblem, left_s: Callable[[], float], gap: float, threads: int, tell: Tell
) -> tuple[dict[NodeId, int] | None, float, bool]:
    """Answer, lower bound, and whether the search was exhaustive."""
    if not problem.operators:
        return {}, 0.0, True
    blocks = contract(problem, forward_only=False)
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(blocks.num_blocks))
    order.add_edges_from(blocks.edges)
    bound = _path_bound(problem, blocks, order)
    best, value = _first_answer(problem, blocks, order, left_s)
    tell("serial", value if best is not None else None, bound)
    if best is not None:
        best, value = _local_search(problem, blocks, best, value, lambda: left_s() <= 0)
        tell("local", value, bound)
    if left_s() <= 0.1 or (best is not None and value <= bound * (1 + gap)):
        return _placement(problem, blocks, best), bound, False
    model = _LatencyProgram(problem, blocks, order, value, bound)
    outcome = model.program.solve(time_limit_s=left_s(), relative_gap=gap, threads=threads, start=None)
    if outcome.status == "infeasible":
        # Nothing beats the first answer; without one there is nothing at all.
        return _placement(problem, blocks, best), max(bound, value), True
    if outcome.bound is not None:
        bound = max(bound, min(outcome.bound, value))
    if outcome.has_point:
        devices = model.devices(outcome.values)
        found = _evaluate(problem, blocks, devices)
        if found < value:
            best, value = devices, found
            best, value = _local_search(problem, blocks, best, value, lambda: left_s() <= 0)
    tell("prove", value if best is not None else None, bound)
    return _placement(problem, blocks, best), bound, False


Devices = list[int]


def _placement(
    problem: PlacementProblem, blocks: Blocks, devices: Devices | None
) -> dict[NodeId, int] | None:
    if devices is None:
        return None
    answer: dict[NodeId, int] = {}
    for members, device in zip(blocks.operators, devices, strict=True):
        for v in members:
            answer[problem.operators[v].node_id] = device
    return answer


def _evaluate(problem: PlacementProblem, blocks: Blocks, devices: Devices) -> float:
    answer = _placement(problem, blocks, devices)
    assert answer is not None
    verdict = check_placement(problem, answer, "latency")
    return verdict.value if verdict.feasible and verdict.value is not None else math.inf


def _path_bound(problem: PlacementProblem, blocks: Blocks, order: "nx.DiGraph[int]") -> float:
    """The best latency that some one path allows, exactly, by dynamic programming.

    Along a path an accelerator's blocks are consecutive (it is contiguous), and it takes at least
    their work plus the transfers over the path's edges at both ends. h[i, a] is the least time to do
    the first i blocks of the path with a accelerators.
    """
    cost = {t.source: t.cost for t in problem.transfers}
    place = {v: b for b, members in enumerate(blocks.operators) for v in members}
    moved: dict[tuple[int, int], float] = {}
    for t in problem.transfers:
        edge = (place[t.source], place[t.target])
        moved[edge] = max(moved.get(edge, 0.0), cost[t.source])
    span = _cpu_span(problem, blocks)
    return max(
        (_one_path_bound(problem, blocks, path, span, moved) for path in _long_paths(blocks, order)),
        default=0.0,
    )


def _one_path_bound(
    problem: PlacementProblem,
    blocks: Blocks,
    path: list[int],
    span: FloatArray,
    moved: dict[tuple[int, int], float],
) -> float:
    steps = [0.0, *(moved[a, b] for a, b in itertools.pairwise(path)), 0.0]
    most = problem.num_accelerators
    least = np.full((len(path) + 1, most + 1), np.inf)
    least[0] = 0.0
    for i, b in enumerate(path, start=1):
        if problem.num_cpus:
            least[i] = least[i - 1] + span[b]
        work = size = 0.0
        for j in range(i, 0, -1):
            work += float(blocks.accelerator[path[j - 1]])
            size += float(blocks.size[path[j - 1]])
            if size > problem.memory_limit * (1 + 1e-12) or not math.isfinite(work):
                break
            least[i, 1:] = np.minimum(least[i, 1:], least[j - 1, :-1] + work + steps[j - 1] + steps[i])
    return float(least[-1].min())


def _cpu_span(problem: PlacementProblem, blocks: Blocks) -> FloatArray:
    """A block's least time on the CPUs, whose operators need not wait for one another."""
    return np.array(
        [
            max((problem.operators[v].cpu_latency for v in members), default=0.0)
            for members in blocks.operators
        ]
    )


def _first_answer(
    problem: PlacementProblem,
    blocks: Blocks,
    order: "nx.DiGraph[int]",
    left_s: Callable[[], float],
) -> tuple[Devices | None, float]:
    ideals = all_ideals(blocks, _MOST_IDEALS)
    if ideals is None:
        ideals = chain_ideals(blocks, [list(nx.topological_sort(order))])
    best, value = None, math.inf
    simple = (
        [placement[problem.operators[members[0]].node_id] for members in blocks.operators]
        for placement in simple_placements(problem, blocks)
    )
    for devices in itertools.chain(simple, _serial(problem, blocks, ideals, left_s)):
        found = _evaluate(problem, blocks, devices)
        if found < value:
            best, value = devices, found
    return best, value


def _serial(
    problem: PlacementProblem, blocks: Blocks, ideals: Ideals, left_s: Callable[[], float]
) -> list[Devices]:
    """The best serial schedule for every number of accelerators."""
    member, num = ideals.member, problem.num_accelerators
    finite = replace(
        blocks, accelerator=np.where(np.isfinite(blocks.accelerator), blocks.accelerator, 1e30)
    )
    work, size = member @ finite.accelerator, member @ blocks.size
    transfers, outside = Transfers(blocks, member), ~member
    value = np.full((num + 1, len(member)), np.inf)
    value[0, 0] = 0.0
    origin = np.full((num + 1, len(member), 2), -1, dtype=np.int64)
    sizes = member.sum(axis=1)
    for j in range(1, len(member)):
        if left_s() <= 0:
            return []
        smaller = np.arange(int(np.searchsorted(sizes, sizes[j])))
        extra = member[smaller] @ outside[j].astype(np.float32)
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


def _local_search(
    problem: PlacementProblem,
    blocks: Blocks,
    devices: Devices,
    value: float,
    should_stop: Callable[[], bool],
) -> tuple[Devices, float]:
    """Move single blocks, then swap neighbours along edges, while that helps."""
    improved = True
    while improved and not should_stop():
        improved = False
        moves = itertools.chain(
            ((b,) for b in range(blocks.num_blocks)), ((a, b) for a, b in blocks.edges)
        )
        for moved in moves:
            if should_stop():
                break
            for device in range(problem.num_accelerators + 1):
                trial = list(devices)
                for b in moved:
                    trial[b] = device
                if trial != devices and (found := _evaluate(problem, blocks, trial)) < value:
                    devices, value, improved = trial, found, True
    return devices, value


class _LatencyProgram:
    """The ILP of this module's text."""

    def __init__(
        self,
        problem: PlacementProblem,
        blocks: Blocks,
        order: "nx.DiGraph[int]",
        best: float,
        bound: float,
    ) -> None:
        self.program = Program("latency")
        self._blocks, self._order = blocks, order
        self._num = problem.num_accelerators
        worst = float(blocks.cpu.sum() + blocks.accelerator[np.isfinite(blocks.accelerator)].sum())
        worst += 2 * self._num * sum(cost for _, cost in blocks.bundles)
        self._horizon = best if math.isfinite(best) else worst
        self.latest = self.program.continuous("T", min(bound, self._horizon), self._horizon)
        self.on = [
            [self.program.binary(f"x{b}.{d}") for d in range(self._num + 1)]
            for b in range(blocks.num_blocks)
        ]
        self.end = [
            self.program.continuous(f"e{b}", 0.0, self._horizon) for b in range(blocks.num_blocks)
        ]
        self.start = [self.program.continuous(f"s{d}", 0.0, self._horizon) for d in range(self._num + 1)]
        self.finish = [self.program.continuous(f"f{d}", 0.0, self._horizon) for d in range(self._num + 1)]
        self._span = _cpu_span(problem, blocks)
        self._assign(problem)
        self._time_cpus()
        self._time_accelerators(problem)
        self._cover_paths()
        self.program.minimize([(1.0, self.latest)])

    def devices(self, values: FloatArray) -> Devices:
        """The device of each block in a solution."""
        return [max(range(self._num + 1), key=lambda d: values[row[d].index]) for row in self.on]

    def _assign(self, problem: PlacementProblem) -> None:
        for b, row in enumerate(self.on):
            self.program.constrain([(1.0, x) for x in row], "==", 1.0)
            self.program.constrain([(1.0, self.latest), (-1.0, self.end[b])], ">=", 0.0)
            if not problem.num_cpus:
                self.program.fix(row[0], 0.0)
            if not math.isfinite(self._blocks.accelerator[b]):
                for x in row[1:]:
                    self.program.fix(x, 0.0)
        scale = 1.0 / max(problem.memory_limit, 1.0)
        for d in range(1, self._num + 1):
            terms = [(self._blocks.size[b] * scale, row[d]) for b, row in enumerate(self.on)]
            self.program.constrain(terms, "<=", problem.memory_limit * scale)
            if d > 1:
                self.program.constrain([(1.0, self.start[d]), (-1.0, self.start[d - 1])], ">=", 0.0)

    def _time_cpus(self) -> None:
        for b, row in enumerate(self.on):
            own = (-float(self._span[b]), row[0])
            before: list[list[Term]] = [[(-1.0, self.end[a])] for a in self._order.predecessors(b)]
            for terms in before or [[]]:
                self.program.constrain([(1.0, self.end[b]), own, *terms], ">=", 0.0)

    def _time_accelerators(self, problem: PlacementProblem) -> None:
        big = self._horizon
        for d in range(1, self._num + 1):
            load: list[Term] = [
                (float(self._blocks.accelerator[b]), row[d])
                for b, row in enumerate(self.on)
                if math.isfinite(self._blocks.accelerator[b])
            ]
            for q, (ends, cost) in enumerate(self._blocks.bundles):
                load.append((cost, self._moved(q, ends, d)))
            self.program.constrain(
                [(1.0, self.finish[d]), (-1.0, self.start[d]), *((-w, v) for w, v in load)],
                "==",
                0.0,
            )
            for b, row in enumerate(self.on):
                self.program.constrain(
                    [(1.0, self.end[b]), (-1.0, self.finish[d]), (-big, row[d])], ">=", -big
                )
            for a, b in self._blocks.edges:
                self.program.constrain(
                    [
                        (1.0, self.start[d]),
                        (-1.0, self.end[a]),
                        (-big, self.on[b][d]),
                        (big, self.on[a][d]),
                    ],
                    ">=",
                    -big,
                )

    def _moved(self, q: int, ends: frozenset[int], d: int) -> Variable:
        """One if bundle q enters or leaves device d: its blocks are partly there."""
        moved = self.program.continuous(f"m{q}.{d}", 0.0, 1.0)
        members = sorted(ends)
        for a, b in zip(members, members[1:] + members[:1], strict=True):
            self.program.constrain([(1.0, moved), (-1.0, self.on[a][d]), (1.0, self.on[b][d])], ">=", 0.0)
        return moved

    def _cover_paths(self) -> None:
        """No answer ends before the work along any one path is done."""
        for path in _long_paths(self._blocks, self._order):
            terms: list[Term] = [(1.0, self.latest)]
            for b in path:
                terms.append((-float(self._span[b]), self.on[b][0]))
                if math.isfinite(self._blocks.accelerator[b]):
                    work = float(self._blocks.accelerator[b])
                    terms.extend((-work, x) for x in self.on[b][1:])
            self.program.constrain(terms, ">=", 0.0)


def _long_paths(blocks: Blocks, order: "nx.DiGraph[int]") -> list[list[int]]:
    """Paths that between them visit much of the work: longest first, then least seen."""
    weight = blocks.cpu + np.where(np.isfinite(blocks.accelerator), blocks.accelerator, 0.0)
    weight = weight.astype(np.float64).copy()
    paths: list[list[int]] = []
    sequence = list(nx.topological_sort(order))
    for _ in range(_NUM_PATHS):
        length: dict[int, float] = {}
        previous: dict[int, int | None] = {}
        for b in sequence:
            before = max(order.predecessors(b), key=lambda a: length[a], default=None)
            length[b] = (0.0 if before is None else length[before]) + float(weight[b])
            previous[b] = before
        place: int | None = max(length, key=lambda b: length[b])
        path: list[int] = []
        while place is not None:
            path.append(place)
            place = previous[place]
        if path[::-1] in paths:
            break
        paths.append(path[::-1])
        weight[path] *= 0.5
    return paths
