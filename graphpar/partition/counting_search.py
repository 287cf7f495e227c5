"""Best-first search over counting programmes: cheap bounds on wide boxes, exact lines in narrow ones.

A box holds the pipelines of one task whose extra and post lie between two limits each. Its bound is what
both limits come to at least plus what its columns cost beyond that (`counting.Least`): in wide boxes over
the linear relaxation, in narrow ones over lines (`counting_lines`), whose prices also guide a beam that
grows pipelines (`counting_beam`). A box that no line is left in is done with; the others are divided, or
looked at again with a wider beam. The least bound on the heap is at any time a bound on every pipeline.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from graphpar.partition.chain import NotSolvedError
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting import CountingProgram, Least
from graphpar.partition.counting_beam import grow_among, grow_lines
from graphpar.partition.counting_boxes import Box, middle_of, split_below, within
from graphpar.partition.counting_kinds import Harvest, judge_kinds
from graphpar.partition.counting_lines import TOLERANCE, Line, Lines, Verdict
from graphpar.partition.counting_together import SearchTogether, Together
from graphpar.partition.jit import COMPILED
from graphpar.partition.search import INFINITY, Asked, SearchResult, Task
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import FloatArray, IntArray

_NARROW = 0.5
"""A box is narrow if its extra varies by this share of the gap, ..."""

_LEAST_NARROW = 2e-3
"""... or by this share of the step, ..."""

_BEAMS = (60, 240)
"""Parts of lines kept at once, by how often a box was looked at."""

_FEW_DEVICES = 32
"""Without a compiler whole stages of kinds are only looked at in clusters up to this size."""

_AMONG = 600
"""The same where only columns are used that were met before: of patterns, and of lines."""

_FAR = 0.25
"""... or by this share of what is left between its bound and the target."""

_DIVES = 3
"""Tasks in which a first pipeline is looked for before the search proper."""

_DIVE_FACTORS = (1.0, 1.01, 1.025, 1.05, 1.1, 1.18, 1.3, 1.5, 2.0, 3.0, 5.0)
"""Extra allowed at a dive, in multiples of what the relaxation needs."""

_DIVE_SPARE = 0.02
"""At a dive lines may cost this share of extra more than the relaxation says."""

_CLOSE, _LEAST_CLOSE = 0.1, 5e-4
"""Prices are found up to this share of the gap, or this share of the step."""

_LAZY = 0.1
"""A box waits where another's bound is less by this share of the gap."""

_NEAR = 0.3
"""Lines are looked for at first up to this share of the way from a box's bound to the target."""

_KEPT_LINES = 40
"""Lines of a task that are remembered."""

_REFINEMENTS = 5
"""How often a dive that succeeded is tried again with less extra."""

_FINE = 0.5
"""A dive ends where extra is known to within this share of the gap."""

_BISECTIONS = 12
"""Relaxations solved to find the least extra of a task."""


@dataclass(frozen=True, eq=False)
class _Known:
    """A line by the numbers of its columns, which mean something beyond the box it was met in."""

    fill_s: float
    shares: FloatArray
    extra_s: FloatArray
    post_s: FloatArray
    sums: FloatArray

    def line(self, least: Least) -> Line:
        """The line at its cost beyond another least."""
        over = np.maximum(self.extra_s - least.extra_s, 0.0)
        over = over + least.post_weight * np.maximum(self.post_s - least.post_s, 0.0)
        return Line((), self.fill_s + float(self.shares @ over), self.sums)


@dataclass(frozen=True, eq=False)
class _Guide:
    """What was learnt in a task: prices and lines."""

    prices: FloatArray
    lines: tuple[_Known, ...]


def search_counted(tasks: Iterable[Task], asked: Asked, together: Together) -> SearchResult:
    """The pipeline with the least step time over the tasks of counting programmes."""
    return _CountedSearch(tasks, asked, together).run()


class _CountedSearch(SearchTogether):
    def __init__(self, tasks: Iterable[Task], asked: Asked, together: Together) -> None:
        super().__init__(tasks, asked, together)
        self._guides: dict[int, _Guide] = {}
        self._dived: set[int] = set()

    def _work(self) -> None:
        if self.best is None or self._aim != "plan":
            self._gather()
            super()._work()

    def _look(self, bound: float, box: Box) -> None:
        if time.monotonic() > self._deadline_s:
            raise OutOfTimeError
        program = self._program(box.task)
        shrunk = self._shrink(program, box)
        if shrunk is None:
            # What was cut off costs the target or more.
            self._prune(max(bound, self._target()))
            return
        if self._target() < INFINITY:
            # So does what the limits below leave out.
            self._prune(max(bound, self._target()))
        box = shrunk
        if box.known is not None:
            box = replace(box, known=box.known.below(self._target()))
        least = self._least(box)
        if box.looks == 0:
            self.programs += 1
            value = program.relaxed(self._limits(box), least, self._deadline_s, box.known)
            if value is None:
                return
            bound = max(bound, least.step_s + value)
            if bound >= self._target():
                self._prune(bound)
                return
            if box.task in self._parts:
                self._part(bound, self._parts[box.task])
                return
            if self._target() < INFINITY:
                floors = program.floors(self._limits(box), least, value, box.known)
                box = replace(box, known=floors.below(self._target()))
            if not self._is_narrow(program, bound, box):
                self._divide(program, bound, box)
                return
            if self._needs_plan and box.task not in self._dived and len(self._dived) < _DIVES:
                self._dive(program, box)
                program.relaxed(self._limits(box), least, self._deadline_s, box.known)
            self._look_at_kinds(program, bound, box)
            return
        self._look_closely(program, bound, box)

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

    def _least(self, box: Box) -> Least:
        return Least(box.extra[0], box.post[0], self._weight)

    def _limits(self, box: Box) -> StageLimits:
        both = INFINITY
        if self._weight > 0:
            both = self._target() - self._tasks[box.task].fill_s
        return StageLimits(box.extra[1], box.post[1], both)

    def _is_narrow(self, program: CountingProgram, bound: float, box: Box) -> bool:
        width = box.extra[1] - box.extra[0]
        allowed = max(_NARROW * self._gap, _LEAST_NARROW) * (box.extra[0] + self._tasks[box.task].fill_s)
        if self.best is not None or self._aim == "proof":
            allowed = max(allowed, _FAR * (self._target() - bound))
        return width <= allowed or middle_of(program.extras_s, box.extra) is None

    def _divide(self, program: CountingProgram, bound: float, box: Box) -> None:
        """Push both halves of a box by extra."""
        middle = middle_of(program.extras_s, box.extra)
        assert middle is not None
        low, high = middle
        self._push(bound, replace(box, extra=(box.extra[0], low)))
        self._push(bound, replace(box, extra=(high, box.extra[1])))

    # --- narrow boxes ---

    def _look_at_kinds(self, program: CountingProgram, bound: float, box: Box) -> None:
        """Bound a box by whole stages of every kind, with the prices of the relaxation just solved."""
        least = self._least(box)
        lines = program.lines(self._limits(box), least, box.known)
        spend = self._target() - least.step_s
        if lines is None or spend <= 0:
            # The dive found a plan so good that nothing here reaches the new target.
            self._prune(max(bound, self._target()))
            return
        found = self._judge_kinds(program, lines, spend, bound)
        bound = max(bound, min(least.step_s + found.cost, self._target()))
        self._current_s = bound
        if found.line is not None:
            self._offer(box.task, program.answer_of(lines, found.line, bound))
            self._divide_at(program, bound, box, lines, found.line)
        elif found.cost > spend * (1 + TOLERANCE):
            self._prune(max(bound, self._target()))
        else:
            self._push(bound, replace(box, looks=1))

    def _look_closely(self, program: CountingProgram, bound: float, box: Box) -> None:
        least = self._least(box)
        lines = program.lines(self._limits(box), least, box.known)
        spend = self._target() - least.step_s
        if lines is None or spend <= 0:
            return
        if spend == INFINITY:
            spend = 10 * (float(lines.cost.max()) * lines.blocks + 1.0)
        verdict = self._judge(box.task, lines, least, spend, box.extra[1])
        bound = max(bound, min(least.step_s + verdict.cost, self._target()))
        self._current_s = bound
        if verdict.excludes(spend):
            self._prune(max(bound, self._target()))
            return
        straight = self._best_met(lines, verdict, spend)
        if straight is None and box.looks == 1:
            kinds = self._judge_kinds(program, lines, spend, bound)
            straight = kinds.line or self._among_met(lines, verdict, kinds.met, spend)
        if straight is not None:
            self._offer(box.task, program.answer_of(lines, straight, bound))
            self._divide_at(program, bound, box, lines, straight)
            return
        if self._heap and bound > self._heap[0][0] + _LAZY * self._gap * bound:
            self._push(bound, box)
            return
        # Beginnings of lines that cost little more than they must are fewer.
        near = min(spend, bound - least.step_s + max(_NEAR * (self._target() - bound), self._fine(bound)))
        width = _BEAMS[min(box.looks, len(_BEAMS)) - 1]
        harvest = grow_lines(lines, verdict.shares(near), near, width, self._deadline_s)
        if harvest.line is None and harvest.complete:
            if near < spend:
                self._push(max(bound, least.step_s + near), box)
            else:
                self._prune(max(bound, self._target()))
            return
        if harvest.line is None:
            self._look_again(program, bound, box)
            return
        line = harvest.line
        if harvest.complete:
            bound = max(bound, least.step_s + line.cost)
        self._offer(box.task, program.answer_of(lines, line, bound))
        self._divide_at(program, bound, box, lines, line)

    def _fine(self, step_s: float) -> float:
        """A difference in steps that does not matter."""
        return max(_CLOSE * self._gap, _LEAST_CLOSE) * step_s

    @staticmethod
    def _best_met(lines: Lines, verdict: Verdict, spend: float) -> Line | None:
        """The cheapest line met on the way that keeps everything."""
        held = [line for line in verdict.met if line.cost < spend and lines.holds(line)]
        return min(held, key=lambda line: line.cost, default=None)

    def _judge_kinds(
        self, program: CountingProgram, lines: Lines, spend: float, step_s: float
    ) -> Harvest:
        """What whole stages of each kind say; nothing where uncompiled loops would take long."""
        if not COMPILED and lines.devices > _FEW_DEVICES:
            return Harvest(-INFINITY, None, np.zeros(0, dtype=np.intp))
        return judge_kinds(lines, *program.kinds(lines), spend, self._fine(step_s), self._deadline_s)

    def _among_met(self, lines: Lines, verdict: Verdict, met: IntArray, spend: float) -> Line | None:
        """A line of columns of patterns and lines that were met, none of which keeps everything."""
        known = [np.array(line.columns, dtype=np.intp) for line in verdict.met]
        index = np.unique(np.concatenate([met, *known]))
        shares = verdict.shares(spend)
        return grow_among(lines, index, shares, spend, _AMONG, self._deadline_s)

    def _look_again(self, program: CountingProgram, bound: float, box: Box) -> None:
        """Nothing was found, but not everything was looked at."""
        if box.looks < len(_BEAMS):
            self._push(bound, replace(box, looks=box.looks + 1))
        elif middle_of(program.extras_s, box.extra) is not None:
            self._divide(program, bound, replace(box, looks=0))
        elif (middle := middle_of(program.posts_s, box.post)) is not None:
            low, high = middle
            self._push(bound, replace(box, post=(box.post[0], low), looks=0))
            self._push(bound, replace(box, post=(high, box.post[1]), looks=0))
        else:
            self._solve(program, bound, box)

    def _solve(self, program: CountingProgram, bound: float, box: Box) -> None:
        """The integer programme of a box that nothing is left to divide in."""
        self.programs += 1
        try:
            answer = program.solve(StageLimits(box.extra[1], box.post[1]), self._deadline_s)
        except NotSolvedError:
            self._give_up(bound)
            return
        if answer is None:
            self._prune(max(bound, self._target()))
            return
        self._offer(box.task, answer)
        self._prune(max(bound, answer.bound_s + box.extra[0] + self._weight * box.post[0]))

    def _judge(self, task: int, lines: Lines, least: Least, spend: float, extra_s: float) -> Verdict:
        guide = self._guides.get(task) or _Guide(np.zeros(len(lines.sums)), ())
        known = [k for k in guide.lines if k.extra_s.max() <= extra_s]
        close = self._fine(least.step_s)
        verdict = lines.judge(
            spend, close, guide.prices, [k.line(least) for k in known], self._deadline_s
        )
        met = [_known(lines, line) for line in verdict.met]
        self._guides[task] = _Guide(verdict.prices, (*guide.lines, *met)[-_KEPT_LINES:])
        return verdict

    def _divide_at(
        self, program: CountingProgram, bound: float, box: Box, lines: Lines, line: Line
    ) -> None:
        """Divide a box where a line lies: by extra or by post, whichever falls short of more."""
        used = list(line.columns)
        share = lines.columns.blocks[used] / lines.blocks
        short = []
        for limits, values in ((box.extra, lines.columns.extra_s), (box.post, lines.columns.post_s)):
            own = values[used]
            mean = limits[0] + float(share @ np.maximum(own - limits[0], 0.0))
            short.append((float(own.max()) - mean, float(own.max())))
        by_post = self._weight * short[1][0] > short[0][0]
        values = program.posts_s if by_post else program.extras_s
        limits = box.post if by_post else box.extra
        parts = split_below(values, limits, short[1][1] if by_post else short[0][1])
        if parts is None:
            # The line lies at the lower end of the box: nothing else in it costs less.
            self._look_again(program, bound, box)
            return
        for low, high in parts:
            if by_post:
                self._push(bound, replace(box, post=(low, high), looks=0))
            else:
                self._push(bound, replace(box, extra=(low, high), looks=0))

    # --- the first plan ---

    @property
    def _needs_plan(self) -> bool:
        return self.best is None and self._aim != "proof"

    def _start(self) -> None:
        """Dive into the task that promises most before all others are even built."""
        if not self._needs_plan or not self._heap or self._heap[0][0] >= self._target():
            return
        box = self._promising()
        program = self._program(box.task)
        shrunk = self._shrink(program, box)
        least = None if shrunk is None else self._least_extra(program, shrunk)
        if shrunk is not None and least is not None:
            self._dive(program, replace(shrunk, extra=(shrunk.extra[0], least)))

    def _least_extra(self, program: CountingProgram, box: Box) -> float | None:
        """The extra with which the relaxation costs least, about; None where nothing fits."""
        values = program.extras_s
        low = int(np.searchsorted(values, box.extra[0], side="left"))
        high = int(np.searchsorted(values, box.extra[1], side="right")) - 1
        best: tuple[float, float] | None = None
        for _ in range(_BISECTIONS):
            if low > high:
                break
            middle = int(np.searchsorted(values, (values[low] + values[high]) / 2, side="left"))
            extra = float(values[middle])
            limits = StageLimits(extra, box.post[1])
            least = Least(extra, box.post[0], self._weight)
            value = program.relaxed(limits, least, self._deadline_s)
            if value is None:
                low = middle + 1
                continue
            if best is not None and best[0] <= extra + value:
                # Less extra costs more in fill already: what is best lies above.
                low, high = middle + 1, int(np.searchsorted(values, best[1], side="left")) - 1
                continue
            best, high = (extra + value, extra), middle - 1
        return None if best is None else best[1]

    def _dive(self, program: CountingProgram, box: Box) -> None:
        """Allow more and more extra until a beam finds a pipeline, then somewhat less again."""
        self._dived.add(box.task)
        failed = box.extra[1]
        for factor in _DIVE_FACTORS:
            extra = min(factor * box.extra[1], self._target() - self._tasks[box.task].fill_s)
            if self._try(program, box, extra):
                break
            failed = extra
            if extra < factor * box.extra[1]:
                return
        if self.best is None:
            return
        found = self.best.answer.extra_s
        lowest = failed
        for _ in range(_REFINEMENTS):
            if found - lowest < _FINE * self._gap * found:
                break
            extra = (lowest + found) / 2
            if self._try(program, box, extra):
                found = min(extra, self.best.answer.extra_s)
            else:
                lowest = extra

    def _try(self, program: CountingProgram, box: Box, extra_s: float) -> bool:
        """Whether a pipeline is found with at most so much extra that beats the cutoff."""
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
        lines = program.lines(limits, least, floors)
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
        if line is None and self.best is None:
            shares = verdict.shares(spend)
            line = grow_lines(lines, shares, spend, _BEAMS[0], self._deadline_s).line
        before = self._cutoff
        return line is not None and self._offer(box.task, program.answer_of(lines, line, 0.0)) < before


def _known(lines: Lines, line: Line) -> _Known:
    used, columns = list(line.columns), lines.columns
    return _Known(
        fill_s=float(columns.fill_s[used].sum()),
        shares=columns.blocks[used] / lines.blocks,
        extra_s=columns.extra_s[used],
        post_s=columns.post_s[used],
        sums=line.sums,
    )
