"""Choose the number format of every unit: the least predicted step under an error budget.

A stage `s` of pipeline `p` runs units `U_s`; `t[u,f]` are the seconds of one microbatch of unit `u` in
format `f` there, `c[b]` those of the casts at the border `b` of two units, `e[u,f]` the errors (of the
output, of the gradient) that unit `u` alone in format `f` was found to cause, `a` a correction for each
of both errors, `m_p` the microbatches of a pipeline and `k_s` the most that one replica of a stage takes.
Variables: `x[s,u,f]` binary, unit `u` in format `f`; `y[s,b]`, the formats beside `b` differ; `w[u]` the
square of the error that `u` adds. `h(f)` is the format that values are held in around `f` (products in 8
bits stand among bfloat16), and only where that differs there are casts.

    minimise   z
    such that  z   >= sum_s T_s + (m_p - 1) B_p                          for every pipeline    (steps)
               B_p >= T_s k_s / m_p                                      for every stage       (slowest)
               T_s  = sum_u sum_f t[u,f] x[s,u,f] + sum_b c[b] y[s,b]
               sum_f x[s,u,f] = 1                                        one format            (one)
               y[s,b] >= sum_{h(f)=g} (x[s,b,f] - x[s,b+1,f]) and its negative, for every g    (borders)
               w[u] >= sum_f (a e[u,f])^2 x[s,u,f]                       for both errors       (errors)
               sum_u w[u] <= budget^2

Roundings of different units know nothing of each other: to first order their errors are vectors at right
angles, whose squares add up. `a` is what a run of all units together was found to be of that (1 before).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphpar.ir.formats import base_format, carrier
from graphpar.partition.solver import Program, Term, Variable

Errors = tuple[float, float]
"""Relative errors of the output and of the gradient."""

_TIME_LIMIT_S = 10.0
_FASTER = 1e-3
"""A looser budget is worth telling if it saves this share of the step."""
_LESS = 1e-4
"""A tighter budget is less by this share at least, for the solver does not tell nearer ones apart."""


@dataclass(frozen=True)
class StageRun:
    """One stage: its pipeline, its units, and the most microbatches one of its replicas takes.

    `seconds` holds by unit (from `first` on) and format the seconds of one microbatch; formats that
    its devices lack are left out. `cast_s` holds the casts at the border before each unit.
    """

    pipeline: int
    first: int
    last: int
    most_microbatches: int
    seconds: tuple[Mapping[str, float], ...]
    cast_s: tuple[float, ...]


@dataclass(frozen=True)
class FormatProblem:
    """Stages with their prices, microbatches by pipeline, and by unit and format the errors.

    `correction` multiplies the errors of several units together.
    """

    stages: tuple[StageRun, ...]
    microbatches: tuple[int, ...]
    errors: tuple[Mapping[str, Errors], ...]
    correction: Errors = (1.0, 1.0)


@dataclass(frozen=True)
class FormatChoice:
    """By stage the formats of its units, the step they take, their errors together, and proof."""

    formats: tuple[tuple[str, ...], ...]
    step_s: float
    errors: Errors
    optimal: bool


def held_in(unit_format: str) -> str:
    """The format that values between ops of a unit are held in.

    >>> held_in("float8_e4m3fn"), held_in("bfloat16_linear"), held_in("float16")
    ('bfloat16', 'bfloat16', 'float16')
    """
    return carrier(base_format(unit_format))


def choose_formats(problem: FormatProblem, budget: float) -> FormatChoice:
    """The formats with the least step whose errors together are no more than the budget.

    >>> run = StageRun(0, 0, 2, 1, ({"float32": 4.0, "bfloat16": 1.0},) * 2, (0.0, 0.1))
    >>> errors = ({"bfloat16": (1e-3, 2e-3)}, {"bfloat16": (1e-3, 9e-3)})
    >>> choose_formats(FormatProblem((run,), (1,), errors), 5e-3).formats
    (('bfloat16', 'float32'),)
    """
    built = _Built(problem, budget)
    return built.answer() or _all_float32(problem)


def looser(problem: FormatProblem, than: FormatChoice) -> tuple[float, FormatChoice] | None:
    """The least budget that buys a shorter step, and what it buys; None where none does."""
    built = _Built(problem, None)
    built.limit_step(than.step_s * (1 - _FASTER))
    answer = built.answer()
    if answer is None:
        return None
    budget = max(answer.errors)
    best = choose_formats(problem, budget * (1 + 1e-9))
    return budget, best


def tighter(problem: FormatProblem, than: FormatChoice) -> tuple[float, FormatChoice] | None:
    """The best choice with less error than this one, and its error; None where this has none."""
    if max(than.errors) <= 0:
        return None
    answer = choose_formats(problem, max(than.errors) * (1 - _LESS))
    return max(answer.errors), answer


@dataclass
class _Built:
    """The programme, times in units of the all-float32 step, errors in units of the budget."""

    problem: FormatProblem
    budget: float | None
    program: Program = field(default_factory=lambda: Program("formats"))
    choices: list[list[dict[str, Variable]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        whole = _all_float32(self.problem).step_s
        self.unit_s = whole if whole > 0 else 1.0
        scaled = [self._alone(u, f) for u, by in enumerate(self.problem.errors) for f in by]
        self.unit_error = self.budget or max(map(max, scaled), default=1.0) or 1.0
        self.step = self.program.continuous("z")
        times = [self._stage(run) for run in self.problem.stages]
        for pipeline, microbatches in enumerate(self.problem.microbatches):
            mine = [
                (run, time)
                for run, time in zip(self.problem.stages, times, strict=True)
                if run.pipeline == pipeline
            ]
            slowest = self.program.continuous(f"B{pipeline}")
            for run, time in mine:
                share = run.most_microbatches / microbatches
                terms = [(share * c, v) for c, v in time]
                self.program.constrain([*terms, (-1.0, slowest)], "<=", 0.0)
            every = [term for _, time in mine for term in time]
            steps: list[Term] = [(microbatches - 1.0, slowest), (-1.0, self.step)]
            self.program.constrain([*every, *steps], "<=", 0.0)
        self._errors()

    def _stage(self, run: StageRun) -> list[Term]:
        """The variables of a stage, and its time as terms."""
        program, time = self.program, []
        picks: list[dict[str, Variable]] = []
        for unit, seconds in enumerate(run.seconds, start=run.first):
            at = f"{len(self.choices)}_{unit}"
            pick = {f: program.binary(f"x{at}_{f}") for f in seconds if self._may(unit, f)}
            program.constrain([(1.0, v) for v in pick.values()], "==", 1.0)
            time += [(seconds[f] / self.unit_s, v) for f, v in pick.items()]
            cast_s = run.cast_s[unit - run.first]
            if picks and cast_s > 0:
                differs = program.continuous(f"y{at}", 0.0, 1.0)
                time.append((cast_s / self.unit_s, differs))
                for held in {held_in(f) for f in (*pick, *picks[-1])}:
                    for a, b in ((picks[-1], pick), (pick, picks[-1])):
                        sides = [
                            (sign, v)
                            for sign, side in ((1.0, a), (-1.0, b))
                            for f, v in side.items()
                            if held_in(f) == held
                        ]
                        program.constrain([*sides, (-1.0, differs)], "<=", 0.0)
            picks.append(pick)
        self.choices.append(picks)
        return time

    def _alone(self, unit: int, f: str) -> Errors:
        """What a unit in a format adds to the errors."""
        output, gradient = self.problem.errors[unit].get(f, (0.0, 0.0))
        return output * self.problem.correction[0], gradient * self.problem.correction[1]

    def _may(self, unit: int, f: str) -> bool:
        """Whether a unit alone keeps within the budget in a format."""
        return self.budget is None or max(self._alone(unit, f)) <= self.budget

    def _errors(self) -> None:
        program = self.program
        self.total = program.continuous("total")
        for kind in range(2):
            added = []
            for unit, by_format in enumerate(self.problem.errors):
                error = program.continuous(f"w{kind}_{unit}")
                added.append(error)
                for run, picks in zip(self.problem.stages, self.choices, strict=True):
                    if not run.first <= unit < run.last:
                        continue
                    pick = picks[unit - run.first]
                    terms = [
                        ((self._alone(unit, f)[kind] / self.unit_error) ** 2, v)
                        for f, v in pick.items()
                        if f in by_format
                    ]
                    program.constrain([*terms, (-1.0, error)], "<=", 0.0)
            program.constrain([*((1.0, e) for e in added), (-1.0, self.total)], "<=", 0.0)
        if self.budget is not None:
            program.constrain([(1.0, self.total)], "<=", (self.budget / self.unit_error) ** 2)
        program.minimize([(1.0, self.step), (1e-7, self.total)])

    def limit_step(self, step_s: float) -> None:
        """Ask for the least error with a step no longer than this instead."""
        self.program.constrain([(1.0, self.step)], "<=", step_s / self.unit_s)
        self.program.minimize([(1.0, self.total)])

    def answer(self) -> FormatChoice | None:
        """The solution, recomputed from the formats alone; None where there is none."""
        outcome = self.program.solve(time_limit_s=_TIME_LIMIT_S, relative_gap=0.0)
        if outcome.objective is None:
            return None
        formats = tuple(
            tuple(next(f for f, v in pick.items() if outcome.chosen(v)) for pick in picks)
            for picks in self.choices
        )
        found = choice_of(self.problem, formats, optimal=outcome.status == "optimal")
        if self.budget is not None and max(found.errors) > self.budget * (1 + 1e-6):
            return None
        return found


def _all_float32(problem: FormatProblem) -> FormatChoice:
    formats = tuple(("float32",) * len(run.seconds) for run in problem.stages)
    return FormatChoice(formats, step_of(problem, formats), (0.0, 0.0), False)


def choice_of(
    problem: FormatProblem, formats: Sequence[Sequence[str]], *, optimal: bool = False
) -> FormatChoice:
    """Formats by stage and unit as a choice, with their step and errors."""
    chosen = tuple(map(tuple, formats))
    return FormatChoice(chosen, step_of(problem, chosen), errors_of(problem, chosen), optimal)


def step_of(problem: FormatProblem, formats: Sequence[Sequence[str]]) -> float:
    """The step of a choice of formats by stage and unit, by the formula above."""
    longest = 0.0
    for pipeline, microbatches in enumerate(problem.microbatches):
        total = slowest = 0.0
        for run, chosen in zip(problem.stages, formats, strict=True):
            if run.pipeline != pipeline:
                continue
            time = sum(seconds[f] for seconds, f in zip(run.seconds, chosen, strict=True))
            pairs = zip(chosen, chosen[1:], run.cast_s[1:], strict=False)
            time += sum(cast_s for a, b, cast_s in pairs if held_in(a) != held_in(b))
            total += time
            slowest = max(slowest, time * run.most_microbatches / microbatches)
        longest = max(longest, total + (microbatches - 1) * slowest)
    return longest


def errors_of(problem: FormatProblem, formats: Sequence[Sequence[str]]) -> Errors:
    """The errors of a choice: for each unit the worst of its copies, their squares added up."""
    totals = []
    for kind in range(2):
        total = 0.0
        for unit, by_format in enumerate(problem.errors):
            alone = max(
                (
                    by_format[chosen[unit - run.first]][kind]
                    for run, chosen in zip(problem.stages, formats, strict=True)
                    if run.first <= unit < run.last and chosen[unit - run.first] in by_format
                ),
                default=0.0,
            )
            total += (problem.correction[kind] * alone) ** 2
        totals.append(math.sqrt(total))
    return totals[0], totals[1]
