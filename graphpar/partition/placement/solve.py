"""Place operators on accelerators and CPUs: for throughput by ideals, for latency by search.

*Throughput*: contract what stays together (`graph`), enumerate the ideals, run the exact
dynamic programme (`ideals`). Where there are too many ideals, prefixes of a few topological
orders stand in for them and the bound comes from averages alone. The bound holds for contiguous
splits whose devices can be ordered so that no forward transfer goes backwards.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace

import networkx as nx
import numpy as np

from graphpar.errors import VerifyError
from graphpar.partition.answers import (
    INTERRUPT,
    AnswerStatus,
    Progress,
    ProgressCallback,
    Solved,
    ignore_progress,
    relative_gap,
)
from graphpar.partition.jit import COMPILED
from graphpar.partition.placement.check import Objective, check_placement
from graphpar.partition.placement.free import improve_free, value_of
from graphpar.partition.placement.graph import Blocks, contract, join_dominated, loose, without
from graphpar.partition.placement.ideals import (
    Ideals,
    Split,
    all_ideals,
    best_split,
    chain_ideals,
    free_ideals,
    window_ideals,
)
from graphpar.partition.placement.latency import LatencySearch
from graphpar.partition.placement.simple import simple_placements
from graphpar.partition.placement.split import best_split_of_all, ideals_of
from graphpar.partition.problems import NodeId, PlacementProblem
from graphpar.partition.solver import OPTIMALITY_TOLERANCE
from graphpar.partition.why_impossible import why_no_placement

_MOST_IDEALS = 40_000
"""Ideals up to which all pairs are compared; memory grows with their number, time with its square."""

_MOST_WALKED = 150_000
"""Ideals up to which compiled loops visit all pairs that are near each other."""

_FEW_IDEALS = 2_000
"""Ideals up to which array operations take less than a second; compiled loops take as long to load."""

_MOST_FREELY = 3_000
"""Ideals up to which every one is tried with every choice of the blocks that contiguity leaves free."""

_SPREAD = 1e6
"""Amounts that are unlike by more than this are not added up where a smaller sum decides."""

_EARLY = 0.8
"""A search that time ends takes this share of its limit at least."""

Placement = dict[NodeId, int]


def solve_placement(
    problem: PlacementProblem,
    *,
    objective: Objective = "throughput",
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    threads: int = 1,
    progress: ProgressCallback = ignore_progress,
    keep_on_interrupt: bool = False,
) -> Solved[Placement]:
    """The best placement found within the time limit, with a lower bound.

    Args:
        problem: What to solve.
        objective: `throughput` (load of the busiest device) or `latency` (time of one sample).
        time_limit_s: Wall-clock limit; the answer comes back within a tenth more.
        gap: Stop once the proven relative gap is this small.
        threads: Threads for integer programmes.
        progress: Called whenever the incumbent or the bound improves.
        keep_on_interrupt: Whether Ctrl-C ends the search as the time limit does, instead of being raised.

    Raises:
        ValueError: An argument is out of range.
        VerifyError: The checker disagrees with the search (a bug).
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
    if not gap >= 0:
        raise ValueError(f"gap must not be negative, got {gap}")
    began_s = time.perf_counter()
    # Accelerators are all alike, so more of them than operators are of no use.
    most = max(1, len(problem.operators))
    problem = replace(problem, num_accelerators=min(problem.num_accelerators, most))

    def left_s() -> float:
        return time_limit_s - (time.perf_counter() - began_s)

    def tell(phase: str, incumbent: float | None, bound: float | None) -> None:
        progress(Progress(phase, time.perf_counter() - began_s, incumbent, bound))

    run: _Throughput | LatencySearch
    if objective == "throughput":
        run = _Throughput(problem, left_s, tell)
    elif objective == "latency":
        run = LatencySearch(problem, left_s, gap, threads, tell)
    else:
        raise ValueError(f"objective must be throughput or latency, got {objective!r}")
    interrupted = False
    try:
        run.search()
    except KeyboardInterrupt:
        if not keep_on_interrupt:
            raise
        interrupted = True
    seconds = time.perf_counter() - began_s
    # What ended well before its time would do no more with more of it.
    ended_by = "search space" if run.finished or seconds < _EARLY * time_limit_s else "time limit"
    if interrupted:
        ended_by = INTERRUPT
    return _conclude(problem, run.best, run.bound, run.finished, objective, gap, seconds, ended_by)


def _conclude(
    problem: PlacementProblem,
    answer: Placement | None,
    bound: float,
    finished: bool,
    objective: Objective,
    gap: float,
    seconds: float,
    ended_by: str,
) -> Solved[Placement]:
    if answer is None:
        if finished:
            note = why_no_placement(problem, objective)
            return Solved("infeasible", None, None, None, seconds, None, None, note)
        finite = bound if math.isfinite(bound) else None
        return Solved("unknown", None, finite, None, seconds, ended_by, None)
    verdict = check_placement(problem, answer, objective)
    if not verdict.feasible or verdict.value is None:
        raise VerifyError(
            f"placement of {problem.name}: the checker found {list(verdict.errors)[:5]}; "
            "this is a bug, please report it"
        )
    bound = min(bound, verdict.value)
    distance = relative_gap(verdict.value, bound)
    status: AnswerStatus = "optimal" if distance <= OPTIMALITY_TOLERANCE else "feasible"
    truncated_by: str | None = None
    if status == "feasible":
        truncated_by = "gap" if distance <= gap else ended_by
    return Solved(status, verdict.value, bound, distance, seconds, truncated_by, answer)


Tell = Callable[[str, float | None, float | None], None]


class _Throughput:
    """The best split so far, its load, and a bound on all.

    Attributes:
        finished: Whether nothing was left out for lack of time.
    """

    def __init__(self, problem: PlacementProblem, left_s: Callable[[], float], tell: Tell) -> None:
        self.problem, self._left_s, self._tell = problem, left_s, tell
        self.best: Placement | None = None
        self.load = self._ceiling = math.inf
        self.bound = _average_bound(problem)
        self.finished = False

    def search(self) -> None:
        """A first answer from a few orders, then contiguity in full, then the blocks free of it."""
        if not self.problem.operators:
            self.best, self.load, self.bound, self.finished = {}, 0.0, 0.0, True
            return
        blocks = contract(self.problem, forward_only=True)
        for placement in simple_placements(self.problem, blocks):
            self._offer(placement)
        self._say("simple")
        split, _ = self._run(blocks, chain_ideals(blocks, _orders(blocks)), self.load)
        self._take(blocks, split, "chain")
        for ceiling in self._ceilings():
            if self._stop():
                self.finished = False
                return
            self._ceiling = ceiling
            self._search_below()
            if self.load < ceiling:
                return

    @property
    def _cutoff(self) -> float:
        """Only splits with less than this load are looked for now."""
        return min(self.load, self._ceiling)

    def _ceilings(self) -> list[float]:
        """Cutoffs to go through, so that the best split's amounts do not drown in sums up to them."""
        most = min(self.load, _sum_of_amounts(self.problem))
        found, ceiling = [], _SPREAD * self.bound
        while 0 < ceiling < most:
            found.append(ceiling)
            ceiling *= _SPREAD
        return [*found, math.inf]

    def _search_below(self) -> None:
        """The best split below the cutoff."""
        blocks = contract(self.problem, forward_only=True, cutoff=self._cutoff)
        split, complete = self._run_all(blocks)
        self._take(blocks, split, "ideals")
        if self._stop():
            return
        kept = contract(self.problem, forward_only=True, free="keep", cutoff=self._cutoff)
        if not kept.free:
            self._conclude(complete)
        elif (anywhere := free_ideals(kept, _MOST_FREELY)) is not None:
            split, complete = self._run(kept, anywhere, self._cutoff)
            self._take(kept, split, "free")
            self._conclude(complete)
        else:
            self._answer_in_windows(kept)
            if not self._stop():
                self._bound_in_windows(kept)

    def _answer_in_windows(self, kept: Blocks) -> None:
        blocks = join_dominated(kept, charged=True)
        blocks = without(blocks, loose(blocks))
        split, _ = self._run(blocks, window_ideals(blocks, _MOST_IDEALS), self._cutoff)
        starts = [] if self.best is None else [self.best]
        if split:
            starts.append(_completed(self.problem, self.best, _assign(self.problem, blocks, split)))
        free = [v for f in kept.free for v in kept.operators[f]]
        for start in starts:
            self._offer(improve_free(self.problem, start, free, self._stop))
        self._say("windows")

    def _bound_in_windows(self, kept: Blocks) -> None:
        blocks = join_dominated(kept, charged=False)
        blocks = without(blocks, loose(blocks))
        ideals = window_ideals(blocks, _MOST_IDEALS)
        if ideals is None:
            blocks = without(blocks, blocks.free)
            ideals = all_ideals(blocks, _MOST_IDEALS)
        relaxed, proven = self._run(blocks, ideals, self._cutoff * (1 + 1e-9), relaxed=True)
        if proven:
            # No amount in the sums exceeds twice the cutoff, and each of their terms rounds them once.
            terms = 2 * blocks.num_blocks + len(blocks.bundles)
            rounding = float(np.finfo(np.float64).eps) * terms**2 * self._cutoff
            lowest = relaxed.load - rounding if relaxed else self._cutoff
            self.bound = max(self.bound, min(self._cutoff, lowest))
        self.finished = proven and (self.best is not None or self._is_nothing(relaxed))
        self._say("bound")

    def _conclude(self, complete: bool) -> None:
        self.finished = complete and (self.best is not None or self._is_nothing(None))
        if complete:
            self.bound = max(self.bound, self._cutoff)

    def _is_nothing(self, split: Split | None) -> bool:
        """Whether there is no split at all."""
        return split is None and self._cutoff == math.inf

    def _run_all(self, blocks: Blocks) -> tuple[Split | None, bool]:
        """The best split of all ideals, if there are not too many, and whether there are none better."""
        every = ideals_of(blocks, _MOST_WALKED, self._stop)
        if every is None:
            return None, False
        if not COMPILED or len(every.found) < _FEW_IDEALS:
            return self._run(blocks, all_ideals(blocks, _MOST_IDEALS), self._cutoff)
        return best_split_of_all(
            blocks,
            every,
            num_accelerators=self.problem.num_accelerators,
            num_cpu_pools=min(1, self.problem.num_cpus),
            memory_limit=self.problem.memory_limit,
            cutoff=self._cutoff,
            should_stop=self._stop,
            threads=min(2, os.cpu_count() or 1),
        )

    def _run(
        self, blocks: Blocks, ideals: Ideals | None, cutoff: float, *, relaxed: bool = False
    ) -> tuple[Split | None, bool]:
        """The best split of these ideals, and whether that says something about all."""
        if ideals is None:
            return None, False
        split = best_split(
            blocks,
            ideals,
            num_accelerators=self.problem.num_accelerators,
            num_cpu_pools=min(1, self.problem.num_cpus),
            memory_limit=self.problem.memory_limit,
            cutoff=cutoff,
            should_stop=self._stop,
            relaxed=relaxed,
        )
        return split, ideals.complete and not self._stop()

    def _stop(self) -> bool:
        return self._left_s() <= 0

    def _take(self, blocks: Blocks, split: Split | None, phase: str) -> None:
        if split:
            self._offer(_assign(self.problem, blocks, split))
        self._say(phase)

    def _offer(self, placement: Placement) -> None:
        load = value_of(self.problem, placement)
        if load < self.load:
            self.best, self.load = placement, load

    def _say(self, phase: str) -> None:
        self._tell(phase, self.load if self.best else None, self.bound)


def _completed(problem: PlacementProblem, best: Placement | None, part: Placement) -> Placement:
    """A placement of some operators, with the others where they are known to do well."""
    default = 0 if problem.num_cpus else 1
    return {op.node_id: default for op in problem.operators} | (best or {}) | part


def _orders(blocks: Blocks) -> list[list[int]]:
    """A few unlike topological orders."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(blocks.num_blocks))
    graph.add_edges_from(blocks.edges)
    depth_first: list[int] = list(nx.dfs_postorder_nodes(graph))[::-1]
    backwards = list(nx.dfs_postorder_nodes(graph.reverse()))
    return [depth_first, backwards, list(nx.topological_sort(graph))]


def _sum_of_amounts(problem: PlacementProblem) -> float:
    """What no load exceeds."""
    moved = {t.source: t.cost for t in problem.transfers}
    longest = (max(op.cpu_latency, op.accelerator_latency) for op in problem.operators)
    return sum(longest) + sum(moved.values())


def _average_bound(problem: PlacementProblem) -> float:
    """No split beats sharing everybody's least work evenly over all devices."""
    least = sum(
        min(
            op.accelerator_latency if op.on_accelerator and problem.num_accelerators else math.inf,
            op.cpu_latency if problem.num_cpus else math.inf,
        )
        for op in problem.operators
    )
    devices = problem.num_accelerators + min(1, problem.num_cpus)
    return least / devices if devices else math.inf


def _assign(problem: PlacementProblem, blocks: Blocks, split: Split) -> Placement:
    placement: Placement = {}
    used = 0
    for on_cpu, part in split.parts:
        used += not on_cpu
        for block in part:
            for v in blocks.operators[block]:
                placement[problem.operators[v].node_id] = 0 if on_cpu else used
    return placement
