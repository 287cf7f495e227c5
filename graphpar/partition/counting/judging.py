"""How a search over counting programmes judges lines, and offers those that it finds."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from graphpar.partition.counting.among import Among, best_among, cheapest, solve_lines
from graphpar.partition.counting.boxes import Box
from graphpar.partition.counting.floors import Least
from graphpar.partition.counting.kinds import Harvest, judge_kinds
from graphpar.partition.counting.lines import Line, Lines, Verdict
from graphpar.partition.counting.programme import CountingProgram
from graphpar.partition.counting.together import SearchTogether, Together
from graphpar.partition.jit import COMPILED
from graphpar.partition.search import INFINITY, Asked, Task
from graphpar.partition.solver_matrix import Patience
from graphpar.partition.unit_arrays import FloatArray, IntArray

FEW_DEVICES = 32
"""Without a compiler whole stages of kinds are only looked at in clusters up to this size."""

_AMONG_S, _AMONG_SHARE, _AMONG_GAP = 0.8, 0.15, 0.3
"""Patience with the integer programme of some columns: so long, or this share of the time; its gap."""

_WHOLE_S, _WHOLE_SHARE = 3.0, 0.3
"""The same with that of all columns of a box."""

_KEPT_LINES = 40
"""Lines of a task that are remembered."""

_CLOSE, _LEAST_CLOSE = 0.1, 5e-4
"""Prices are found up to this share of the gap, or this share of the step."""

_AS_COUNTED = 0.1
"""A line is as good as it was counted if real nodes make it longer by less than this share of the gap."""


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


class SearchJudging(SearchTogether):
    """A search that knows what lines cost at least, and finds some."""

    def __init__(self, tasks: Iterable[Task], asked: Asked, together: Together) -> None:
        super().__init__(tasks, asked, together)
        self._guides: dict[int, _Guide] = {}

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
        if not COMPILED and lines.devices > FEW_DEVICES:
            return Harvest(-INFINITY, None, np.zeros(0, dtype=np.intp))
        return judge_kinds(lines, *program.kinds(lines), spend, self._fine(step_s), self._deadline_s)

    def _among_met(self, lines: Lines, verdict: Verdict, met: IntArray, spend: float) -> Line | None:
        """A line of columns of patterns and lines that were met, none of which keeps everything."""
        known = [np.array(line.columns, dtype=np.intp) for line in verdict.met]
        index = np.unique(np.concatenate([met, *known]))
        return self._among(lines, index, spend)

    def _among(self, lines: Lines, index: IntArray, spend: float, *, packed: bool = False) -> Line | None:
        """The best line of some columns, as far as patience with its integer programme goes."""
        patience = self._patience(_AMONG_S, _AMONG_SHARE)
        return best_among(lines, index, spend, _AMONG_GAP * self._gap, patience, packed=packed)

    def _solved(self, lines: Lines, spend: float) -> Among:
        """The integer programme of all columns, as far as patience goes."""
        patience = self._patience(_WHOLE_S, _WHOLE_SHARE)
        return solve_lines(lines, spend, _AMONG_GAP * self._gap, patience)

    def _patience(self, most_s: float, share: float) -> Patience:
        """So much work, or this share of the time that is left."""
        left_s = self._deadline_s - time.monotonic()
        return Patience(min(most_s, share * left_s), self._deadline_s)

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

    def _offer_line(
        self,
        program: CountingProgram,
        box: Box,
        lines: Lines,
        line: Line,
        spend: float,
        bound_s: float = 0.0,
    ) -> float:
        """Offer a line; what it takes.

        Rows say of nodes what they hold on average, so a stage may have to leave its node after all, and
        then sums over the network. Where that costs, the best line whose stages fit into nodes is offered
        as well.
        """
        answer = program.answer_of(lines, line, bound_s)
        counted_s = answer.fill_s + answer.extra_s + self._weight * answer.post_s
        value = self._offer(box.task, answer)
        if value <= counted_s * (1 + _AS_COUNTED * self._gap) or lines.is_packed(line):
            return value
        index = np.union1d(cheapest(lines), np.array(line.columns, dtype=np.intp))
        packed = self._among(lines, index, spend, packed=True)
        if packed is None:
            return value
        return min(value, self._offer(box.task, program.answer_of(lines, packed, bound_s)))

    def _takes(
        self, program: CountingProgram, box: Box, lines: Lines, line: Line | None, spend: float
    ) -> bool:
        """Offer a line, if there is one; whether it beats what was known."""
        before = self._cutoff
        return line is not None and self._offer_line(program, box, lines, line, spend) < before


def _known(lines: Lines, line: Line) -> _Known:
    used, columns = lines.stages_of(line), lines.stages
    return _Known(
        fill_s=float(columns.fill_s[used].sum()),
        shares=columns.blocks[used] / lines.blocks,
        extra_s=columns.extra_s[used],
        post_s=columns.post_s[used],
        sums=line.sums,
    )
