"""Best-first search over counting programmes: cheap bounds on wide boxes, exact lines in narrow ones.

A box holds the pipelines of one task whose extra and post lie between two limits each. Its bound is what
both limits come to at least plus what its columns cost beyond that (`programme.Least`): in wide boxes
over the linear relaxation, in narrow ones over lines (`lines`), whose prices also guide a beam that
grows pipelines (`beam`). A box that no line is left in is done with; the others are divided, or
looked at again with a wider beam. The least bound on the heap is at any time a bound on every pipeline.
"""

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from graphpar.partition.chains.limits import NotSolvedError
from graphpar.partition.clock import OutOfTimeError
from graphpar.partition.counting.beam import grow_lines
from graphpar.partition.counting.boxes import Box, middle_of, split_below
from graphpar.partition.counting.dive import SearchDiving
from graphpar.partition.counting.floors import Least, Spread
from graphpar.partition.counting.lines import TOLERANCE, Line, Lines
from graphpar.partition.counting.programme import CountingProgram
from graphpar.partition.counting.together import Together
from graphpar.partition.search import INFINITY, Asked, SearchResult, Task
from graphpar.partition.stage_costs import StageLimits

_NARROW = 0.5
"""A box is narrow if its extra varies by this share of the gap, ..."""

_LEAST_NARROW = 2e-3
"""... or by this share of the step, ..."""

_BEAMS = (60, 240)
"""Parts of lines kept at once, by how often a box was looked at."""

_FAR, _FAR_WHOLE = 0.25, 1.0
"""... or by this share of what is left between its bound and the target, and where columns are few."""

_DIVES = 3
"""Tasks in which a first pipeline is looked for before the search proper."""

_LAZY = 0.1
"""A box waits where another's bound is less by this share of the gap."""

_NEAR = 0.3
"""Lines are looked for at first up to this share of the way from a box's bound to the target."""


_MOST_WHOLE = 2000
"""Boxes with so many columns or fewer are looked at as an integer programme, ..."""

_MOST_GROWN = 4000
"""... and with more than that no beam is grown: it would take seconds, and find nothing."""


def search_counted(tasks: Iterable[Task], asked: Asked, together: Together) -> SearchResult:
    """The pipeline with the least step time over the tasks of counting programmes."""
    return _CountedSearch(tasks, asked, together).run()


class _CountedSearch(SearchDiving):
    def _work(self) -> None:
        if self._aim != "plan":
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
            spread = program.spread(least)
            if self._target() < INFINITY:
                floors = program.floors(self._limits(box), least, value, box.known)
                box = replace(box, known=floors.below(self._target()))
            if self._divide_wide(program, bound, box, spread):
                return
            if self._needs_plan and box.task not in self._dived and len(self._dived) < _DIVES:
                self._dive(program, box)
                program.relaxed(self._limits(box), least, self._deadline_s, box.known)
            self._look_at_kinds(program, bound, box)
            return
        self._look_closely(program, bound, box)

    def _least(self, box: Box) -> Least:
        return Least(box.extra[0], box.post[0], self._weight)

    def _limits(self, box: Box) -> StageLimits:
        both = INFINITY
        if self._weight > 0:
            both = self._target() - self._tasks[box.task].fill_s
        return StageLimits(box.extra[1], box.post[1], both)

    def _divide_wide(self, program: CountingProgram, bound: float, box: Box, spread: Spread) -> bool:
        """Push both halves of a box unless it is narrow; by post where that says more."""
        least = max(_NARROW * self._gap, _LEAST_NARROW) * (box.extra[0] + self._tasks[box.task].fill_s)
        allowed = allowed_post = least
        if self.best is not None or self._aim == "proof":
            left_s = self._target() - bound
            few = box.known is not None and len(box.known.index) <= _MOST_WHOLE
            allowed = max(least, (_FAR_WHOLE if few else _FAR) * left_s)
            allowed_post = max(least, _FAR * left_s)
        narrow = box.extra[1] - box.extra[0] <= allowed or middle_of(program.extras_s, box.extra) is None
        short_s = self._weight * spread.post_short_s
        if short_s > (allowed_post if narrow else max(allowed, spread.extra_short_s)):
            parts = split_below(program.posts_s, box.post, spread.post_s)
            for low, high in parts or ():
                self._push(bound, replace(box, post=(low, high)))
            if parts is not None:
                return True
        if not narrow:
            self._divide(program, bound, box)
        return not narrow

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
        spend = self._target() - least.step_s
        lines = program.lines(self._limits(box), least, box.known, spend)
        if lines is None or spend <= 0:
            # The dive found a plan so good that nothing here reaches the new target.
            self._prune(max(bound, self._target()))
            return
        found = self._judge_kinds(program, lines, spend, bound)
        bound = max(bound, min(least.step_s + found.cost, self._target()))
        self._current_s = bound
        if found.line is not None:
            self._offer_line(program, box, lines, found.line, spend, bound)
            self._divide_at(program, bound, box, lines, found.line)
        elif found.cost > spend * (1 + TOLERANCE):
            self._prune(max(bound, self._target()))
        else:
            self._push(bound, replace(box, looks=1))

    def _look_closely(self, program: CountingProgram, bound: float, box: Box) -> None:
        least = self._least(box)
        spend = self._target() - least.step_s
        lines = program.lines(self._limits(box), least, box.known, spend)
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
            self._offer_line(program, box, lines, straight, spend, bound)
            self._divide_at(program, bound, box, lines, straight)
            return
        if self._heap and bound > self._heap[0][0] + _LAZY * self._gap * bound:
            self._push(bound, box)
            return
        if len(lines.cost) <= _MOST_WHOLE:
            self._look_at_all(program, bound, box, lines, spend)
            return
        if len(lines.cost) > _MOST_GROWN:
            self._look_again(program, bound, replace(box, looks=len(_BEAMS)))
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
        self._offer_line(program, box, lines, line, spend, bound)
        self._divide_at(program, bound, box, lines, line)

    def _look_at_all(
        self, program: CountingProgram, bound: float, box: Box, lines: Lines, spend: float
    ) -> None:
        """Bound a box of few columns by the integer programme of all of them."""
        found = self._solved(lines, spend)
        self.programs += 1
        cost = min(found.cost, float(lines.cost[lines.whole].min(initial=INFINITY)))
        bound = max(bound, min(self._least(box).step_s + cost, self._target()))
        self._current_s = bound
        if found.line is not None:
            self._offer_line(program, box, lines, found.line, spend, bound)
            self._divide_at(program, bound, box, lines, found.line)
        elif cost >= spend:
            self._prune(max(bound, self._target()))
        else:
            self._look_again(program, bound, replace(box, looks=len(_BEAMS)))

    def _look_again(self, program: CountingProgram, bound: float, box: Box) -> None:
        """Nothing was found, but not everything was looked at."""
        self._seek_again(box.extra[0])
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

    def _divide_at(
        self, program: CountingProgram, bound: float, box: Box, lines: Lines, line: Line
    ) -> None:
        """Divide a box where a line lies: by extra or by post, whichever falls short of more."""
        used = lines.stages_of(line)
        share = lines.stages.blocks[used] / lines.blocks
        short = []
        for limits, values in ((box.extra, lines.stages.extra_s), (box.post, lines.stages.post_s)):
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
