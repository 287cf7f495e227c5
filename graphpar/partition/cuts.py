"""Where a first plan may cut the chain: at few units, between which about as much is computed."""

import numpy as np

from graphpar.cost import CostTable

PARTS = 20
"""Runs of units between cuts; a search over them takes time by their square."""

_FEWER = 1.5
"""So many times as many units pay for a search of their own."""


def few_cuts(table: CostTable) -> list[int] | None:
    """The first units of stages in a quick first search, but for unit 0; None where units are few."""
    if table.num_units < _FEWER * PARTS:
        return None
    seconds = table.both_s[-1].mean(axis=1)[np.array(table.units)]
    done = np.cumsum(seconds)
    wanted = np.arange(1, PARTS) / PARTS * done[-1]
    found = 1 + np.abs(done[:, None] - wanted).argmin(axis=0)
    return sorted({int(c) for c in found} - {table.num_units})
