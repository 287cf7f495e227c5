"""`precision="auto"`: stages and the format of every unit, chosen for speed under an error budget.

Stages depend on the units' times and formats on the stages, so both are chosen in turn
(`graphpar.precision.search`): first stages as if every unit ran in its fastest format (whose bound
holds for every choice of formats), then formats for these stages (`graphpar.partition.formats`), then
stages again at the true prices. What is chosen is run as a whole, and the error of all units together
that this finds corrects the estimate for the next choice, until the budget is used or nothing faster is
left. The fastest of the plans measured within the budget is kept, its gap measured against that first
bound.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.partition.formats import Errors
from graphpar.partition.types import Partition, PipelineChoice
from graphpar.plans.records import PlanPrecision
from graphpar.precision.formats import Formats, uniform_formats, with_formats
from graphpar.precision.search import (
    NO_CORRECTION,
    Candidate,
    Pricing,
    Search,
    agreed,
)
from graphpar.precision.sensitivity import Sensitivities

MeasureErrors = Callable[[Sequence[PipelineChoice]], Errors | None]
"""Errors of pipelines as their stages are, run on this machine; None where nothing can be run."""

_TRIES = 8
"""Choices that are run as a whole at most, once one keeps the budget."""
SEARCH_S = 20.0
"""Seconds after which no other choice is tried once one keeps the budget."""
_PAST, _AGAIN = 1.02, 1.5
"""After a measured error above the budget, the next estimate is that much more careful; and where that
brings the same choice again."""


@dataclass(frozen=True)
class Answer:
    """A partition with the formats it was priced for, the account of the budget, and remarks."""

    table: CostTable
    found: Partition
    formats: Formats
    notes: tuple[str, ...]
    report: PlanPrecision | None = None


def uniform_answer(
    cluster: Cluster,
    precision: str,
    num_units: int,
    price: Callable[[Formats], CostTable],
    solve: Callable[[CostTable], Partition],
) -> Answer:
    """Stages where every device computes in one format, or in float32 where it lacks that."""
    formats, table, found = agreed(cluster, uniform_formats(cluster, precision, num_units), price, solve)
    return Answer(table, found, formats, formats.notes)


def check_budget(budget: float) -> None:
    """Make sure that a budget is one.

    >>> check_budget(-1.0)
    Traceback (most recent call last):
    ...
    ValueError: precision_budget is -1.0; it is a relative error, zero or more, such as 1e-2.
    """
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not (number and math.isfinite(budget) and budget >= 0):
        raise ValueError(
            f"precision_budget is {budget!r}; it is a relative error, zero or more, such as 1e-2."
        )


def choose_auto(
    cluster: Cluster,
    pricing: Pricing,
    sensitivities: Sensitivities,
    measure: MeasureErrors,
    budget: float,
    gap: float,
) -> Answer:
    """Stages and formats with the least predicted step whose errors keep within the budget.

    Args:
        cluster: The devices.
        pricing: How to price and plan.
        sensitivities: Errors of every unit in every lower format.
        measure: Errors of all units of some pipelines together; None where nothing can be run.
        budget: Largest relative error, of the result and of the gradient.
        gap: The gap asked for, to tell when it is not reached.

    Raises:
        InfeasibleError: Nothing fits.
    """
    search = Search(cluster, pricing, sensitivities, budget)
    tried = _Tried(search, measure, budget)
    best = tried.fastest()
    found = search.certified(best.made, gap)
    report = search.report(best.made, best.measured, best.correction, tried.refused, tried.told)
    notes = [] if best.made.lowered else [why_nothing(report)]
    return Answer(best.made.table, found, best.made.formats, (*best.made.formats.notes, *notes), report)


def why_nothing(report: PlanPrecision) -> str:
    """Why no unit is in a lower format."""
    if report.looser is None:
        return "no lower format of these devices makes the step shorter: all units stay in float32"
    return (
        f"no unit that would be faster in a lower format keeps within the budget of {report.budget:g}: "
        f"all stay in float32; a budget of {report.looser.budget:.2g} is the least that buys something"
    )


@dataclass(frozen=True)
class _Measured:
    """A choice, the measured errors of all its units together, and the correction they lead to."""

    made: Candidate
    measured: Errors | None
    correction: Errors


@dataclass
class _Tried:
    """Choices run as a whole one after another, each estimate corrected by the runs before."""

    search: Search
    measure: MeasureErrors
    budget: float
    told: str = ""
    refused: list[tuple[Candidate, Errors]] = field(default_factory=list)
    """Choices that broke the budget, and their measured errors."""
    too_small: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Corrections, of both errors, that are known to be too small: what they allowed broke the budget."""

    def fastest(self) -> _Measured:
        """The fastest choice found to keep the budget."""
        began_s = time.monotonic()
        best: _Measured | None = None
        correction, seen, runs = NO_CORRECTION, set[tuple[PipelineChoice, ...]](), 0
        while best is None or (runs < _TRIES and time.monotonic() - began_s < SEARCH_S):
            made = self.search.run(self.budget, correction)
            pipelines = with_formats(made.found, made.formats).pipelines
            if pipelines in seen:
                if best is not None:
                    break
                correction = correction[0] * _AGAIN, correction[1] * _AGAIN
                continue
            seen.add(pipelines)
            measured = self.measure(pipelines) if made.lowered else (0.0, 0.0)
            runs += 1
            if measured is None:
                self.told = "the whole was not run"
                return _Measured(made, None, correction)
            if max(measured) > self.budget:
                self.refused.append((made, measured))
                correction = self._more_careful(correction, made.errors, measured)
                continue
            correction = self._bolder(correction, made.errors, measured)
            if best is None or made.found.objective_s < best.made.found.objective_s:
                best = _Measured(made, measured, correction)
            if not self.search.gains_by_more(made):
                break
        else:
            self.told = (
                f"choices no longer tried after {runs} runs and {time.monotonic() - began_s:.0f} s"
            )
        assert best is not None
        return self._stretched(best, seen, began_s)

    def _stretched(
        self, best: _Measured, seen: set[tuple[PipelineChoice, ...]], began_s: float
    ) -> _Measured:
        """One unit more in a lower format, as long as what is measured keeps the budget.

        One number for all units corrects their estimates badly where units err in unlike ways: a looser
        budget could end in a slower plan than a tighter one.
        """
        while time.monotonic() - began_s < SEARCH_S:
            made = self.search.next_shorter(best.made)
            if made is None or made.found.objective_s >= best.made.found.objective_s:
                break
            pipelines = with_formats(made.found, made.formats).pipelines
            if pipelines in seen:
                break
            seen.add(pipelines)
            measured = self.measure(pipelines)
            if measured is None:
                break
            if max(measured) > self.budget:
                self.refused.append((made, measured))
                break
            best = _Measured(made, measured, best.correction)
        else:
            self.told = self.told or f"choices no longer tried after {SEARCH_S:.0f} s"
        return best

    def _more_careful(self, correction: Errors, estimated: Errors, measured: Errors) -> Errors:
        """After a choice that broke the budget."""
        new = list(correction)
        for kind in range(2):
            if measured[kind] > self.budget:
                self.too_small[kind] = max(self.too_small[kind], correction[kind])
                seen = measured[kind] / estimated[kind] if estimated[kind] > 0 else math.inf
                new[kind] = max(correction[kind] * _PAST, min(seen * _PAST, correction[kind] * 4))
        return new[0], new[1]

    def _bolder(self, correction: Errors, estimated: Errors, measured: Errors) -> Errors:
        """After a choice that kept it: what was found, but not what is known to allow too much."""
        new = list(correction)
        for kind in range(2):
            if estimated[kind] > 0 and measured[kind] / estimated[kind] < correction[kind]:
                low = max(measured[kind] / estimated[kind], correction[kind] / 4)
                between = math.sqrt(self.too_small[kind] * correction[kind])
                new[kind] = low if low > self.too_small[kind] else between
        return new[0], new[1]
