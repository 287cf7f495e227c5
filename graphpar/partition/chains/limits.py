"""The best single pipeline under limits, exactly: dynamic programming over (unit, devices used).

Given limits on every stage's extra and post,

    W[u, k, p, b] = least fill of a suffix of the pipeline that starts at unit u, uses exactly the
                    devices k (a count per cell), whose first stage stands in the places p and is
                    reached over a link of kind b
                  = min over options o with places p, last unit, link kind a after the stage:
                        fill(o, u, last) + transfer(b, u) + V[last, k - o, p, a]
    V[v, k, p, a] = min over places q whose link from p is of kind a of W[v, k, q, a]
    V[n, 0, p, 0] = 0

with the terms that break a limit or the memory left out. Memory depends only on how many replicas
follow. That is the number of devices in k; where there are tensor groups, k counts replicas as well,
as if they were devices of one more cell.

Most stages are never looked at: those that a proof excludes are dropped before the first solve
(`ChainProgram.tighten`), and what is left is a list of columns. Work: the sum over k of the columns
within k, in array operations.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphpar.partition.cells import StageOption
from graphpar.partition.chains.columns import Columns, StagePrices, no_columns
from graphpar.partition.chains.crews import (
    ROUNDS_FOR_LOOPS,
    CrewBounds,
    Kept,
    KnownPrices,
    Shared,
)
from graphpar.partition.chains.relaxed import ROUNDS, Relaxation
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.device_sets import states_of, strides_of
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]

_MANY_COLUMNS = 6000
"""So many columns are worth a second bound that counts replicas."""

_FEW_COLUMNS = 1500
"""So few columns are solved as they are."""


_FEW_FOR_LOOPS = 20_000
"""With compiled loops so few columns are swept as they are."""

MANY_FOR_LOOPS = 20_000
"""So many columns are bounded by sets of devices first (`crews`)."""


class NotSolvedError(OutOfTimeError):
    """A programme has no answer yet; every answer has a fill of at least `bound_s`."""

    def __init__(self, bound_s: float) -> None:
        super().__init__(f"no answer yet, at least {bound_s} s")
        self.bound_s = bound_s


@dataclass(frozen=True)
class Stage:
    """Units `first` to `last - 1` staffed by an option; `joined` where it is to share the node of the
    stage before it.
    """

    first: int
    last: int
    option: StageOption
    joined: bool = False


@dataclass(frozen=True)
class ChainAnswer:
    """The pipeline with the least fill under the limits.

    `bound_s` is a lower bound on the fill of every such pipeline; the dynamic programme's is exact.
    """

    fill_s: float
    extra_s: float
    post_s: float
    bound_s: float
    stages: tuple[Stage, ...]


class ChainProgram:
    """The dynamic programme of one pipeline over the devices `limits` (a count per cell).

    `weights` are first guesses of how much a device of each cell counts in the bound; programmes that
    share `known` begin with the prices that others on the same devices ended with.
    """

    def __init__(
        self,
        prices: StagePrices,
        limits: Sequence[int],
        num_units: int,
        weights: FloatArray,
        known: KnownPrices | None = None,
        shared: Shared | None = None,
    ) -> None:
        known, shared = ({} if known is None else known), ({} if shared is None else shared)
        self._crews = CrewBounds(prices, num_units, limits, weights, known, shared)
        self._prices = prices
        rows = self._rows = prices.rows
        self._cell_counts = tuple(limits)
        self._num_units = num_units
        self._weights = weights
        take = rows.take
        self._counts_replicas = rows.counts_replicas
        if self._counts_replicas:
            limits = (*limits, sum(limits))
            take = np.concatenate([take, rows.width[:, None]], axis=1)
        self.limits = tuple(limits)
        self._take = take
        self._teams, self._team = rows.teams(self._counts_replicas)
        self._strides = strides_of(self.limits)
        self._states = states_of(self.limits)
        self._replicas = self._states[:, -1] if self._counts_replicas else self._states.sum(axis=1)
        self._place = rows.place
        self._kept: Kept | None = None
        self._bound_s = 0.0
        self._relaxation: Relaxation | None = None
        self._use(no_columns())

    @property
    def num_variables(self) -> int:
        """Stages before any is excluded."""
        return self._prices.num_variables

    @property
    def is_quick(self) -> bool:
        """Whether solving takes no more than milliseconds."""
        return True

    @property
    def extras_s(self) -> FloatArray:
        """All values the busiest stage's extra can take, increasing."""
        return np.unique(self._columns.extra_s)

    @property
    def posts_s(self) -> FloatArray:
        """All values the largest post can take, increasing."""
        return np.unique(self._columns.post_s)

    def tighten(self, target_s: float, post_limit_s: float, post_weight: float) -> float:
        """Drop columns of no plan below the target; a lower bound on every plan of the programme.

        The bound covers fill, extra and `post_weight` times post.
        """
        wanted = Kept(target_s, post_limit_s, post_weight)
        if self._kept is None or not self._kept.covers(wanted):
            self._price(wanted)
        elif self._kept != wanted:
            kept = self._bound_s + self._reduced_s < target_s
            self._use(self._columns.pick(kept), self._reduced_s[kept])
            self._kept = wanted
        return self._bound_s

    def solve(self, limits: StageLimits, deadline_s: float) -> ChainAnswer | None:
        """The least fill with every stage within the limits, or None.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s`.
        """
        if self._kept is None:
            self.tighten(np.inf, np.inf, 1.0)
        self._sort()
        columns = self._columns
        within: BoolArray = (columns.extra_s <= limits.extra_s) & (columns.post_s <= limits.post_s)
        within &= columns.extra_s + columns.post_s <= limits.both_s
        within &= columns.cost_s < limits.fill_s
        index = self._cheapest(np.flatnonzero(within))
        if len(index) == 0:
            return None
        exits = self._sweep(index, deadline_s)
        return self._trace(index, exits)

    def _cheapest(self, index: IntArray) -> IntArray:
        """Columns but those whose devices do the same for less with no tighter memory."""
        if len(index) == 0:
            return index
        most = float(self._replicas.max()) + 1
        below = np.minimum(self._columns.most_below[index], most - 1)
        lifted = below + self._alike[index] * most
        before = np.concatenate([[-1.0], np.maximum.accumulate(lifted)[:-1]])
        found: IntArray = index[lifted > np.maximum(before, self._alike[index] * most - 0.5)]
        return found

    @property
    def _join(self) -> BoolArray:
        return self._rows.joins

    # --- which columns ---

    def _price(self, wanted: Kept) -> None:
        """Price columns anew: those below the target by themselves, then those the bound leaves."""
        limits = StageLimits(post_s=wanted.post_s, all_s=wanted.all_s, post_weight=wanted.post_weight)
        self._bound_s, hopeful = 0.0, None
        if self._prices.loops and self._prices.num_variables > MANY_FOR_LOOPS:
            excluded = self._crews.left_out(wanted)
            self._bound_s, hopeful = excluded.bound_s, excluded.hopeful
            if self._bound_s >= wanted.all_s:
                self._use(no_columns())
                self._kept = wanted
                return
        columns = self._prices.relaxed(limits, hopeful=hopeful)
        reduced = np.zeros(len(columns))
        if self._are_many(columns):
            columns, reduced, self._bound_s = self._excluded(columns, wanted, self._bound_s)
        kept = np.flatnonzero(self._bound_s + reduced < wanted.all_s)
        columns, reduced = columns.pick(kept), reduced[kept]
        exact, rows = self._prices.exact(columns)
        self._use(exact, reduced[rows])
        self._kept = wanted

    def _are_many(self, columns: Columns) -> bool:
        """Whether a bound takes less time than columns that it excludes would."""
        return len(columns) > (_FEW_FOR_LOOPS if self._prices.loops else _FEW_COLUMNS)

    def _excluded(
        self, columns: Columns, wanted: Kept, bound_s: float = 0.0
    ) -> tuple[Columns, FloatArray, float]:
        """Columns without those that the bound excludes, what each adds to it, and the bound.

        `bound_s` is one that is known.
        """
        # A bound that counts post is none on what a pipeline takes without it.
        if self._relaxation is None or self._relaxation.post_weight != wanted.post_weight:
            rows = self._rows
            self._relaxation = self._crews.relaxation(
                rows.slots, rows.take, rows.width, wanted.post_weight
            )
        target_s = wanted.all_s
        if self._prices.loops:
            # A sweep of labels is cheap: a few steps from what is known of other settings will do.
            deep, rounds = self._crews.positions_matter(columns), ROUNDS_FOR_LOOPS
            found = self._bounded(columns, target_s, bound_s, deep=deep, rounds=rounds)
        else:
            found = self._bounded(columns, target_s, bound_s)
            if len(found[0]) > _MANY_COLUMNS and self._crews.positions_matter(found[0]):
                found = self._bounded(found[0], target_s, found[2], deep=True)
        self._crews.learn(self._relaxation)
        return found

    def _bounded(
        self,
        columns: Columns,
        target_s: float,
        known_s: float,
        *,
        deep: bool = False,
        rounds: int = ROUNDS,
    ) -> tuple[Columns, FloatArray, float]:
        """The columns that the bound leaves, what each adds to it or a known one if better, and that."""
        assert self._relaxation is not None
        bounded = self._relaxation.bound(columns, target_s, deep=deep, rounds=rounds)
        bound_s = max(known_s, bounded.bound_s)
        kept = np.flatnonzero(bounded.bound_s + bounded.reduced_s < target_s)
        # What the better of two bounds says about a column is at least what the other said.
        left = bounded.reduced_s[kept] + (bounded.bound_s - bound_s)
        return columns.pick(kept), left, bound_s

    def _use(self, columns: Columns, reduced: FloatArray | None = None) -> None:
        """Columns for the next answers, as they come."""
        self._columns, self._sorted = columns, False
        self._reduced_s = np.zeros(len(columns)) if reduced is None else reduced

    def _sort(self) -> None:
        """Sort columns by where a sweep puts them."""
        if self._sorted:
            return
        self._sorted = True
        columns, reduced = self._columns, self._reduced_s
        slots, option = self._rows.slots.at(columns.slot), columns.option
        kinds = len(self._rows.kinds)
        head = self._place[option] * kinds + slots.before
        head = head * (self._num_units + 1) + slots.first
        after = self._place[option] * kinds + slots.after
        after = after * (self._num_units + 1) + slots.last
        after_size = len(self._join) * kinds * (self._num_units + 1)
        key = (head * len(self._teams) + self._team[option]) * after_size + after
        order = np.lexsort((columns.cost_s, key))
        self._columns = columns.pick(order)
        self._reduced_s = reduced[order]
        self._head = head[order]
        self._after = after[order]
        self._rest = self._take[self._columns.option] @ self._strides
        self._alike = np.cumsum(np.diff(key[order], prepend=-1) != 0)

    # --- the dynamic programme ---

    def _sweep(self, index: IntArray, deadline_s: float) -> FloatArray:
        """V as [state, (place, link kind after), unit], the last two as one axis."""
        width = self._num_units + 1
        kinds, places = len(self._rows.kinds), len(self._join)
        exits = np.full((len(self._states), places * kinds * width), np.inf)
        ends = (np.arange(places) * kinds) * width + self._num_units
        exits[0, ends] = 0.0
        flat = exits.reshape(-1)
        cost, below = self._columns.cost_s[index], self._columns.most_below[index]
        head, rest, after = self._head[index], self._rest[index], self._after[index]
        team = self._team[self._columns.option[index]]
        joined = [
            (kind, [np.flatnonzero(self._join[p, :, kind]) for p in range(places)])
            for kind in range(1, kinds)
        ]
        for count, number in enumerate(self._order()):
            if count % 32 == 0 and time.monotonic() > deadline_s:
                raise OutOfTimeError
            mine = self._within(number)[team] & (below >= self._replicas[number])
            own = np.flatnonzero(mine)
            if len(own) == 0:
                continue
            values = cost[own] + flat[(number - rest[own]) * exits.shape[1] + after[own]]
            heads = np.full(places * kinds * width, np.inf)
            starts = np.flatnonzero(np.diff(head[own], prepend=-1))
            heads[head[own][starts]] = np.minimum.reduceat(values, starts)
            self._open(exits[number], heads.reshape(places, kinds, width), joined)
        return exits

    def _within(self, state: int) -> BoolArray:
        """[team]: whether the devices of a state suffice for it."""
        found: BoolArray = np.logical_and.reduce(self._teams <= self._states[state], axis=1)
        return found

    def _open(
        self,
        exits: FloatArray,
        heads: FloatArray,
        joined: Sequence[tuple[int, list[IntArray]]],
    ) -> None:
        """Make the suffixes of a state available to every place they can be reached from."""
        view = exits.reshape(heads.shape)
        for kind, reach in joined:
            for place, others in enumerate(reach):
                if len(others):
                    view[place, kind] = heads[others, kind].min(axis=0)
        # Kind 0 is entered at the chain's end only: at unit 0 it keeps the values of whole pipelines.
        view[0, 0, 0] = heads[:, 0, 0].min()

    def _order(self) -> IntArray:
        """States that some suffix may use, by number of replicas."""
        usable = self._replicas > 0
        if self._counts_replicas:
            usable &= self._replicas <= self._states[:, :-1].sum(axis=1)
        states = np.flatnonzero(usable)
        found: IntArray = states[np.argsort(self._replicas[states], kind="stable")]
        return found

    def _trace(self, index: IntArray, exits: FloatArray) -> ChainAnswer | None:
        whole = exits[:, 0]
        # Fewer devices among equal plans.
        number = int(np.lexsort((self._states.sum(axis=1), whole))[0])
        fill = float(whole[number])
        if not np.isfinite(fill):
            return None
        columns, slots, options = self._columns, self._rows.slots.every, self._rows.options
        slot, option = columns.slot[index], columns.option[index]
        team = self._team[option]
        stages: list[Stage] = []
        extra = post = 0.0
        unit, place, kind = 0, -1, 0
        while unit < self._num_units:
            mine = (slots.first[slot] == unit) & (slots.before[slot] == kind)
            mine &= (columns.most_below[index] >= self._replicas[number]) & self._within(number)[team]
            if place >= 0:
                mine &= self._join[place, self._place[option], kind]
            own = np.flatnonzero(mine)
            values = (
                columns.cost_s[index][own]
                + exits[number - self._rest[index][own], self._after[index][own]]
            )
            best = own[int(values.argmin())]
            column = int(index[best])
            stages.append(Stage(unit, int(slots.last[slot[best]]), options[option[best]]))
            extra = max(extra, float(columns.extra_s[column]))
            post = max(post, float(columns.post_s[column]))
            number -= int(self._rest[column])
            unit, place, kind = (
                stages[-1].last,
                int(self._place[option[best]]),
                int(slots.after[slot[best]]),
            )
        return ChainAnswer(fill, extra, post, fill, tuple(stages))
