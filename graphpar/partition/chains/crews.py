"""Which sets of devices no plan below a target has where: crews are bounded before stages are listed.

First whatever the mode and the links beside it: a run of units is one slot, however many kinds of links
there are (`crew_loops`). Then what is left in every mode. Both under either schedule, which share the
answer: which options there may be on each run, and what these may take between links.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphpar.partition.chains.columns import Columns, StagePrices
from graphpar.partition.chains.hopeful import Allowed, Hopeful, all_allowed, listed
from graphpar.partition.chains.relaxed import Prices, Relaxation
from graphpar.partition.chains.sets import DEEPEST, SetChains
from graphpar.partition.slots import Slots
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import FloatArray, IntArray

MOST_COUNTED = 16
"""A bound that counts replicas takes time in proportion to them."""

ROUNDS_FOR_LOOPS = 30
"""Steps in which columns are bounded where loops do it."""

FEW_FOR_SETS = 20_000
"""So few columns between links are not looked at by the devices behind them."""

_MANY_WINDOWS, _MANY_LINKS = 20_000, 16
"""So many columns are looked at by windows of extra only if runs stand between so many pairs of links."""

_DEEPEST_OF_CREWS = 3
"""So often windows are divided while crews stand for all their modes."""

KnownPrices = dict[tuple[int, ...], Prices]
"""The best prices found for pipelines on some devices, given as counts per cell."""


@dataclass(frozen=True)
class Kept:
    """Which columns are in use: all that a plan below `all_s` within `post_s` may have."""

    all_s: float
    post_s: float
    post_weight: float

    def answers(self, other: "Kept") -> bool:
        """Whether the best plan below one target is that below the other, if it is below that at all."""
        return self.covers(other) and self.post_s == other.post_s

    def covers(self, other: "Kept") -> bool:
        """Whether whatever the other has in use is in use here."""
        return (
            self.all_s >= other.all_s
            and self.post_s >= other.post_s
            and self.post_weight == other.post_weight
        )


@dataclass(frozen=True, eq=False)
class Excluded:
    """What a plan below `all_s` may have, options by run; and a bound on them all.

    Where the bound is no less than that, there is no such plan, and crews are listed instead.
    """

    all_s: float
    bound_s: float
    hopeful: Hopeful


Shared = dict[tuple[object, ...], Excluded]
"""What is excluded under either schedule, by setting, devices, and how post counts."""


class CrewBounds:
    """Bounds on the pipelines of one setting over the devices `counts` (a number per cell).

    `weights` are first guesses of how much a device of each cell counts; whoever shares `known` begins
    with the prices that others on the same devices ended with, and whoever shares `shared` has what was
    excluded under the other schedule.
    """

    def __init__(
        self,
        prices: StagePrices,
        num_units: int,
        counts: Sequence[int],
        weights: FloatArray,
        known: KnownPrices,
        shared: Shared,
    ) -> None:
        self._prices, self._rows, self._num_units = prices, prices.rows, num_units
        self._counts, self._weights = tuple(counts), weights
        self._known, self._shared = known, shared

    @property
    def known(self) -> Prices | None:
        """The best prices so far."""
        return self._known.get(self._counts)

    def learn(self, relaxation: Relaxation) -> None:
        """Keep the prices of a relaxation for the next one."""
        self._known[self._counts] = relaxation.prices

    def relaxation(self, slots: Slots, take: IntArray, width: IntArray, post_weight: float) -> Relaxation:
        """A bound on columns on some slots, by what their options take and their replicas."""
        return Relaxation(
            slots,
            self._num_units,
            take,
            width,
            self._counts,
            self._weights,
            post_weight,
            self.known,
            loops=self._prices.loops,
        )

    def positions_matter(self, columns: Columns) -> bool:
        """Whether replicas are counted: few enough, and cheap or memory limits where stages may stand."""
        replicas = sum(self._counts)
        if replicas > MOST_COUNTED or self._prices.loops:
            return replicas <= MOST_COUNTED
        return bool((columns.most_below < replicas).any())

    def left_out(self, wanted: Kept) -> Excluded:
        """Which sets of devices no plan below the target has where, under either schedule."""
        key = (self._prices.setting.shared, self._counts, wanted.post_s, wanted.post_weight)
        known = self._shared.get(key)
        if known is None or known.all_s < wanted.all_s:
            known = self._on_any_links(wanted)
            if known.bound_s < wanted.all_s:
                known = self._in_all_modes(wanted, known)
            self._shared[key] = known
        return known

    def rehearse(self) -> None:
        """Use every loop once."""
        wanted = Kept(np.inf, np.inf, 1.0)
        self.left_out(wanted)
        columns = self._prices.on_any_links(_limits(wanted))
        prices = self.relaxation(self._rows.whole_slots, self._rows.take, self._rows.width, 1.0).prices
        _, some, allowed = self._in_sets(wanted, 0.0, prices, columns, columns.option)
        hopeful = _listed(columns.pick(some), allowed)
        self._prices.relaxed(_limits(wanted), hopeful=hopeful)

    def _on_any_links(self, wanted: Kept) -> Excluded:
        """Whatever the mode and the links beside it."""
        rows, first = self._rows, self._rows.first_rows
        slots = rows.whole_slots
        relaxation = self.relaxation(slots, rows.take[first], rows.width[first], wanted.post_weight)
        deep = sum(self._counts) <= MOST_COUNTED
        bound_s, crews = relaxation.first_look(self._prices, _limits(wanted), deep=deep)
        if bound_s >= wanted.all_s:
            return Excluded(wanted.all_s, bound_s, _listed(crews, None))
        return self._bounded(
            wanted, bound_s, relaxation, crews, first[crews.option], deepest=_DEEPEST_OF_CREWS
        )

    def _in_all_modes(self, wanted: Kept, known: Excluded) -> Excluded:
        """What is left of that in every mode."""
        rows = self._rows
        columns = self._prices.on_any_links(_limits(wanted), known.hopeful)
        relaxation = self.relaxation(rows.whole_slots, rows.take, rows.width, wanted.post_weight)
        return self._bounded(wanted, known.bound_s, relaxation, columns, columns.option)

    def _bounded(
        self,
        wanted: Kept,
        bound_s: float,
        relaxation: Relaxation,
        columns: Columns,
        rows: IntArray,
        deepest: int = DEEPEST,
    ) -> Excluded:
        """Raise a bound on columns that stand for some rows."""
        deep = self.positions_matter(columns)
        bounded = relaxation.bound(columns, wanted.all_s, rounds=ROUNDS_FOR_LOOPS, deep=deep)
        self.learn(relaxation)
        bound_s = max(bound_s, bounded.bound_s)
        some = np.flatnonzero(bounded.bound_s + bounded.reduced_s < wanted.all_s)
        left, allowed = columns.pick(some), None
        if len(left) > FEW_FOR_SETS / self._pairs and wanted.all_s < np.inf:
            bound_s, chosen, allowed = self._in_sets(
                wanted, bound_s, relaxation.prices, left, rows[some], deepest
            )
            left = left.pick(chosen)
        return Excluded(wanted.all_s, bound_s, _listed(left, allowed))

    @property
    def _pairs(self) -> float:
        """Pairs of links between which a run stands, in the mean."""
        return len(self._rows.slots) / len(self._rows.whole_slots)

    def _in_sets(
        self,
        wanted: Kept,
        bound_s: float,
        prices: Prices,
        left: Columns,
        option: IntArray,
        deepest: int = DEEPEST,
    ) -> tuple[float, IntArray, Allowed | None]:
        """A bound, what is left where no device is in two stages, and what that allows others."""
        rows, pairs, allowed = self._rows, self._pairs, None
        sets, units = rows.device_sets(self._counts), self._num_units
        slots = rows.whole_slots
        chains = SetChains(left, option, sets, slots, units, wanted.all_s, wanted.post_weight)
        least_s, some = chains.at_prices(rows.take @ prices.nu, rows.take @ prices.rho)
        if len(some) < _MANY_WINDOWS or pairs > _MANY_LINKS:
            some, allowed = chains.in_windows(some, int(FEW_FOR_SETS / pairs), deepest)
        return max(bound_s, least_s) if len(some) else wanted.all_s, some, allowed


def _listed(left: Columns, allowed: Allowed | None) -> Hopeful:
    return listed(left.slot, left.option, all_allowed(len(left)) if allowed is None else allowed)


def _limits(wanted: Kept) -> StageLimits:
    return StageLimits(post_s=wanted.post_s, all_s=wanted.all_s, post_weight=wanted.post_weight)
