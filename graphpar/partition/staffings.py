"""How the stages of a pipeline may be staffed by devices, widest first, and what searching that costs.

Without compiled loops a search is sweeps of the dynamic programme in array operations, and what those
touch is counted. With loops it is pricing: one number for every set of devices on every run of units
between every pair of links; a sweep then goes over the few stages that are left, once for every set of
devices that may be in use behind a stage.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, count_vectors

SWEEP_LIMIT = 10_000_000
"""Array elements one sweep of the dynamic programme may touch: some tens of milliseconds."""

_MODES_MAY_COST = 6
"""How many times as much with all modes: in most tables few of them survive the first look."""

_REAL_LINKS_MAY_COST = 3
"""How many times as much where links would be relaxed otherwise: then nothing is proven of placement."""

_MODES_MAY_COST_THERE = 300
"""The same with all modes: what is left out of account in a first look is most of them."""

_PRICED_LIMIT = 4_000_000
"""Stages in the fastest mode that loops may price for one setting: some tenths of a second."""

_MODES_PRICED = 12
"""How many times as many stages there may be with all modes, as most are excluded before these differ."""

_FEW_SETS = 1024
"""With more sets of devices sweeps take longer: fewer stages are priced, by the root of the ratio."""

_MOST_PAIRS = 16
"""Sets of devices are bounded whatever the links beside them: more pairs of links cost no more."""

MOST_STATES = 1 << 12
"""Sets of devices that a sweep may go through, by loops or in array operations."""

_MOST_TAKES = 255
"""Ways to take devices for a stage in array operations."""

_WIDTHS = {4: "four", 3: "three", 2: "two"}
"""Most unlike replicas of a stage where any number of them is too many to look at."""

Take = tuple[int, ...]
"""Devices of each cell."""


@dataclass(frozen=True)
class Effort:
    """How much a search may cost: elements of a sweep in array operations, or stages priced by loops.

    `plain` without modes, `modes` with them.
    """

    plain: float
    modes: float
    loops: bool = False

    def allows(self, table: CostTable, cells: Cells, takes: Sequence[Take], *, plain: bool) -> bool:
        """Whether stages that take so many devices of each cell, one entry per option, cost no more."""
        most = self.plain if plain else self.modes
        if self.loops:
            most *= min(1.0, (_FEW_SETS / states(cells)) ** 0.5)
        return _cost(table, cells, takes, self.loops) <= most


BY_LOOPS = Effort(_PRICED_LIMIT, _MODES_PRICED * _PRICED_LIMIT, loops=True)
BY_ARRAYS = Effort(SWEEP_LIMIT, _MODES_MAY_COST * SWEEP_LIMIT)
ON_REAL_LINKS = Effort(_REAL_LINKS_MAY_COST * SWEEP_LIMIT, _MODES_MAY_COST_THERE * SWEEP_LIMIT)


def staffings(cells: Cells, max_width: int, effort: Effort) -> Iterator[tuple[str, list[Take]]]:
    """Ways to restrict the staffing of a stage, in words and as devices of each cell, widest first."""
    counts = cells.counts
    if states(cells) > MOST_STATES:
        return
    most = min(max_width, sum(counts))
    everything = count_vectors(counts, most)
    if effort.loops or len(everything) <= _MOST_TAKES:
        yield "any set of replicas", everything
    singles = [t for t in everything if sum(t) == 1]
    uniform = [t for t in everything if sum(n > 0 for n in t) == 1]
    if most > 1:
        for width, word in _WIDTHS.items():
            if width < most and (effort.loops or width == 2):
                near = [t for t in everything if sum(t) <= width or t in uniform]
                yield f"interchangeable replicas, or any {word} devices", near
        if len(uniform) > len(singles):
            yield "interchangeable replicas", uniform
    yield "one device per stage", singles


def states(cells: Cells) -> int:
    """Sets of devices."""
    return math.prod(n + 1 for n in cells.counts)


def _cost(table: CostTable, cells: Cells, takes: Sequence[Take], loops: bool) -> float:
    kinds = max(len({k for row in cells.links for k in row if k is not None}), 1)
    if loops:
        pairs = min(kinds**2, _MOST_PAIRS)
        return len(takes) * pairs * table.num_units * (table.num_units + 1) / 2
    touched = 0
    for take in takes:
        touched += math.prod(n - t + 1 for n, t in zip(cells.counts, take, strict=True))
    return touched * kinds**2 * table.num_units**2
