"""The programme of one pipeline whose best plan is found in one sweep, with compiled loops."""

import numpy as np

from graphpar.partition.chains import limits as chain
from graphpar.partition.chains.columns import Columns
from graphpar.partition.chains.crews import Kept
from graphpar.partition.chains.labels import (
    LabelColumns,
    LabelStates,
    ManyLabelsError,
    best_line,
    not_outdone,
)
from graphpar.partition.chains.limits import ChainAnswer, ChainProgram, Stage
from graphpar.partition.chains.relaxed import Bounded, Prices
from graphpar.partition.chains.sets import DEEPEST, SetChains
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import BoolArray

_ROUNDS_FOR_SIMPLE = 10
"""Steps to bound pipelines with one replica per stage: only guesses begin there."""

_MANY_LABELS = 100_000
"""With more labels a sweep takes longer than windows of extra, which leave fewer columns."""

_FEW_IN_WINDOW = 5_000
"""Windows of so few columns are not divided."""


class SweptProgram(ChainProgram):
    """A `ChainProgram` that answers `best`; its prices have compiled loops."""

    _answered: tuple[Kept, ChainAnswer | None] | None = None
    _simple: tuple[Columns, Bounded, Prices] | None = None

    def best(
        self, target_s: float, post_limit_s: float, post_weight: float, deadline_s: float
    ) -> ChainAnswer | None:
        """The pipeline whose fill, extra and `post_weight` times post are least below a target, or None.

        To be asked after `tighten`.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s`.
        """
        asked = Kept(target_s, post_limit_s, post_weight)
        if self._answered is None or not self._answered[0].answers(asked):
            found = self._best_of(self._columns, target_s, post_limit_s, post_weight, deadline_s)
            self._answered = asked, found
        known = self._answered[1]
        if known is None or known.fill_s + known.extra_s + post_weight * known.post_s >= target_s:
            return None
        return known

    def best_whole(self, target_s: float, post_limit_s: float, post_weight: float) -> ChainAnswer | None:
        """`best` of the pipelines of one stage."""
        limits = StageLimits(post_s=post_limit_s, all_s=target_s, post_weight=post_weight)
        columns = self._prices.exact(self._prices.relaxed(limits, simple=2))[0]
        takes = columns.cost_s + columns.extra_s + post_weight * columns.post_s
        index = np.flatnonzero(takes < target_s)
        if len(index) == 0:
            return None
        return self._answer(columns.pick(index[[takes[index].argmin()]]))

    def bound_simple(self, target_s: float, post_limit_s: float, post_weight: float) -> float:
        """A lower bound on the pipelines with one replica per stage that are below a target."""
        limits = StageLimits(post_s=post_limit_s, all_s=target_s, post_weight=post_weight)
        columns = self._prices.exact(self._prices.relaxed(limits, simple=1))[0]
        relaxation = self._crews.relaxation(
            self._rows.slots, self._rows.take, self._rows.width, post_weight
        )
        deep = self._crews.positions_matter(columns)
        bounded = relaxation.bound(columns, target_s, rounds=_ROUNDS_FOR_SIMPLE, deep=deep)
        self._crews.learn(relaxation)
        self._simple = columns, bounded, relaxation.prices
        return bounded.bound_s

    def good_simple(
        self,
        target_s: float,
        post_limit_s: float,
        post_weight: float,
        deadline_s: float,
        slack_s: float,
    ) -> ChainAnswer | None:
        """About the best of those below a target, if any; to be asked after `bound_simple`.

        Differences of `slack_s` are none: a plan that is less by so much per stage may be missed.
        """
        assert self._simple is not None
        columns, bounded, prices = self._simple
        kept = columns.pick(bounded.bound_s + bounded.reduced_s < target_s)
        return self._best_of(kept, target_s, post_limit_s, post_weight, deadline_s, prices, slack_s)

    def none_from(self, target_s: float, deadline_s: float) -> bool:
        """Whether no pipeline with so many samples or more is below a target, in as many microbatches.

        More samples take no less time and memory (`Programs.larger_need_more`). All that could get less
        is how many microbatches one of several replicas takes, for which the least possible stands; and
        whole samples are dealt at their mean (`columns`). A stage that is the busiest then has no
        less extra and first microbatch together, any other one no shorter a first microbatch; so the
        least fill and extra of all is a bound on those with more samples.
        """
        wanted, hopeful = Kept(target_s, np.inf, 1.0), None
        if self._prices.num_variables > chain.MANY_FOR_LOOPS:
            # There, too, each of several replicas keeps one microbatch.
            excluded = self._crews.left_out(wanted)
            if excluded.bound_s >= target_s:
                return True
            hopeful = excluded.hopeful
        columns = self._prices.relaxed(StageLimits(all_s=target_s), spread=True, hopeful=hopeful)
        if self._are_many(columns):
            columns, _, _ = self._excluded(columns, wanted)
        return self._best_of(columns, target_s, np.inf, 1.0, deadline_s) is None

    def _best_of(
        self,
        columns: Columns,
        target_s: float,
        post_limit_s: float,
        post_weight: float,
        deadline_s: float,
        known: Prices | None = None,
        slack_s: float = 0.0,
    ) -> ChainAnswer | None:
        """About the best of some columns; where labels are many, of those that windows of extra leave."""
        within = columns.post_s <= post_limit_s
        columns = columns if within.all() else columns.pick(within)
        asked = target_s, post_weight, deadline_s, known, slack_s
        try:
            return self._swept(columns, *asked, most_labels=_MANY_LABELS)
        except ManyLabelsError:
            return self._swept(self._in_windows(columns, target_s, post_weight), *asked)

    def _in_windows(self, columns: Columns, target_s: float, post_weight: float) -> Columns:
        """Those that may be in a pipeline below a target in which no device is in two stages."""
        columns = columns.pick(np.argsort(columns.slot, kind="stable"))
        rows, units = self._rows, self._num_units
        sets = rows.device_sets(self._cell_counts)
        chains = SetChains(columns, columns.option, sets, rows.slots, units, target_s, post_weight)
        return columns.pick(chains.in_windows(np.arange(len(columns)), _FEW_IN_WINDOW, DEEPEST)[0])

    def _swept(
        self,
        columns: Columns,
        target_s: float,
        post_weight: float,
        deadline_s: float,
        known: Prices | None,
        slack_s: float,
        most_labels: float = np.inf,
    ) -> ChainAnswer | None:
        if len(columns) == 0:
            return None
        units, team = self._num_units + 1, self._team[columns.option]
        head, after = self._rows.slots.at(columns.slot).places
        order = np.argsort(team * (units * len(self._rows.kinds)) + after, kind="stable")
        columns, team = columns.pick(order), team[order]
        kept = not_outdone(
            team,
            columns.slot,
            (columns.cost_s, columns.extra_s, columns.post_s, columns.most_below),
            post_weight,
        )
        columns, team, order = columns.pick(kept), team[kept], order[kept]
        option, prices = columns.option, known or self._prices_of_devices()
        take = self._rows.take.astype(np.float64)
        priced = columns.cost_s + (take @ prices.nu)[option] * columns.extra_s
        priced += post_weight * (take @ prices.rho)[option] * columns.post_s + (take @ prices.use)[option]
        line = best_line(
            LabelColumns(
                team=team,
                head=head[order],
                after=after[order],
                place=self._place[option],
                width=self._rows.width[option],
                below=np.minimum(columns.most_below, float(self._replicas.max())).astype(np.intp),
                cost_s=columns.cost_s,
                extra_s=columns.extra_s,
                post_s=columns.post_s,
                priced_s=priced,
            ),
            self._label_states(prices),
            self._join,
            self._rows.stands_for,
            self._num_units,
            target_s=target_s,
            post_weight=post_weight,
            deadline_s=deadline_s,
            slack_s=slack_s,
            most_labels=most_labels,
        )
        return None if line is None else self._answer(columns.pick(np.array(line, dtype=np.intp)))

    def _answer(self, line: Columns) -> ChainAnswer:
        """The pipeline of some columns, first to last."""
        slots, options = self._rows.slots.at(line.slot), self._rows.options
        ends = zip(slots.first.tolist(), slots.last.tolist(), line.option.tolist(), strict=True)
        stages = tuple(Stage(first, last, options[o]) for first, last, o in ends)
        fill = float(line.cost_s.sum())
        return ChainAnswer(fill, float(line.extra_s.max()), float(line.post_s.max()), fill, stages)

    def rehearse(self) -> None:
        """Use everything once that an answer may need."""
        self._crews.rehearse()
        columns, _, _ = self._excluded(self._prices.relaxed(StageLimits()), Kept(np.inf, np.inf, 1.0))
        self._use(self._prices.exact(columns)[0])
        if self.best(np.inf, np.inf, 1.0, np.inf) is None:
            raise AssertionError("the example has a plan")

    def _prices_of_devices(self) -> Prices:
        """The prices of the bound; any will do."""
        if self._relaxation is not None:
            return self._relaxation.prices
        if self._crews.known is not None:
            return self._crews.known
        counts = np.array(self._cell_counts, dtype=np.float64)
        weights = np.where(counts > 0, self._weights, 0.0)
        nu = weights / max(float(counts @ weights), 1e-300)
        even = np.where(counts > 0, 1 / counts.sum(), 0.0)
        return Prices(nu, even, np.zeros(len(counts)))

    @property
    def _usable(self) -> BoolArray:
        """[state, team]: whether the devices suffice for a team; the same for all settings."""
        rows = self._rows
        if rows.usable is None:
            rows.usable = np.stack(
                [np.logical_and.reduce(team <= self._states, axis=1) for team in self._teams], axis=1
            )
        return rows.usable

    def _label_states(self, prices: Prices) -> LabelStates:
        devices = self._states[:, : len(self._cell_counts)].astype(np.float64)
        return LabelStates(
            order=self._order(),
            replicas=self._replicas,
            usable=self._usable,
            rest=self._teams @ self._strides,
            share=devices @ prices.nu,
            post_share=devices @ prices.rho,
            due=devices @ prices.use,
            paid=float(np.array(self._cell_counts, dtype=np.float64) @ prices.use),
        )
