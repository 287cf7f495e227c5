"""Better first answers straight from the file's numbers, for little more time than one takes.

In a first choice (`first`) what comes first takes the memory, and sees no further than its
neighbours. So the same is tried again with memory at a price, what others promise counting what all after
them do. No one price suits all problems.
"""

import numpy as np

from graphpar.partition.clock import ShouldStop, never
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.sharding.first import choose
from graphpar.partition.sharding.flat import Int64Array
from graphpar.partition.sharding.graph import FloatArray
from graphpar.partition.sharding.raw import RawProblem

_PRICES = (1.0, 0.0, 10.0, 0.01, 1e3)
"""Prices of memory, those first that gave the better answers to the public problems. At a price of one
all together pay for their memory, on the average of their strategies, what an answer costs."""


def better_choice(
    raw: RawProblem, answer: list[int] | None, should_stop: ShouldStop = never
) -> list[int] | None:
    """The cheapest answer at as many prices of memory as there is time for, if it is better."""
    if not raw.num_nodes:
        return None
    sizes = np.diff(raw.start)
    usable = np.isfinite(raw.cost)
    owner = np.repeat(np.arange(raw.num_nodes), sizes)
    least = np.minimum.reduceat(np.where(usable, raw.usage, np.inf), raw.start[:-1])
    above = np.where(usable & (raw.row_first < raw.row_last)[owner], raw.usage - least[owner], 0.0)
    total = float((np.add.reduceat(above, raw.start[:-1]) / sizes).sum())
    best, best_cost = None, np.inf
    if answer is not None:
        best_cost = _cost_of(raw, np.array(answer, np.int64))
    level = best_cost if best_cost < np.inf else _average_cost(raw)
    for price in _PRICES:
        if should_stop():
            break
        cost = raw.cost + price * abs(level) / (total or 1.0) * above
        ahead = cost.copy()
        look_ahead(raw, ahead)
        chosen = choose(raw._replace(cost=cost), ahead)
        if chosen is not None and (found := _cost_of(raw, chosen)) < best_cost:
            best, best_cost = chosen.tolist(), found
    return best


def _cost_of(raw: RawProblem, chosen: Int64Array) -> float:
    mine = np.repeat(chosen, np.diff(raw.end_start))
    pairs = raw.pairs[raw.end_table + mine * raw.end_step + chosen[raw.end_to] * raw.end_other]
    return float(raw.cost[raw.start[:-1] + chosen].sum() + 0.5 * pairs.sum())


def _average_cost(raw: RawProblem) -> float:
    """What an answer might cost: the average possible cost of a strategy, and of a pair, for each."""
    strategies, pairs = raw.cost[np.isfinite(raw.cost)], raw.pairs[np.isfinite(raw.pairs)]
    parts = ((raw.num_nodes, strategies), (0.5 * len(raw.end_to), pairs))
    return float(sum(count * amounts.mean() for count, amounts in parts if len(amounts)))


@compiled_exactly
def look_ahead(raw: RawProblem, ahead: FloatArray) -> None:
    """Add to every strategy what the nodes after it promise at best; `ahead` holds its own cost before.

    A node that several nodes come before divides what it promises among them.
    """
    for v in range(len(raw.start) - 2, -1, -1):
        begin, count = raw.start[v], raw.start[v + 1] - raw.start[v]
        before = 0
        for e in range(raw.end_start[v], raw.end_start[v + 1]):
            u, at, step, other = raw.end_to[e], raw.end_table[e], raw.end_step[e], raw.end_other[e]
            if u < v:
                before += 1
                continue
            start, width = raw.start[u], raw.start[u + 1] - raw.start[u]
            for i in range(count):
                least = np.inf
                for j in range(width):
                    least = min(least, raw.pairs[at + i * step + j * other] + ahead[start + j])
                ahead[begin + i] += least
        if before > 1:
            for i in range(count):
                ahead[begin + i] /= before
