"""Decide who runs what: the pipelines with the least step time under a cost table, with a proof.

The price of a plan is written down in `pipeline_price`. What is searched is in `family`, and the
words of `Partition.family` repeat it. One pipeline: `pipeline_search` over the limits on extra and post,
each answered by the dynamic programme of `chains.limits`. Several pipelines side by side: `side_by_side`.
`check` recomputes every answer with code of its own before it leaves this file.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.partition.all_devices import few_devices, simple_until_s, with_all_devices, without_search
from graphpar.partition.assign import groups_hold, name_devices
from graphpar.partition.candidate import Candidate, best_candidate, prefer_1f1b
from graphpar.partition.certificate import BEYOND, certificate, family_note
from graphpar.partition.check import check_partition
from graphpar.partition.counting.programme import CountingLimits
from graphpar.partition.cuts import cut_roughly
from graphpar.partition.family import EVERY_GROUPING, Family, Grouping, choose_family, groupings
from graphpar.partition.fewer_devices import TooManyUnitsError
from graphpar.partition.handmade import Tried, priced_plan, simple_plans
from graphpar.partition.infeasible import EXPLAIN_S, explain_infeasible, held_by_memory, one_may_fit
from graphpar.partition.nearer import brought_nearer, links_differ, most_s
from graphpar.partition.partition_words import family_words, idle_note, table_notes
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.pipeline_price import price
from graphpar.partition.programs import Programs
from graphpar.partition.regular import regular_plans
from graphpar.partition.search import INFINITY, Aim, Found, SearchResult
from graphpar.partition.settings import EVERY_LEVEL, Microbatches, ScheduleChoice
from graphpar.partition.share_bounds import (
    ShareBounds,
    grouping_bound_s,
    pipelines_bound_s,
    sharing_bound_s,
)
from graphpar.partition.side_by_side import best_shares, estimate_shares
from graphpar.partition.solver import Backend
from graphpar.partition.table_check import check_arguments
from graphpar.partition.types import ROUNDING, Partition, PipelineChoice, ScheduleName

RUNNERS_UP = 3
"""Plans that lost are kept up to this number."""

RELAXED_SHARE = 0.9
"""Share of the asked-for gap that a search with relaxed links may use up."""

_ESTIMATE_SHARE = 0.5
"""Time for trying pipelines side by side on a large cluster, as a share of that for one pipeline."""

_SHARING_SHARE = 0.7
"""Time for a bound on pipelines side by side, as a share of what is left."""

_LEAST_PATIENCE_S = 1.0
_PATIENCE_SHARE = 0.04
"""An integer programme without an answer is divided after this share of all time, or this long."""

_FINISH_SHARE = 0.06
_MOST_FINISH_S = 2.0
"""Share of the time that a search leaves for pricing simple plans and the answer, or this long."""

_LATEST, _LEAST_EXPLAIN_S = 1.1, 0.2
"""Why none was found, and what would fit, is looked for until so many times the limit, or for so long."""

_REGULAR_SHARE = 0.4
"""Share of the time in which the best regular plan is looked for; then any is taken."""

_EARLIER = 6
"""So many pipelines that were the best for a time are priced on real links."""

_COARSE_BLOCKS = 64
"""With twice as many blocks or more a first plan is looked for with that many, of several each, ..."""

_COARSE_SHARE = 0.5
"""... for this share of the time at most."""


def partition(
    table: CostTable,
    *,
    gap: float = 0.01,
    time_limit_s: float = 60.0,
    schedule: ScheduleChoice = "auto",
    microbatches: Microbatches = "auto",
    backend: Backend = "highs",
    incumbent: tuple[tuple[PipelineChoice, ...], ScheduleName] | None = None,
    explain_s: float = EXPLAIN_S,
    zero_levels: Sequence[int] = EVERY_LEVEL,
    compare_simple: bool = True,
) -> Partition:
    """The plan with the least step time, with a proven bound.

    Args:
        table: Seconds and bytes of everything.
        gap: Stop once the plan is proven within this fraction of its family's best; 0 for the best.
        time_limit_s: Wall-clock seconds after which the best plan so far is returned, with its gap.
        schedule: `1f1b`, `gpipe`, or `auto` for the better of the two.
        microbatches: A fixed number of microbatches per pipeline, or `auto`.
        backend: The solver of integer programmes, where the search needs one.
        incumbent: A plan known before, which fits: only faster ones are looked for.
        explain_s: Seconds to look for what would fit where nothing does, if the limit leaves them.
        zero_levels: The ZeRO levels that may be proposed then.
        compare_simple: Whether plans of `handmade` are tried (over many devices if the search was cut).

    Raises:
        ValueError: An argument or the table makes no sense.
        InfeasibleError: No plan fits; says what binds and the smallest change that fits.
    """
    began_s = time.monotonic()
    check_arguments(table, gap, time_limit_s, schedule, microbatches)
    physical_s = physical_bound_s(table)
    tried = Tried(schedule, microbatches, began_s + time_limit_s)
    try:
        family = choose_family(table, schedule, microbatches)
    except TooManyUnitsError as told:
        return without_search(table, str(told), incumbent, tried, physical_s, began_s)
    run = _Run(family, CountingLimits(gap, backend), began_s, began_s + time_limit_s, physical_s)
    if incumbent is not None and not family.partial:
        run.start_from(*incumbent)
    run.work()
    run.bring_nearer()
    run.own_up()
    if compare_simple or run.best is None:
        run.compare(schedule, microbatches)
    answer = run.answer() if run.best is not None else None
    if family.partial:
        simple = tried if compare_simple or answer is None else None
        answer = with_all_devices(table, answer, family.staffing, incumbent, simple, physical_s, began_s)
    if answer is None:
        left_s = max(_LEAST_EXPLAIN_S, began_s + _LATEST * time_limit_s - time.monotonic())
        explain_infeasible(table, family, run.truncated, min(explain_s, left_s), zero_levels)
    check_partition(table, answer)
    return answer


class _Run:
    """The state of one search: the best plan so far, the bound, and what cut it short."""

    def __init__(
        self, family: Family, limits: CountingLimits, began_s: float, deadline_s: float, physical_s: float
    ) -> None:
        self.family = family
        self.best: Candidate | None = None
        self.truncated: list[str] = []
        self._seen: list[Candidate] = []
        self.groupings_searched = 0
        self.groupings_tried = 0
        self._table = family.table
        self._asked_gap = limits.gap
        # Where links are relaxed the real price may be higher: leave room for that within the gap.
        by_name = family.exact or family.repeats is not None
        self._gap = limits.gap * (1 - ROUNDING if by_name else RELAXED_SHARE)
        self._began_s = began_s
        # The answer must be priced and checked in time as well.
        self._final_s = deadline_s
        self._deadline_s = deadline_s - min(_FINISH_SHARE * (deadline_s - began_s), _MOST_FINISH_S)
        self._near = False
        self._coarse: Found | None = None
        self._fits: Found | None = None
        """A pipeline that fits into memory, whatever it takes."""
        patience_s = max(_LEAST_PATIENCE_S, _PATIENCE_SHARE * (deadline_s - began_s))
        self._limits = replace(limits, patience_s=patience_s)
        self._programs = Programs(family, self._limits, self._deadline_s)
        self._shares = ShareBounds(self._programs)
        self._bound_s = INFINITY
        self._physical_s = physical_s  # over devices that are not searched as well
        self._least_s = physical_bound_s(family.table) if family.partial else physical_s

    @property
    def step_s(self) -> float:
        """Step time of the best plan so far."""
        return self.best.step_s if self.best is not None else INFINITY

    @property
    def _target_s(self) -> float:
        """Only plans with a shorter step are of interest."""
        return self.step_s * (1 - self._gap)

    def start_from(self, pipelines: tuple[PipelineChoice, ...], schedule: ScheduleName) -> None:
        """Take a plan known before as the best so far."""
        step_s = price(self._table, pipelines, schedule).objective_s
        self.best = Candidate(pipelines, schedule, step_s)
        self._seen.append(self.best)

    def work(self) -> None:
        """Cheap programmes first: a good plan early makes the proof short."""
        if self.family.repeats is not None:
            self.counted()
            return
        may_fit, self._fits = held_by_memory(self._programs)
        if not may_fit:
            return
        bounded = [(grouping_bound_s(self._programs, g), g) for g in groupings(self.family)]
        alone = [(bound, g) for bound, g in bounded if all(sum(p) == 1 for p in g)]
        others = [(bound, g) for bound, g in bounded if any(sum(p) > 1 for p in g)]
        self.first()
        self.side_by_side(alone)
        if sum(self.family.cells.counts) > EVERY_GROUPING:
            # There one pipeline may take all the time there is.
            others = list(self._sharper(others))
        self.single()
        self.side_by_side(others)

    def own_up(self) -> None:
        """Name what the solver gave up on, unless what was asked is proven all the same."""
        open_s = self.step_s - max(self._bound_s, self._least_s)
        if self._programs.unsolved and (self.best is None or open_s > self._asked_gap * self.step_s):
            self._cut("integer programmes: some had no answer after their share of the time")

    def counted(self) -> None:
        """A large cluster: one pipeline, with proof; then unlike ones side by side as time allows."""
        self.regular()
        self.coarse()
        self.single()
        self.kinds_side_by_side()

    def regular(self) -> None:
        """Take the best regular plan: whatever else is found, an answer is there."""
        left_s = self._deadline_s - (now := time.monotonic())
        until_s = now + _REGULAR_SHARE * left_s if left_s > 0 else INFINITY
        for found in regular_plans(self.family, lambda: time.monotonic() > until_s):
            # The estimate orders plans; naming devices decides whether groups are joined as priced.
            if self._real_s(found) < INFINITY:
                return

    def coarse(self) -> None:
        """Many blocks: look for a plan whose stages have several at once, which are far fewer columns."""
        repeats = self.family.repeats.coarser(_COARSE_BLOCKS) if self.family.repeats else None
        if repeats is None:
            return
        programs = self._programs.with_repeats(repeats)
        result = programs.search(
            programs.tasks(self.family.cells.counts, self._table.batch, self.family.schedules),
            cutoff_s=self._target_s,
            gap=self._gap,
            deadline_s=(1 - _COARSE_SHARE) * time.monotonic() + _COARSE_SHARE * self._deadline_s,
            aim="plan",
            real_s=self._real_s,
        )
        self._near, self._coarse = result.best is not None, result.best

    def kinds_side_by_side(self) -> None:
        """Try unlike kinds in pipelines side by side: by estimate first, and where that helps in full.

        A grouping that gave a better plan widens the family; others were only tried and stay outside.
        """
        if self.truncated:
            return
        if self.best is None:
            self.only_together()
            return
        alone = self.best.pipelines[0]
        size = alone.samples / alone.microbatches
        now = time.monotonic()
        until_s = min(self._deadline_s, now + max(2.0, _ESTIMATE_SHARE * (now - self._began_s)))
        bounded = sorted((grouping_bound_s(self._programs, g), g) for g in groupings(self.family))
        promising = [(bound, g) for bound, g in bounded if bound < self._target_s]
        self.groupings_searched = len(bounded) - len(promising)
        better: list[tuple[float, Grouping, tuple[Found, ...]]] = []
        for bound, groups in promising:
            if time.monotonic() > until_s:
                break
            schedule = self.best.schedule
            found = estimate_shares(
                self._programs, groups, schedule, size, cutoff_s=self.step_s, deadline_s=until_s
            )
            self.groupings_tried += 1
            before_s = self.step_s
            if found is not None and self._offer(found) < before_s:
                better.append((bound, groups, found))
        self._search_groupings(better)

    def only_together(self) -> None:
        """Where no pipeline fits alone, several may, each with part of the samples: the first way."""
        for groups in groupings(self.family):
            self.groupings_searched += 1
            ended = [self._grouping(groups, schedule, 0.0) for schedule in self.family.schedules]
            if self.best is not None or not all(ended):
                return

    def _search_groupings(self, promising: list[tuple[float, Grouping, tuple[Found, ...]]]) -> None:
        """Bound the groupings that gave better plans, and search them to the end as time allows."""
        for work_s, groups, found in reversed(promising):
            left_s = self._deadline_s - time.monotonic()
            sharing_s = sharing_bound_s(
                self._programs,
                groups,
                [f.setting.samples for f in found],
                [f.step_s for f in found],
                cutoff_s=self._target_s,
                gap=self._gap,
                deadline_s=time.monotonic() + _SHARING_SHARE * left_s,
            )
            bound = max(work_s, sharing_s)
            self.groupings_searched += 1
            if bound >= self._target_s:
                self._bound_s = min(self._bound_s, bound)
                continue
            for schedule in self.family.schedules:
                if not self._grouping(groups, schedule, bound):
                    self._bound_s = min(self._bound_s, bound)
                    return

    def first(self) -> None:
        """One good pipeline over the whole cluster, where that is quick."""
        if not self._programs.loops:
            return
        self._coarse = cut_roughly(self._table, self._cut_at)
        if self.best is None:
            self._take(self._pipeline("plan"))
        self._near = self.best is not None

    def _cut_at(self, cuts: Sequence[int], near: Found | None) -> Found | None:
        """The best pipeline cut at some units only that is better than what is known; of one setting."""
        programs = self._programs.with_cuts(cuts)
        if near is None and not one_may_fit(programs):
            return None
        tasks = programs.tasks(self.family.cells.counts, self._table.batch, self.family.schedules)
        result = programs.search(
            [t for t in tasks if near is None or t.setting == near.setting],
            cutoff_s=self._target_s,
            gap=self._gap,
            deadline_s=self._deadline_s,
            dive=near is None,
        )
        self._take(result)
        return result.best

    def _pipeline(self, aim: Aim) -> SearchResult:
        """The best pipeline over the whole cluster."""
        tasks = self._programs.tasks(self.family.cells.counts, self._table.batch, self.family.schedules)
        return self._programs.search(
            tasks,
            cutoff_s=self._target_s,
            gap=self._gap,
            deadline_s=self._deadline_s,
            dive=True,
            aim=aim,
            real_s=self._real_s if self.family.repeats is not None else None,
            near=self._coarse,
        )

    def single(self) -> None:
        """One pipeline over the whole cluster, with proof."""
        result = self._pipeline("proof" if self._near else "both")
        bound_s = result.bound_s
        if result.cut:
            self._cut("time limit: single pipeline")
            if self.family.repeats is None:
                bound_s = max(bound_s, pipelines_bound_s(self._programs, (self.family.cells.counts,)))
        self._bound_s = min(self._bound_s, bound_s)
        self._take(result)

    def _take(self, result: SearchResult) -> None:
        """Offer what a search for one pipeline found; searches of large clusters did so on the way."""
        if self.family.repeats is not None:
            return
        # On real links one that was thought to be worse may be better.
        for found in (*result.others[:RUNNERS_UP], *result.before[:_EARLIER]):
            self._offer((found,))
        if result.best is not None:
            self._offer((result.best,))

    def side_by_side(self, bounded: list[tuple[float, Grouping]]) -> None:
        """Every set of pipelines whose bound leaves hope, most promising first."""
        for bound, groups in sorted(self._sharper(bounded)):
            if bound >= self._target_s:
                self._bound_s = min(self._bound_s, bound)
                return
            for schedule in self.family.schedules:
                if not self._grouping(groups, schedule, bound):
                    return

    def _sharper(self, bounded: list[tuple[float, Grouping]]) -> Iterator[tuple[float, Grouping]]:
        """Better bounds where there is time and the first ones leave hope."""
        for bound, groups in bounded:
            hopeful = bound < self._target_s and time.monotonic() < self._deadline_s
            yield max(bound, pipelines_bound_s(self._programs, groups) if hopeful else 0.0), groups

    def _grouping(self, groups: Grouping, schedule: ScheduleName, bound_s: float) -> bool:
        result = best_shares(
            self._programs,
            groups,
            schedule,
            bounds=None if self.family.repeats else self._shares,
            cutoff_s=self.step_s,
            gap=self._gap,
            deadline_s=self._deadline_s,
            offer=self._offer,
        )
        self._bound_s = min(self._bound_s, max(result.bound_s, bound_s))
        if result.cut:
            self._cut("time limit: pipelines side by side")
        return not result.cut

    def _cut(self, reason: str) -> None:
        if reason not in self.truncated:
            self.truncated.append(reason)

    def _real_s(self, found: Found) -> float:
        """What a pipeline takes on real devices and links; infinite where its groups cannot stand."""
        return self._offer((found,))

    def _offer(self, found: Sequence[Found]) -> float:
        """Take a plan, on real devices and links; what it takes there, infinite if it cannot stand."""
        schedule = found[0].setting.schedule
        pipelines = name_devices(self._table, self.family.cells, found)
        if not groups_hold(self._table, pipelines):
            return INFINITY
        candidate = best_candidate(self._table, pipelines, schedule)
        self._seen.append(candidate)
        if candidate.step_s < self.step_s:
            self.best = candidate
        return candidate.step_s

    def bring_nearer(self) -> None:
        """Let devices of the best plan change places, where they were counted and links differ."""
        near = min(self._bound_s, self.step_s) >= self._target_s  # as near as was asked for
        if self.best is None or near or self.family.exact or not links_differ(self._table):
            return
        until_s = min(self._final_s, time.monotonic() + most_s(self._final_s - self._began_s))
        found = brought_nearer(self._table, self.best.pipelines, self.best.schedule, until_s)
        if found != self.best.pipelines:
            step_s = price(self._table, found, self.best.schedule).objective_s
            self.best = Candidate(found, self.best.schedule, step_s)
            self._seen.append(self.best)

    def runners_up(self) -> tuple[Partition, ...]:
        """The best plans that lost, as they were met; each priced like any plan made by hand."""
        seen: dict[object, Candidate] = {}
        for candidate in sorted(self._seen, key=lambda c: c.step_s):
            if self.best is not None and candidate.pipelines != self.best.pipelines:
                seen.setdefault((candidate.pipelines, candidate.schedule), candidate)
        chosen = list(seen.values())[:RUNNERS_UP]
        return tuple(priced_plan(self._table, c.pipelines, c.schedule, self._physical_s) for c in chosen)

    def compare(self, schedule: ScheduleChoice, microbatches: Microbatches) -> None:
        """No answer may be worse than simple plans, as within its gap or cut short it could be."""
        if self.best is None and self._fits is not None:
            self._real_s(self._fits)
        if not few_devices(self._table) and not self.truncated:
            # Pricing them for a large cluster takes as long as some searches.
            return
        if self.truncated and self.family.repeats is None:
            self.regular()
        until_s = simple_until_s(self._table, self._final_s, self.best is not None)
        tried = Tried(schedule, microbatches, until_s, self._physical_s, self.step_s)
        for made in simple_plans(self._table, tried):
            if made.objective_s < self.step_s:
                self.best = Candidate(made.pipelines, made.schedule, made.objective_s)

    def answer(self) -> Partition:
        """The best plan with its certificate."""
        assert self.best is not None
        self.best = prefer_1f1b(self._table, self.family.schedules, self.best)
        cost = price(self._table, self.best.pipelines, self.best.schedule)
        known = certificate(cost.objective_s, max(self._bound_s, self._least_s), self._physical_s)
        family, notes = family_words(self.family, self.groupings_searched), self._notes()
        if known.beyond:
            family = f"plans at hand; the search was over: {family}"
            notes = (*notes, family_note(self._bound_s))
            self._cut(BEYOND)
        if known.gap > self._asked_gap * (1 + ROUNDING) + ROUNDING and not self.truncated:
            left_out = ", and leaves out what pipelines in step exchange"
            words = "links: the bound takes the best link where placement decides"
            if self.family.exact:
                words = "sums: the bound takes the least that pipelines side by side may have to sum"
            self._cut(words + left_out * bool(self._table.in_step_reason))
        return Partition(
            pipelines=self.best.pipelines,
            schedule=self.best.schedule,
            status=known.status,
            objective_s=cost.objective_s,
            parts=cost.parts,
            bound_s=known.bound_s,
            gap=known.gap,
            physical_bound_s=min(self._physical_s, cost.objective_s),
            seconds=time.monotonic() - self._began_s,
            truncated_by=tuple(self.truncated),
            family=family,
            peak_bytes=cost.peak_bytes,
            notes=notes,
            runners_up=self.runners_up(),
            num_programs=self._programs.number,
            num_variables=self._programs.largest,
        )

    def _notes(self) -> tuple[str, ...]:
        assert self.best is not None
        notes = idle_note(self._table, self.best.pipelines)
        if self._programs.slowed:
            notes.append(f"the search took its slower form: {self._programs.slowed}")
        if self.groupings_tried:
            notes.append(
                f"pipelines of unlike kinds side by side: {self.groupings_tried} ways tried with shares "
                f"by estimate, {self.groupings_searched} searched or excluded by proof"
            )
        return (*notes, *table_notes(self._table))
