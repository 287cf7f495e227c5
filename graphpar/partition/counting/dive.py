"""How a search over counting programmes looks for lines, and for its first plan.

The first plan comes from a dive: the relaxation says with how much extra and post there may be a plan;
from there extra rises until one is found, and falls again. Stretches of kinds (`segments`) are
looked for first, which takes some hundredths of a second.
"""

import time
from collections.abc import Iterable
from dataclasses import replace

from graphpar.partition.counting.among import cheapest
from graphpar.partition.counting.beam import grow_lines
from graphpar.partition.counting.boxes import Box, within
from graphpar.partition.counting.floors import Floors, Least
from graphpar.partition.counting.judging import FEW_DEVICES, SearchJudging
from graphpar.partition.counting.lines import TOLERANCE
from graphpar.partition.counting.programme import CountingProgram
from graphpar.partition.counting.segments import grow_segments
from graphpar.partition.counting.together import Together
from graphpar.partition.jit import COMPILED
from graphpar.partition.search import INFINITY, Asked, Found, Task
from graphpar.partition.stage_costs import StageLimits

_BEAM = 60
"""Parts of lines kept at once."""

_AMONG_SPARE = 0.04
"""Columns with which a step is longer by this share than the relaxation says are not looked at there."""

_DIVE_FACTORS = (1.0, 1.01, 1.025, 1.05, 1.1, 1.18, 1.3, 1.5, 2.0, 3.0, 5.0)
"""Extra allowed at a dive, in multiples of what the relaxation needs."""

_SEGMENT_FACTORS = (1.02, 1.08, 1.16, 1.25, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0)
"""The same for good columns and stretches of kinds; what lies between is looked for afterwards, ..."""

_FEW_FACTORS = 5
"""... and so many of them where blocks are several each."""

_DIVE_SPARE = 0.02
"""At a dive lines may cost this share of extra more than the relaxation says."""

_REFINEMENTS = 5
"""How often a dive that succeeded is tried again with less extra."""

_FINE = 0.5
"""A dive ends where extra is known to within this share of the gap."""

_EXTRA_FALLS, _CLOSER = 0.6, (0.5, 0.25)
"""From one extra to the next in the search for that of the least relaxation, and powers of it at last."""

_POST_MATTERS = 0.01
"""Post is limited at a dive where the relaxation spreads more than this share of the step over stages."""

_POST_FALLS, _POSTS, _WAYS = 0.5, 12, 3
"""From one limit on post to the next, how many are tried, and how many are dived into."""

_NO_BETTER = 1.25
"""No lower limit on post is tried where the relaxation costs so many times the least."""

_SEGMENT_SPARE, _SEGMENT_SPARE_FILL = 0.05, 2.0
"""Stretches of kinds may cost this share of extra, or of the fill, more than the relaxation says."""

_DIVE_SHARE, _SHORT_SHARE = 0.35, 0.25
"""Share of the time left that a dive may take, and where there is a good plan already."""

_PLAN_SHARE = 0.8
"""The same where a plan is all that is wanted."""

_WAYS_SHARE = 0.15
"""Share of the time left after which no further limit on post is tried."""

_SOUGHT_FIRST = (0.5, 0.75, 0.25)
"""Better pipelines than the first one are looked for at these shares of the way to its extra, ..."""

_SOUGHT = (0.875, 0.5, 0.75, 0.25, 0.625, 0.375, 0.125)
"""... and later at these of the way from the extra of a box without one to that of the best."""

_LESS_EXTRA, _MORE_POST = 0.85, 1.5
"""A known pipeline is improved with as much extra and less, down to this share, and so much more post."""


class SearchDiving(SearchJudging):
    """A search that finds its first plan by diving."""

    def __init__(self, tasks: Iterable[Task], asked: Asked, together: Together) -> None:
        super().__init__(tasks, asked, together)
        self._dived: set[int] = set()
        self._sought: tuple[Found | None, int] = None, 0

    def _shrink(self, program: CountingProgram, box: Box) -> Box | None:
        """The box without what its extra or post excludes, on values that some column attains."""
        least_fill = self._tasks[box.task].fill_s
        room = self._target() - least_fill
        high = min(box.extra[1], room - self._weight * box.post[0])
        extra = within(program.extras_s, box.extra[0], high)
        post = within(program.posts_s, box.post[0], box.post[1])
        if extra is None or post is None:
            return None
        return replace(box, extra=extra, post=post)

    # --- the first plan ---

    @property
    def _needs_plan(self) -> bool:
        return self.best is None and self._aim != "proof"

    def _start(self) -> None:
        """Dive into the task that promises most before all others are even built."""
        if not self._heap or self._heap[0][0] >= self._target():
            return
        if self._known is not None:
            self._improve(self._known)
        if not self._needs_plan:
            return
        box = self._promising()
        program = self._program(box.task)
        shrunk = self._shrink(program, box)
        if shrunk is not None:
            self._dive(program, shrunk)

    def _improve(self, known: Found) -> None:
        """Look for better pipelines with no more extra than a known one has."""
        box = next((b for _, _, b in self._heap if self._tasks[b.task].setting == known.setting), None)
        if box is None:
            return
        program = self._program(box.task)
        until_s = time.monotonic() + _SHORT_SHARE * (self._deadline_s - time.monotonic())
        extra_s, post_s = known.answer.extra_s, known.answer.post_s
        # More post than that would have to be paid for.
        near = replace(box, post=(box.post[0], min(box.post[1], _MORE_POST * post_s)))
        self._try_segments(program, near, extra_s)
        self._bisect(program, near, _LESS_EXTRA * extra_s, until_s)

    def _seek_again(self, low_s: float) -> None:
        """Look once more for a better pipeline than the best, with more extra than where none was found.

        Boxes with the least bound are looked at first. Where nothing raises that, all the time there is
        may go to boxes without a pipeline, while there are better ones in others.
        """
        best, number = self.best or self._known, self._sought[1]
        if best is not self._sought[0]:
            number = 0
        self._sought = best, number + 1
        if number < len(_SOUGHT):
            self._seek(low_s, _SOUGHT[number])

    def _seek_first(self, low_s: float, until_s: float) -> None:
        """Look a few times for a better pipeline than the first one, from the middle again after each."""
        number = 0
        for _ in _SOUGHT_FIRST:
            if time.monotonic() > until_s:
                return
            before = self._cutoff
            self._seek(low_s, _SOUGHT_FIRST[number])
            number = number + 1 if self._cutoff == before else 0

    def _seek(self, low_s: float, share: float) -> None:
        """Look for a better pipeline so far on the way from some extra to that of the best."""
        best = self.best or self._known
        task = next((i for i, t in enumerate(self._tasks) if best and t.setting == best.setting), None)
        if best is None or task is None:
            return
        high_s = min(best.answer.extra_s, self._target() - self._tasks[task].fill_s)
        if high_s > low_s:
            box, extra_s = self._whole(task, self._tasks[task]), low_s + share * (high_s - low_s)
            self._try(self._program(task), box, extra_s, widely=True)

    def _dive(self, program: CountingProgram, box: Box) -> None:
        """Look for a pipeline near the limits with which the relaxation costs least, then below these."""
        self._dived.add(box.task)
        left_s = self._deadline_s - time.monotonic()
        ways = self._ways(program, box, time.monotonic() + _WAYS_SHARE * left_s)
        share = _PLAN_SHARE if self._aim == "plan" else _DIVE_SHARE
        until_s = time.monotonic() + share * (self._deadline_s - time.monotonic())
        found: tuple[Box, float] | None = None
        for way in ways:
            failed = self._find_segments(program, way, until_s)
            found = found if failed is None else (way, failed)
        if found is not None:
            self._refine(program, *found, until_s)
            if self._aim == "both":
                self._seek_first(found[0].extra[1], until_s)
        elif ways and self._aim != "plan":
            self._plunge(program, ways[0])

    def _ways(self, program: CountingProgram, box: Box, until_s: float) -> list[Box]:
        """Boxes up to limits on extra and post with which the relaxation costs little, least first."""
        first = self._least_extra(program, box, box.extra[1])
        if first is None:
            return []
        step_s, extra_s = first
        least = Least(extra_s, box.post[0], self._weight)
        program.relaxed(StageLimits(extra_s, box.post[1]), least, self._deadline_s)
        spread = program.spread(least)
        if self._weight * spread.post_short_s <= _POST_MATTERS * step_s:
            return [replace(box, extra=(box.extra[0], extra_s))]
        found: list[tuple[float, Box]] = []
        post_s = spread.post_s
        for _ in range(_POSTS):
            limits = within(program.posts_s, box.post[0], post_s)
            narrowed = box if limits is None else replace(box, post=(limits[1], limits[1]))
            way = None if limits is None else self._least_extra(program, narrowed, extra_s / _EXTRA_FALLS)
            if way is None:
                break
            found.append((way[0], replace(narrowed, extra=(box.extra[0], way[1]))))
            if way[0] > _NO_BETTER * min(total for total, _ in found) or time.monotonic() > until_s:
                break
            post_s = _POST_FALLS * narrowed.post[1]
        return [way for _, way in sorted(found, key=lambda pair: pair[0])[:_WAYS]]

    def _least_extra(
        self, program: CountingProgram, box: Box, from_s: float
    ) -> tuple[float, float] | None:
        """What the relaxation costs at least with extra up to a limit, about, and with how much.

        None where nothing fits.
        """
        most = within(program.extras_s, box.extra[0], min(box.extra[1], from_s))
        tried: dict[float, float] = {}

        def step_s(wanted_s: float) -> float:
            at = within(program.extras_s, box.extra[0], wanted_s)
            if at is None:
                return INFINITY
            if at[1] not in tried:
                least = Least(at[1], box.post[0], self._weight)
                value = program.relaxed(StageLimits(at[1], box.post[1]), least, self._deadline_s)
                tried[at[1]] = INFINITY if value is None else least.step_s + value
            return tried[at[1]]

        # Downwards as long as that costs less, then in smaller steps around the least.
        extra_s, least_s = most[1] if most else 0.0, INFINITY
        while (found := step_s(extra_s)) < least_s:
            least_s, extra_s = found, extra_s * _EXTRA_FALLS
        for power in _CLOSER:
            for side in (-power, power):
                step_s(min(tried, key=lambda x: tried[x]) * _EXTRA_FALLS**side)
        if not tried or min(tried.values()) == INFINITY:
            return None
        return min((total, extra) for extra, total in tried.items())

    def _find_segments(self, program: CountingProgram, box: Box, until_s: float) -> float | None:
        """Allow more and more extra as long as stretches of kinds may make a pipeline below the target.

        Returns the extra before that of the best one found, None where none was.
        """
        before, found = box.extra[1], None
        for factor in _SEGMENT_FACTORS[: _FEW_FACTORS if self._aim == "plan" else None]:
            if time.monotonic() > until_s:
                break
            extra = factor * box.extra[1]
            better = self._try_segments(program, box, extra)
            if better is None:
                break
            found, before = before if better else found, extra
        return found

    def _try_segments(
        self, program: CountingProgram, box: Box, extra_s: float, *, alone: bool = False
    ) -> bool | None:
        """Whether good columns beat the cutoff with at most so much extra; None if nothing does.

        Where these give no pipeline stretches of kinds are looked for, unless they are to be `alone`.
        """
        if not COMPILED and sum(program.counts) > FEW_DEVICES:
            return None
        least, limits = Least(extra_s, box.post[0], self._weight), StageLimits(extra_s, box.post[1])
        value = program.relaxed(limits, least, self._deadline_s)
        if value is None:
            return False
        most = self._target() - least.step_s
        if value >= most:
            return None
        floors = program.floors(limits, least, value)
        # Good columns add little to the least; runs of others would be many.
        spend = min(most, value + _AMONG_SPARE * (least.step_s + value))
        if self._try_cheapest(program, box, limits, least, floors, spend):
            return True
        spare = max(_SEGMENT_SPARE * least.extra_s, _SEGMENT_SPARE_FILL * abs(value)) + 1e-12
        spend = min(most, value + spare)
        lines = program.lines(limits, least, floors.below(least.step_s + spend), spend, exact=False)
        if alone or lines is None:
            return False
        stocks, _ = program.kinds(lines)
        sizes, worth = program.node_sizes, program.worth()
        line = grow_segments(lines, stocks, sizes, worth, spend, self._deadline_s)
        return self._takes(program, box, lines, line, spend)

    def _try_cheapest(
        self,
        program: CountingProgram,
        box: Box,
        limits: StageLimits,
        least: Least,
        floors: Floors,
        spend: float,
    ) -> bool:
        """Whether a pipeline of columns that add little to the least beats the cutoff."""
        lines = program.lines(limits, least, floors.below(least.step_s + spend), spend, exact=False)
        if lines is None:
            return False
        line = self._among(lines, cheapest(lines), spend)
        return self._takes(program, box, lines, line, spend)

    def _plunge(self, program: CountingProgram, box: Box) -> None:
        """Allow more and more extra until a beam finds a pipeline, then somewhat less again."""
        failed = box.extra[1]
        for factor in _DIVE_FACTORS:
            extra = min(factor * box.extra[1], self._target() - self._tasks[box.task].fill_s)
            if self._try(program, box, extra):
                break
            failed = extra
            if extra < factor * box.extra[1]:
                return
        if self.best is not None:
            self._bisect(program, box, failed, INFINITY)

    def _refine(self, program: CountingProgram, box: Box, failed: float, until_s: float) -> None:
        """Look with the least extra there may be, then between what failed and what was found."""
        if self._aim == "both" and failed > box.extra[1] and self._try(program, box, box.extra[1]):
            return
        self._bisect(program, box, failed, until_s)

    def _bisect(self, program: CountingProgram, box: Box, lowest: float, until_s: float) -> None:
        """Allow less extra than the best plan has, but more than failed."""
        best = self.best or self._known
        assert best is not None
        found = best.answer.extra_s
        for _ in range(_REFINEMENTS):
            if found - lowest < _FINE * self._gap * found or time.monotonic() > until_s:
                break
            extra = (lowest + found) / 2
            if self._try_segments(program, box, extra, alone=self._aim == "proof") or (
                self._aim == "both" and self._try(program, box, extra)
            ):
                found = min(extra, self.best.answer.extra_s) if self.best else extra
            else:
                lowest = extra

    def _try(self, program: CountingProgram, box: Box, extra_s: float, *, widely: bool = False) -> bool:
        """Whether a pipeline is found with at most so much extra that beats the cutoff.

        A beam looks for it only where there is none yet, or `widely`.
        """
        least = Least(extra_s, box.post[0], self._weight)
        limits = StageLimits(extra_s, box.post[1])
        value = program.relaxed(limits, least, self._deadline_s)
        if value is None:
            return False
        spend = min(
            self._target() - least.step_s, value + max(_DIVE_SPARE * extra_s, 0.2 * abs(value)) + 1e-12
        )
        if spend <= 0:
            return False
        floors = program.floors(limits, least, value).below(least.step_s + spend)
        lines = program.lines(limits, least, floors, spend, exact=False)
        if lines is None:
            return False
        found = self._judge_kinds(program, lines, spend, extra_s)
        line = found.line
        if line is None:
            if found.cost > spend * (1 + TOLERANCE):
                return False
            verdict = self._judge(box.task, lines, least, spend, extra_s)
            if verdict.excludes(spend):
                return False
            line = self._best_met(lines, verdict, spend) or self._among_met(
                lines, verdict, found.met, spend
            )
        if line is None and (self.best is None or widely):
            shares = verdict.shares(spend)
            line = grow_lines(lines, shares, spend, _BEAM, self._deadline_s).line
        return self._takes(program, box, lines, line, spend)
