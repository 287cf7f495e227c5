"""The phases of a sharding search on one reduced graph, in the order of `solve`'s text."""

import math
import time

import numpy as np

from graphpar.partition.answers import relative_gap
from graphpar.partition.jit import COMPILED
from graphpar.partition.sharding.branch import Branching
from graphpar.partition.sharding.dual import DualAscent
from graphpar.partition.sharding.exact import solve_exactly
from graphpar.partition.sharding.flat import flat_cost
from graphpar.partition.sharding.graph import IntArray, MemoryRows, ShardingGraph
from graphpar.partition.sharding.ilp import count_pairs
from graphpar.partition.sharding.local import LocalSearch, Walker, promises
from graphpar.partition.sharding.memory import MemoryMatrix
from graphpar.partition.sharding.reduce import reduce_graph
from graphpar.partition.sharding.search import WindowSearch
from graphpar.partition.sharding.state import Candidate, State
from graphpar.partition.sharding.warm import Stage, warm_up

_TINY_PAIRS = 10_000
"""Pair variables up to which that ILP comes before any search."""
_SMALL_PAIRS = 40_000
"""Pair variables up to which one ILP over everything left is worth its time."""

_HOPELESS_PAIRS = 10 * _SMALL_PAIRS
"""Pairs that no reduction is expected to bring down to `_SMALL_PAIRS`."""

_WIDTHS = (2, 4, 8, 16, 1_000)
"""Strategies per vertex in the exact windows, from wide and shallow to full."""

_NUM_SEEDS = (1, 3, 1, 5, 3)
"""Seeds of the exact windows in turn: mostly one region, sometimes several that share memory."""

_ROUND_SHARE = 0.09
"""Share of the time limit for the searches of one round."""

_FRESH_SHARE, _FRESH_S, _MOST_FRESH_SHARE = 0.015, 1.0, 0.05
"""Most that a local search from a new rounding takes: a share of the time limit, or so many seconds where
these are less than the last share."""

_PRICE_NOISE = 0.03
"""New roundings are made at prices that differ by up to this share."""

_MIX_S, _MIX_SHARE = 5.0, 0.03
"""What finding the best mixture of two choices may take: seconds, or a share of the time limit."""

_FIRST_BOUND_SHARE, _BOUND_SHARE, _MOST_BOUND_SHARE = 0.04, 0.02, 0.12
"""Share of the time limit that a round's passes for the bound take: the first few rounds and later at
least, and at most."""

_PASSING_SHARE = 0.5
"""Message passing goes on while at its present speed the time left would close this share of the gap."""

_TRIAL_SHARE = 0.03
"""Share of the time limit after which branching has to raise the bound as fast as message passing did."""

_WORTH = 10.0
"""What is taken off an answer counts so many times what is put on the bound."""

_LEAST_SHARES = (0.1, 0.15, 0.5)
"""Of each round at least this goes to walks, exact windows, and new roundings."""

_MOST_PROOFS = 4
"""Times the whole problem is tried as one ILP, each for a larger share of the time left."""

_LEAST_MIX_S = 0.3
"""Time left below which none is begun."""


class Run:
    """The phases on one reduced graph, and what they share."""

    def __init__(
        self, state: State, graph: ShardingGraph, rows: MemoryRows, threads: int, seed: int
    ) -> None:
        self.state, self.graph, self.rows, self.threads, self.seed = state, graph, rows, threads, seed
        self.dual = DualAscent(graph, rows, state.out_of_time)
        self.nearest: IntArray = np.zeros(len(self.dual.vertices), dtype=np.intp)
        self.nearest_excess = math.inf
        self.best: IntArray | None = None
        self.best_cost = math.inf
        self.local: LocalSearch | None = None
        self.walker: Walker | None = None
        self.windows: WindowSearch | None = None
        self.stands_still = False
        self.parts: Branching | None = None
        self.passing_per_s = math.inf
        self.branched, self.branching_s = 0.0, 0.0
        self.fresh = 0
        self.random = np.random.default_rng(seed)
        self.shares = [share / sum(_LEAST_SHARES) for share in _LEAST_SHARES]
        self.gains, self.seconds = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        self.credit_s = 0.0
        self.window_turn = 0
        self.proofs = 0
        self.too_large_at: float | None = None

    def improve(self) -> bool:
        """Search until the gap is closed or time is up; returns whether infeasibility was proven."""
        state = self.state
        self.bound(0.02)
        while self.best is None and not state.done():
            if self.is_small() and self.proofs < _MOST_PROOFS and self.prove(0.5):
                return True
            if warm_up(Stage.SEARCH, 0.0):
                self.repair(0.04)
            if self.best is None:
                self.bound(0.04)
        while not warm_up(Stage.SEARCH, 0.0) and not state.done():
            self.bound(0.04)
            self.prove_if_promising()
            self.exact_windows(0.02)
        if count_pairs(self.graph) <= _TINY_PAIRS:
            self.prove_if_promising()  # sooner than any share of the time limit is spent on searching
        if state.done():
            return False
        self.start_afresh()
        self.start_walking()
        bound_share = _FIRST_BOUND_SHARE
        self.bound(bound_share)
        rounds = 0
        while not state.done():
            began_s, cost, bound = state.elapsed_s(), self.best_cost, state.bound
            self.walk(_ROUND_SHARE * self.shares[0])
            self.mix(_ROUND_SHARE * self.shares[2])
            searched_s = state.elapsed_s() - began_s
            (self.raise_bound if rounds else self.bound)(bound_share)
            bound_share = _next_bound_share(
                bound_share,
                _FIRST_BOUND_SHARE if rounds < 3 else _BOUND_SHARE,
                (state.bound - bound) / max(1e-9, state.elapsed_s() - began_s - searched_s),
                (cost - self.best_cost) / max(1e-9, searched_s),
            )
            self.prove_if_promising()
            if rounds and not state.done():
                self.exact_windows(_ROUND_SHARE * self.shares[1])
                self.share_out()
            rounds += 1
        return False

    def share_out(self) -> None:
        """Give each kind of search the share of a round that it has earned of late.

        What the walker improves counts for none; while there is one, somebody always walks.
        """
        gains, seconds = self.gains, self.seconds
        rates = [gain / max(1e-9, s) for gain, s in zip(gains, seconds, strict=True)]
        total = sum(rates)
        earned = [rate / total if total > 0 else 1 / len(rates) for rate in rates]
        wanted = [max(pair) for pair in zip(_LEAST_SHARES, earned, strict=True)]
        self.shares = [share / sum(wanted) for share in wanted]
        for k in range(len(gains)):
            gains[k], seconds[k] = 0.5 * gains[k], 0.5 * seconds[k]

    def stop(self) -> None:
        """End the walker and take what it has."""
        if self.walker is not None:
            cost, chosen = self.walker.stop()
            self.walker = None
            self.take(chosen, cost)
        self.state.settle()

    def is_small(self) -> bool:
        """Whether one ILP could hold everything."""
        return count_pairs(self.graph) <= _SMALL_PAIRS

    def take(self, chosen: IntArray, cost: float) -> None:
        """Take a choice that fits as the best one if it is cheaper."""
        if cost < self.best_cost:
            self.best, self.best_cost = chosen.copy(), cost
            self.dual.expect(cost)
            self.state.offer(Candidate(self.graph, self.dual.vertices, self.best, cost))

    def take_answer(self) -> None:
        """Search from the answer that was found before anything was reduced, or one near it that fits."""
        if self.state.answer is not None:
            self.take_rounding(_nearest(self.graph, self.dual.vertices, self.state.answer)[0])

    def take_rounding(self, chosen: IntArray) -> None:
        """Take a rounding if it fits; remember the one nearest to fitting."""
        excess = self.dual.memory.excess(chosen)
        if excess < self.nearest_excess:
            self.nearest, self.nearest_excess = chosen.copy(), excess
        if excess <= 0 and flat_cost(self.dual.flat, chosen) + self.dual.constant < self.best_cost:
            value = self.graph.value({u: int(i) for u, i in zip(self.dual.vertices, chosen, strict=True)})
            if math.isfinite(value):
                self.take(chosen, value)

    def bound(self, share: float) -> None:
        """Message passing for a share of the time limit, or until the bound stands still."""
        if self.stands_still and self.best is not None:
            return
        state, dual = self.state, self.dual
        state.phase = "bound"
        end_s = state.elapsed_s() + share * state.time_limit_s
        steps, idle, last = 0, 0, -math.inf
        while state.elapsed_s() < end_s and not state.done():
            if steps % 8 == 0 and self.best is None:
                self.take_rounding(dual.round_within_memory())
            for chosen in dual.ascend(2):
                if self.local is None:
                    self.take_rounding(chosen)
            steps += 1
            state.raise_bound(dual.bound)
            idle = 0 if dual.bound > last + 1e-7 * abs(last) else idle + 1
            last = max(last, dual.bound)
            if idle >= 200:
                self.stands_still = True
                break
        dual.restore_best()
        dual.sweep()

    def raise_bound(self, share: float) -> None:
        """Message passing for a share of the time limit, or branching, whichever promises more."""
        if self.should_branch():
            self.branch(share)
            return
        began_s, before = self.state.elapsed_s(), self.dual.bound
        self.bound(share)
        self.passing_per_s = (self.dual.bound - before) / max(1e-9, self.state.elapsed_s() - began_s)

    def should_branch(self) -> bool:
        """Whether memory has a price, message passing is too slow, and branching pays or is new."""
        state, gap = self.state, self.state.objective - self.state.bound
        passes = self.passing_per_s * state.left_s() >= _PASSING_SHARE * gap
        if passes or not self.dual.multipliers.any() or (self.parts and self.parts.is_full):
            return False
        is_new = self.branching_s < _TRIAL_SHARE * state.time_limit_s
        return is_new or self.branched >= self.passing_per_s * self.branching_s

    def branch(self, share: float) -> None:
        """Split the problem on for a share of the time limit."""
        state = self.state
        state.phase = "branch"
        began_s = state.elapsed_s()
        end_s = began_s + share * state.time_limit_s

        def is_over() -> bool:
            return state.elapsed_s() >= end_s or state.done()

        if self.parts is None or self.parts.bound < self.dual.bound:
            self.parts = Branching(self.dual)
        before = min(self.parts.bound, state.objective)
        while not is_over() and not self.parts.is_full:
            for chosen in self.parts.split(self.target(), is_over):
                self.take_rounding(chosen)
            state.settle()
            state.raise_bound(min(self.parts.bound, state.objective))
        self.branched += min(self.parts.bound, state.objective) - before
        self.branching_s += state.elapsed_s() - began_s

    def target(self) -> float:
        """What a better answer costs at most; rounding errors stay on the safe side."""
        state = self.state  # whole costs: only an answer cheaper by one is better
        return state.objective - (0.9 if state.integral else 0.0) + 1e-9 * abs(self.dual.bound)

    def repair(self, share: float) -> None:
        """Tree moves under a growing price of memory, from the rounding nearest to fitting."""
        state = self.state
        state.phase = "repair"
        end_s = state.elapsed_s() + share * state.time_limit_s
        search = LocalSearch(self.dual, self.nearest, self.seed)
        while state.elapsed_s() < end_s and not state.done() and self.best is None:
            if search.step(min(end_s - state.elapsed_s(), state.left_s())):
                self.take_rounding(search.best)

    def start_afresh(self) -> LocalSearch | None:
        """Local search from what the dual's messages and prices now round to, if that fits.

        Where memory is tight the walk cannot leave every bad start, and roundings are good ones.
        """
        state = self.state
        state.phase = "search"
        limit_s = state.time_limit_s
        most_s = max(_FRESH_SHARE * limit_s, min(_FRESH_S, _MOST_FRESH_SHARE * limit_s))
        chosen = self.round_anew()
        end_s = state.elapsed_s() + most_s
        if self.dual.memory.excess(chosen) > 0:
            return None
        self.fresh += 1
        local = LocalSearch(self.dual, chosen, self.seed + 7919 * self.fresh)
        while state.elapsed_s() < end_s and not state.done():
            local.step(min(end_s - state.elapsed_s(), state.left_s()))
        self.take(local.best, local.cost)
        return local

    def round_anew(self) -> IntArray:
        """A rounding within memory; where prices no longer move, they are shaken, for another one."""
        dual = self.dual
        prices = dual.multipliers
        if self.stands_still and prices.size:
            noise = self.random.uniform(1 - _PRICE_NOISE, 1 + _PRICE_NOISE, prices.size)
            dual.set_multipliers(prices * noise)
            dual.sweep()
        chosen = dual.round_within_memory()
        dual.set_multipliers(prices)
        dual.sweep()
        return chosen

    def mix(self, share: float) -> None:
        """For about a share of the time limit: search from new roundings, and mix with what comes out.

        One takes a while on large problems, so what it takes too long is made up for by later rounds.
        """
        state = self.state
        self.credit_s += share * state.time_limit_s
        while self.credit_s > 0 and not state.done():
            began_s, before, earlier = state.elapsed_s(), self.best_cost, self.best
            local = self.start_afresh()
            if local is not None and earlier is not None:
                state.phase = "mix"
                search = self.window_search()
                for other in (earlier, local.best):  # either may be the best now
                    if state.left_s() > _LEAST_MIX_S:
                        most_s = max(_MIX_S, _MIX_SHARE * state.time_limit_s)
                        search.combine(other, min(most_s, state.left_s()))
                self.take(search.chosen, search.cost)
            self.trade()
            spent_s = state.elapsed_s() - began_s
            self.credit_s -= spent_s
            self.gains[2] += before - self.best_cost
            self.seconds[2] += spent_s

    def window_search(self) -> WindowSearch:
        """Exact windows around the best choice."""
        assert self.best is not None
        if self.windows is None:
            self.windows = WindowSearch(self.graph, self.rows, self.dual.memory, self.best, self.seed)
        self.windows.adopt(self.best, self.best_cost)
        return self.windows

    def start_walking(self) -> None:
        """Start the local search here, and another in a thread where there is a core for it."""
        assert self.best is not None
        self.local = LocalSearch(self.dual, self.best, self.seed)
        if self.threads > 1 and COMPILED:
            self.walker = Walker(LocalSearch(self.dual, self.best, self.seed + 1))

    def walk(self, share: float) -> None:
        """Local search for a share of the time limit, then trade with the walker."""
        state, local = self.state, self.local
        assert local is not None
        state.phase = "search"
        local.promises = promises(self.dual)
        began_s = state.elapsed_s()
        end_s = began_s + share * state.time_limit_s
        while state.elapsed_s() < end_s and not state.done():
            before = local.cost
            if local.step(min(end_s - state.elapsed_s(), state.left_s())):
                self.gains[0] += before - local.cost
                self.take(local.best, local.cost)
        self.seconds[0] += state.elapsed_s() - began_s
        self.trade()

    def trade(self) -> None:
        """Exchange the best choices with the walker."""
        if self.local is None:
            return
        assert self.best is not None
        if self.walker is not None:
            cost, chosen = self.walker.exchange(self.best, self.best_cost, self.local.promises)
            self.take(chosen, cost)
            self.local.adopt(chosen, cost)
        self.local.adopt(self.best, self.best_cost)
        self.take(self.local.best, self.local.cost)

    def exact_windows(self, share: float) -> None:
        """Windows for a share of the time limit, their size following how fast they solve."""
        state = self.state
        state.phase = "windows"
        search = self.window_search()
        search.guide(self.dual.excess_costs()[1])
        began_s = state.elapsed_s()
        end_s = began_s + share * state.time_limit_s
        while (left_s := min(end_s - state.elapsed_s(), state.left_s())) > 0 and not state.closed():
            width = _WIDTHS[self.window_turn % len(_WIDTHS)]
            self.window_turn += 1
            before_s = state.elapsed_s()
            patience_s = min(left_s, max(5.0, 0.02 * state.time_limit_s))
            num_seeds = _NUM_SEEDS[self.window_turn % len(_NUM_SEEDS)]
            window = search.grow(search.budget(width), width, num_seeds)
            gain = search.solve_window(window, patience_s)
            search.note(width, state.elapsed_s() - before_s, patience_s)
            if gain > 0:
                self.gains[1] += gain
                self.take(search.chosen, search.cost)
            self.trade()
            search = self.window_search()
        self.seconds[1] += state.elapsed_s() - began_s

    def prove_if_promising(self) -> None:
        """Try a proof unless what was left was too large when the gap was about the same."""
        state = self.state
        state.settle()
        if state.done() or self.proofs >= _MOST_PROOFS:
            return
        gap = relative_gap(state.objective, state.bound)
        if self.too_large_at is not None and gap > 0.9 * self.too_large_at:
            return
        self.prove(min(1.0, 0.2 * 2**self.proofs))

    def prove(self, share: float) -> bool:
        """Drop what cannot be in a better answer, reduce, and close the rest by an ILP if small.

        Returns whether infeasibility was proven.
        """
        state = self.state
        state.settle()
        state.phase = "prove"
        deadline_s = time.perf_counter() + share * max(0.0, state.left_s())
        bound, excess = self.dual.excess_costs()
        useful = bound + np.concatenate(excess) <= self.target()
        if self.parts is not None:
            useful &= self.parts.alive()
        rows = np.split(useful, self.dual.flat.start[1:-1])
        kept = {u: np.flatnonzero(row) for u, row in zip(self.dual.vertices, rows, strict=True)}
        if _pairs_kept(self.graph, kept) > _HOPELESS_PAIRS:
            self.too_large_at = relative_gap(state.objective, state.bound)
            return False
        small = self.graph.copy()
        for u, strategies in kept.items():
            if len(strategies) < len(small.costs[u]):
                small.keep(u, strategies)
        small_rows = self.rows
        if not small.infeasible:
            small_rows = reduce_graph(small, self.rows, out_of_time=state.out_of_time)
        if small.infeasible:
            return _nothing_better(state)
        if count_pairs(small) > _SMALL_PAIRS:
            self.too_large_at = relative_gap(state.objective, state.bound)
            return False
        self.proofs += 1
        memory = MemoryMatrix(small, small_rows, state.out_of_time)
        result = solve_exactly(
            small,
            small_rows,
            memory,
            active=set(),
            deadline_s=deadline_s,
            relative_gap=state.gap,
            threads=max(1, self.threads - 1),
        )
        if result.infeasible:
            return _nothing_better(state)
        if result.chosen is not None:
            self.take_from(small, memory, result.chosen)
        # The pruned problem holds every answer better than the incumbent, and nothing else is promised.
        state.raise_bound(min(result.bound, state.objective))
        return False

    def take_from(self, small: ShardingGraph, memory: MemoryMatrix, chosen: IntArray) -> None:
        """Take an answer to the pruned problem as the best choice in the whole graph's terms."""
        state = self.state
        choice = {u: int(i) for u, i in zip(memory.vertices, chosen, strict=True)}
        cost = small.value(choice)
        if cost < self.best_cost:
            state.offer(Candidate(small, memory.vertices, chosen, cost), at_once=True)
        if state.answer is not None and state.objective < self.best_cost:
            located, is_same = _nearest(self.graph, self.dual.vertices, state.answer)
            if is_same:
                self.best, self.best_cost = located, state.objective


def _next_bound_share(share: float, least: float, rise_per_s: float, fall_per_s: float) -> float:
    """More time for a bound that rises much faster than answers get better."""
    if rise_per_s > _WORTH * fall_per_s:
        return min(_MOST_BOUND_SHARE, 1.5 * share)
    return max(least, share / 1.5)


def _pairs_kept(graph: ShardingGraph, kept: dict[int, IntArray]) -> int:
    return sum(len(kept[u]) * len(kept[v]) for u, tables in graph.tables.items() for v in tables if u < v)


def _nearest(graph: ShardingGraph, vertices: list[int], answer: list[int]) -> tuple[IntArray, bool]:
    """The choice in `graph` that expands to most of `answer`, and whether to all of it.

    Strategies may have been dropped since the answer was found.
    """
    chosen = np.zeros(len(vertices), dtype=np.intp)
    is_same = True
    for p, u in enumerate(vertices):
        agreeing = np.zeros(len(graph.costs[u]), dtype=np.intp)
        for node, map_ in graph.members[u]:
            agreeing += map_ == answer[node]
        chosen[p] = agreeing.argmax()
        is_same &= bool(agreeing[chosen[p]] == len(graph.members[u]))
    return chosen, is_same


def _nothing_better(state: State) -> bool:
    """The pruned problem is empty: the incumbent is optimal, or there is no answer at all."""
    if state.answer is None:
        return True
    state.bound = state.objective
    state.tell()
    return False
