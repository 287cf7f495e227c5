"""A first plan cut at few units: those between which about as much is computed, then near its own."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from graphpar.cost import CostTable
from graphpar.partition.search import Found

Search = Callable[[Sequence[int], Found | None], Found | None]
"""Looks for a better pipeline that is cut at some units only, in the setting of one that is known."""

PARTS = 20
"""Runs of units between cuts; a search over them takes time by their square."""

_FEWER = 1.5
"""So many times as many units pay for a search of their own."""


def cut_roughly(table: CostTable, search: Search) -> Found | None:
    """A good pipeline: cuts of one among few move by half as far as these are apart, then a quarter."""
    if (cuts := _few_cuts(table)) is None:
        return None
    best = search(cuts, None)
    reach = max(b - a for a, b in pairwise((0, *cuts, table.num_units))) // 2
    while best is not None and reach > 0:
        own = [stage.first for stage in best.answer.stages[1:]]
        near = {cut + step for cut in own for step in (-reach, 0, reach)}
        best = search(sorted(c for c in near if 0 < c < table.num_units), best) or best
        reach //= 2
    return best


def _few_cuts(table: CostTable) -> list[int] | None:
    """The first units of stages in a quick first search, but for unit 0; None where units are few."""
    if table.num_units < _FEWER * PARTS:
        return None
    seconds = table.both_s[-1].mean(axis=1)[np.array(table.units)]
    done = np.cumsum(seconds)
    wanted = np.arange(1, PARTS) / PARTS * done[-1]
    found = 1 + np.abs(done[:, None] - wanted).argmin(axis=0)
    return sorted({int(c) for c in found} - {table.num_units})
