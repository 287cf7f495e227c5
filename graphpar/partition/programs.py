"""The tasks of a search: one chain programme per schedule and microbatch count."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from graphpar.partition.bounds import (
    WorkBound,
    chain_bound_s,
    least_bytes,
    least_post_s,
    sample_bound,
    work_bound,
)
from graphpar.partition.cells import Links, StageOption, pareto
from graphpar.partition.chains import warm as chain_warm
from graphpar.partition.chains.columns import StagePrices
from graphpar.partition.chains.crews import KnownPrices, Shared
from graphpar.partition.chains.limits import ChainProgram
from graphpar.partition.chains.swept import SweptProgram
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.common_cuts import Windows
from graphpar.partition.counting.columns import Span
from graphpar.partition.counting.programme import CountingLimits, CountingProgram
from graphpar.partition.counting.search import search_counted
from graphpar.partition.family import Family
from graphpar.partition.jit import COMPILED
from graphpar.partition.memory_bound import held_bound_s, held_bytes, room_bytes
from graphpar.partition.memory_fit import MemoryFit
from graphpar.partition.option_rows import OptionRows
from graphpar.partition.pipeline_search import search
from graphpar.partition.repeats import Repeats
from graphpar.partition.search import INFINITY, Aim, Asked, ChainSolver, Found, SearchResult, Task
from graphpar.partition.stage_costs import slowest_transfer_s
from graphpar.partition.task_search import search_tasks
from graphpar.partition.types import ScheduleName
from graphpar.partition.unit_arrays import (
    MEMORY_TOLERANCE,
    BoolArray,
    Cache,
    FloatArray,
    IntArray,
    Ranges,
    Setting,
    memory_never_binds,
    run_ranges,
)

Way = tuple[ScheduleName, int]
"""A schedule and a number of microbatches."""


class Programs:
    """Builds chain programmes of a family and keeps those that were built.

    Large ones raise OutOfTimeError once `time.monotonic()` has passed `deadline_s`.
    """

    def __init__(self, family: Family, limits: CountingLimits, deadline_s: float = float("inf")) -> None:
        self.family = family
        self._deadline_s = deadline_s
        self._limits = limits
        self._bounds: dict[float, WorkBound] = {}
        self._replica_takes: dict[tuple[tuple[int, ...], int], FloatArray] = {}
        self._per_sample = sample_bound(family.table)
        self._sample_work: dict[tuple[int, ...], tuple[float, FloatArray]] = {}
        self._least_posts: dict[object, float] = {}
        self._least_bytes = least_bytes(family.table)
        self._ranges = run_ranges(family.table.num_units)
        self._among: tuple[Programs, IntArray] | None = None
        """Programmes of all runs, and which of these there are here."""
        self._summed: tuple[Programs, FloatArray] | None = None
        """Programmes without what is known of sums, and that."""
        self._allowed: BoolArray | None = None
        """Runs of units that a stage may have, where not all."""
        self._rows: dict[object, OptionRows] = {}
        self._fits: dict[tuple[tuple[int, ...], int], MemoryFit] = {}
        self._cache: Cache = {}
        self._least_times: dict[object, tuple[float, float, float]] = {}
        self._rough_times: dict[object, tuple[float, float, float]] = {}
        self._known_prices: KnownPrices = {}
        self._slowest_s: dict[float, float] = {}
        self._never_binds: dict[tuple[tuple[int, ...], int, int], bool] = {}
        self._whole_cache: Cache = {}
        self._excluded: Shared = {}
        self._team_of = self._per_sample.teams.of_mode.tolist()
        steps = self._most_steps()
        many = family.repeats is None and chain_warm.loops_pay(deadline_s, steps)
        self.loops = many and chain_warm.loops_are_ready(deadline_s, steps)
        counted = family.repeats is not None and not COMPILED
        slowed = counted or (many and not self.loops)
        self.slowed = chain_warm.why_without_loops() if slowed else ""
        """Why the search takes array operations where loops would pay; empty where it does not."""
        self._built: dict[tuple[tuple[int, ...], Setting, Span], ChainSolver] = {}
        self.unsolved = False
        """Whether a search left something out that the solver had no answer for."""

    def with_repeats(self, repeats: Repeats) -> "Programs":
        """The same with several blocks as one; bounds that know nothing of blocks are shared."""
        other = copy(self)
        other.family = replace(self.family, repeats=repeats)
        other._built, other._cache = {}, {}
        return other

    def with_cuts(self, cuts: Sequence[int]) -> "Programs":
        """The same for pipelines that are cut at some units only; devices' prices are shared."""
        ends, runs = (0, *cuts, self.family.table.num_units), self._ranges
        index = np.flatnonzero(np.isin(runs.first, ends) & np.isin(runs.last, ends))
        other = copy(self)
        other._ranges = Ranges(runs.first[index], runs.last[index], runs.valid[index])
        other._among = self, index
        other._built, other._cache, other._rows, other._excluded, other._fits = {}, {}, {}, {}, {}
        return other

    def cut_within(self, windows: Windows, sums_s: FloatArray | None = None) -> "Programs":
        """The same for pipelines that are cut at least once within each of some windows; needs loops.

        `sums_s` is what sums take, where it is known (`OptionRows.summed_by`).
        """
        runs, other = self._ranges, copy(self)
        other._allowed = np.ones(len(runs.first), dtype=np.bool_)
        for low, high in windows:
            other._allowed &= (runs.first >= low) | (runs.last <= high)
        other._built, other._excluded = {}, {}
        if sums_s is not None:
            other._summed, other._rows = (self, sums_s), {}
        return other

    def tasks(
        self,
        limits: Sequence[int],
        samples: int,
        schedules: Sequence[ScheduleName],
        peers: int = 1,
        across: tuple[Links, ...] = (),
    ) -> list[Task]:
        """Every schedule and microbatch count for a pipeline on some devices."""
        whole = tuple(limits)
        tasks = [
            self._task(whole, Setting(samples, m, schedule, peers, across))
            for schedule in schedules
            for m in self.family.counts(samples)
        ]
        return [t for t in tasks if len(schedules) == 1 or not self._outdone(whole, t)]

    def least_step_s(
        self, limits: Sequence[int], samples: int, peers: int, across: tuple[Links, ...]
    ) -> float:
        """A lower bound on the step of a pipeline on some devices: the least bound of its tasks.

        Schedules do not matter to it, and numbers of microbatches are looked at more closely as long as
        that may matter.
        """
        whole, least = tuple(limits), INFINITY
        counts = self.family.counts(samples)
        settings = [Setting(samples, m, self.family.schedules[0], peers, across) for m in counts]
        rough = [(self._rough(whole, setting)[0], i) for i, setting in enumerate(settings)]
        for bound_s, index in sorted(rough):
            if bound_s >= least:
                break
            least = min(least, self._least(whole, settings[index])[0])
        return least + self.least_post_s(limits, peers, across)

    def search(
        self,
        tasks: Sequence[Task],
        *,
        cutoff_s: float,
        gap: float,
        deadline_s: float,
        post_limit_s: float = INFINITY,
        count_post: bool = True,
        dive: bool = False,
        aim: Aim = "both",
        real_s: Callable[[Found], float] | None = None,
        near: Found | None = None,
    ) -> SearchResult:
        """The best pipeline over some tasks, by whichever search suits the family's programmes."""
        asked = Asked(cutoff_s, gap, deadline_s, post_limit_s, count_post, aim, real_s, near)
        if self.family.repeats is not None:
            result = search_counted(tasks, asked, self._together)
        else:
            find = search_tasks if self.loops else search
            result = find(tasks, asked, dive=dive)
        self.unsolved |= result.unsolved
        return result

    def _outdone(self, limits: tuple[int, ...], task: Task) -> bool:
        """Whether GPipe is at least as good as 1F1B for every plan of a 1F1B task.

        1F1B waits for transfers where GPipe overlaps them. GPipe is no worse where memory never binds
        and the slowest boundary cannot be what takes longest.
        """
        setting = task.setting
        if setting.schedule != "1f1b":
            return False
        cells = self.family.cells
        table = self.family.table
        if setting.size not in self._slowest_s:
            links = pareto([k for row in cells.links for k in row if k is not None])
            self._slowest_s[setting.size] = slowest_transfer_s(table, setting, links)
        if (setting.microbatches - 1) * self._slowest_s[setting.size] > task.extra_s:
            return False
        used = tuple(c.device_class for c, n in zip(cells.cells, limits, strict=True) if n)
        key = (used, setting.samples, setting.microbatches)
        if key not in self._never_binds:
            self._never_binds[key] = memory_never_binds(table, setting, used, self._whole_cache)
        return self._never_binds[key]

    def _most_steps(self) -> int:
        """Columns of the largest programme times its states; two kinds of links count as one."""
        cells = self.family.cells
        states = math.prod(n + 1 for n in cells.counts)
        links = {link for row in cells.links for link in row if link is not None}
        # A column stands between any two of them; array operations list them all.
        more = max(1, len(links) - 1) ** 2
        return len(self.family.options) * len(self._ranges.first) * states * more

    @property
    def number(self) -> int:
        """Programmes built."""
        return len(self._built)

    @property
    def largest(self) -> int:
        """Variables of the largest programme built."""
        return max((p.num_variables for p in self._built.values()), default=0)

    def may_hold(self, limits: Sequence[int]) -> bool:
        """Whether some devices have the memory for one copy of all units; True does not promise it."""
        classes = self.family.table.device_classes
        reserved = self.family.table.reserved_bytes
        numbers = self.family.classes(limits)
        room = sum(n * max(0.0, c.memory_bytes - reserved) for n, c in zip(numbers, classes, strict=True))
        return self._least_bytes <= room * (1 + MEMORY_TOLERANCE)

    def memory_fit(self, limits: Sequence[int], width: int) -> MemoryFit:
        """What fits into the memory of some devices with so many replicas at most; counts no stages."""
        key = tuple(limits), width
        if key not in self._fits:
            options = self.family.within(*key)
            self._fits[key] = MemoryFit(self.family, key[0], options, self._ranges, self._cache)
        return self._fits[key]

    def work_per_sample_s(self, limits: Sequence[int]) -> float:
        """A lower bound on the time some devices need per sample at any microbatch size."""
        return self._work(limits)[0]

    def _work(self, limits: Sequence[int]) -> tuple[float, FloatArray]:
        """That bound and its prices on the time of each class."""
        key = tuple(limits)
        if key not in self._sample_work:
            self._sample_work[key] = self._per_sample.prices(self.family.classes(limits))
        return self._sample_work[key]

    def least_post_s(
        self, limits: Sequence[int], peers: int = 1, across: tuple[Links, ...] = ()
    ) -> float:
        """A lower bound on the largest post of a pipeline on some devices."""
        key = (tuple(limits), peers, across)
        if key not in self._least_posts:
            classes = self.family.classes(limits)
            self._least_posts[key] = least_post_s(self.family.table, classes, peers, across)
        return self._least_posts[key]

    @cached_property
    def larger_need_more(self) -> bool:
        """Whether larger microbatches take no less time and no less memory in any mode."""
        rows = {
            row
            for mode in self.family.table.every_mode
            for cost in mode.costs
            for row in (*cost.saved_bytes, *cost.working_bytes)
        }
        longer = (np.diff(self.family.table.both_s, axis=0) >= 0).all()
        return bool(longer) and all(a <= b for row in rows for a, b in pairwise(row))

    def way_from(
        self,
        limits: Sequence[int],
        shares: Sequence[int],
        peers: int,
        across: tuple[Links, ...],
        *,
        cutoff_s: float,
        deadline_s: float,
        excluded: set[Way],
        ways: Sequence[Way] | None = None,
    ) -> Way | None:
        """A way, if any, in which a pipeline may have one of some shares in a step below a cutoff.

        Shares increase. Each schedule and microbatch count that some share has is looked at once, with as
        few samples as may be (`SweptProgram.none_from`). Ways that are excluded, as they are for larger
        shares as well, join those that were.

        Raises:
            OutOfTimeError: `time.monotonic()` passed `deadline_s`.
        """
        counts = sorted({m for n in shares for m in self.family.counts(n)})
        every = [(s, m) for s in self.family.schedules for m in counts]
        some = [w for w in every if w not in excluded and (ways is None or w in ways)]
        if not (self.loops and self.larger_need_more):
            return next(iter(some), None)
        settings = [Setting(max(shares[0], m), m, schedule, peers, across) for schedule, m in some]
        tasks = [self._task(tuple(limits), setting) for setting in settings]
        for task, way in sorted(zip(tasks, some, strict=True), key=lambda pair: pair[0].bound_s):
            if time.monotonic() > deadline_s:
                raise OutOfTimeError
            if task.bound_s + task.post_s < cutoff_s:
                program = task.build()
                assert isinstance(program, SweptProgram)
                if not program.none_from(cutoff_s, deadline_s):
                    return way
            excluded.add(way)
        return None

    def pipeline_bound_s(self, limits: Sequence[int], samples: int, peers: int) -> float:
        """A lower bound on the time of a pipeline on some devices, whatever its microbatches are."""
        table, fixed = self.family.table, self.family.microbatches
        most = min(samples, table.max_microbatches)
        counts = range(1, most + 1) if fixed == "auto" else [min(fixed, most)]
        settings = [Setting(samples, m, self.family.schedules[0], peers) for m in counts]
        whole, numbers = tuple(limits), self.family.classes(limits)
        room, least = room_bytes(table, numbers), INFINITY
        bounded = [(self._task(whole, setting).bound_s, i, setting) for i, setting in enumerate(settings)]
        for bound_s, _, setting in sorted(bounded):
            if bound_s >= least:
                break
            if time.monotonic() > self._deadline_s:
                # The others' are no less.
                least = bound_s
                break
            held, takes = held_bytes(table, setting.size), self._takes(whole, setting)
            work = self._bounds[setting.size]
            more_s = held_bound_s(work, held, room, numbers, takes, setting.microbatches)
            least = min(least, max(bound_s, more_s))
        return least

    def _task(self, limits: tuple[int, ...], setting: Setting) -> Task:
        """Every device r has `m_r t_r <= t_r + extra`.

        Weighted with the prices of the work bound and summed over devices this gives
        `extra >= (m - w) * work` where no stage has more than w replicas.
        """
        bound_s, fill_s, extra_s = self._least(limits, setting)
        return Task(
            setting=setting,
            bound_s=bound_s,
            fill_s=fill_s,
            extra_s=extra_s,
            post_s=self.least_post_s(limits, setting.peers, setting.across),
            build=self._builder(limits, setting),
            limits=limits,
        )

    def _least(self, limits: tuple[int, ...], setting: Setting) -> tuple[float, float, float]:
        """Lower bounds on the time, the fill and the extra of a setting, whatever its schedule."""
        key = (limits, setting.size, setting.microbatches, setting.peers)
        if key not in self._least_times:
            bound_s, fastest, extra = self._rough(limits, setting)
            counts, takes = self.family.classes(limits), self._takes(limits, setting)
            # One device has no choice: there the work bound says it all.
            if sum(counts) > 1:
                bound = self._bounds[setting.size]
                bound_s = max(bound_s, chain_bound_s(bound, counts, takes, setting.microbatches))
            self._least_times[key] = bound_s, fastest, extra
        return self._least_times[key]

    def _rough(self, limits: tuple[int, ...], setting: Setting) -> tuple[float, float, float]:
        """The same by the work of the devices alone."""
        key = (limits, setting.size, setting.microbatches, setting.peers)
        if key not in self._rough_times:
            bound = self._bounds.get(setting.size)
            if bound is None:
                bound = self._bounds[setting.size] = work_bound(self.family.table, setting.size)
            counts, number = self.family.classes(limits), setting.microbatches
            work, fastest = bound.seconds(counts, self._work(limits)[1]), bound.fastest_pass_s(counts)
            extra = max(0.0, number - float(self._takes(limits, setting).sum(axis=1).max())) * work
            self._rough_times[key] = max(work * number, fastest + extra), fastest, extra
        return self._rough_times[key]

    def _takes(self, limits: tuple[int, ...], setting: Setting) -> FloatArray:
        """[option, team]: replicas of each team in the options for a pipeline; unlike rows only."""
        width = self.family.table.max_replicas // setting.peers
        key = (limits, width)
        if key not in self._replica_takes:
            options = self.family.within(limits, width)
            number = len(self._per_sample.teams.members)
            rows = {tuple(Counter(self._team_of[m] for m in o.staff).items()) for o in options}
            takes = np.zeros((len(rows), number))
            for index, row in enumerate(sorted(rows)):
                for team, replicas in row:
                    takes[index, team] = replicas
            self._replica_takes[key] = takes
        return self._replica_takes[key]

    def _together(self, tasks: Sequence[Task]) -> Task | None:
        """A task whose relaxations bound those of several, which differ in microbatches and schedule.

        None where that cannot be promised.
        """
        if not (self.family.table.training and self.larger_need_more):
            return None
        span = tuple(sorted({t.setting.microbatches for t in tasks}))
        setting = replace(tasks[0].setting, microbatches=span[-1], schedule="1f1b")
        return Task(
            setting=setting,
            bound_s=min(t.bound_s for t in tasks),
            fill_s=min(t.fill_s for t in tasks),
            extra_s=min(t.extra_s for t in tasks),
            post_s=min(t.post_s for t in tasks),
            build=self._builder(tasks[0].limits, setting, span),
            limits=tasks[0].limits,
        )

    def _builder(
        self, limits: tuple[int, ...], setting: Setting, span: Span = ()
    ) -> Callable[[], ChainSolver]:
        def build() -> ChainSolver:
            key = (limits, setting, span)
            if key not in self._built:
                family = self.family
                width = family.table.max_replicas // setting.peers
                options = family.within(limits, width)
                self._built[key] = self._program(limits, setting, options, span)
            return self._built[key]

        return build

    def _program(
        self, limits: tuple[int, ...], setting: Setting, options: Sequence[StageOption], span: Span
    ) -> ChainSolver:
        family = self.family
        if family.repeats is not None:
            return CountingProgram(
                family.table,
                family.cells,
                options,
                setting,
                family.repeats,
                self._limits,
                limits,
                self._cache,
                lambda: time.monotonic() > self._deadline_s,
                span,
            )
        rows = self._rows_of(limits, setting, options)
        prices = StagePrices(
            family.table,
            rows,
            setting,
            self._ranges,
            self._cache,
            loops=self.loops,
            allowed=self._allowed,
        )
        make = SweptProgram if self.loops else ChainProgram
        return make(
            prices,
            limits,
            family.table.num_units,
            self._cell_weights(),
            self._known_prices,
            self._excluded,
        )

    def _rows_of(
        self, limits: tuple[int, ...], setting: Setting, options: Sequence[StageOption]
    ) -> OptionRows:
        key = (limits, setting.peers, setting.across)
        if key not in self._rows and self._among is not None:
            whole, index = self._among
            self._rows[key] = whole._rows_of(limits, setting, options).among(self._ranges, index)
        elif key not in self._rows and self._summed is not None:
            plain, sums_s = self._summed
            rows = plain._rows_of(limits, setting, options)
            self._rows[key] = rows.summed_by(self.family.table, setting, sums_s, self._cache)
        elif key not in self._rows:
            self._rows[key] = OptionRows(
                self.family.table, self.family.cells, options, setting, self._ranges, self._cache
            )
        return self._rows[key]

    def _cell_weights(self) -> FloatArray:
        """What a device of each cell is worth: chains of units per second."""
        classes = [c.device_class for c in self.family.cells.cells]
        whole = (self._per_sample.repeats @ self._per_sample.times_s)[classes]
        found: FloatArray = 1 / np.maximum(whole, 1e-30)
        return found
