"""The ILP of a placement's latency.

With x[c, d] = 1 if class c is on device d (0 the CPUs), e[i] the end of item i, s[d] and f[d] start
and end of accelerator d, and for each bundle q of outputs m[q, d] = 1 if it enters or leaves d:

    minimise T >= e[i],  T >= f[d]
    f[d] = s[d] + sum_c acc[c] x[c, d] + sum_q cost[q] m[q, d]                         (load)
    e[i] >= e[j] + cpu[i] x[c(i), 0]                          for every edge (j, i)    (wait)
    e[i] >= f[d] - M (1 - x[c(i), d])                                                  (end)
    s[d] >= e[j] - M (1 - x[c(i), d] + x[c(j), d])            for every edge (j, i)    (begin)
    m[q, d] >= x[a, d] - x[b, d]                              for classes a, b of q    (move)
    sum_c size[c] x[c, d] <= memory                                                    (memory)
    s[d] <= s[d + 1]                                                                   (order)
    sum_(d' <= d) x[c(i), d'] <= x[c(j), 0] + sum_(d' <= d) x[c(j), d']  for every edge (j, i)  (follow)
    T >= work of any one path, each item where it is          for some long paths      (path)

A path that leaves an accelerator and comes back would have it wait for itself, so contiguity needs no
rows; M is the best latency known, which every better answer's times stay below. Times beyond 2 M count
as 2 M: they exclude as much, and a solver's tolerances are relative to M. Accelerators are alike and can
be numbered in the order in which they start, in which none waits for a later one.
"""

import math
from dataclasses import replace

import numpy as np

from graphpar.partition.placement.graph import FloatArray
from graphpar.partition.placement.paths import long_paths
from graphpar.partition.placement.units import Devices, Units
from graphpar.partition.solver import Program, Term, Variable

_MOST_ROWS = 60_000
"""Rows up to which writing the programme down takes a few seconds."""


def is_worth_writing(units: Units) -> bool:
    """Whether the programme is small enough to be of use."""
    edges = sum(map(len, units.before)) + units.num_items
    ends = sum(len(ends) for ends, _ in units.bundles)
    return (2 * edges + ends) * units.num_accelerators <= _MOST_ROWS


class LatencyProgram:
    """The ILP of this module's text; `best` is the latency that counts as beaten."""

    def __init__(self, units: Units, best: float, bound: float) -> None:
        self.program = Program("latency")
        self._units = units = _capped(units, 2.0 * best)
        self._num = units.num_accelerators
        cpu = units.cpu[[math.isfinite(t) for t in units.cpu]].sum()
        worst = float(cpu + units.work.sum()) + 2 * sum(cost * len(ends) for ends, cost in units.bundles)
        self._horizon = best if math.isfinite(best) else worst
        latest = self._horizon
        self.latest = self.program.continuous("T", min(bound, latest), latest)
        self.on = [
            [self.program.binary(f"x{c}.{d}") for d in range(self._num + 1)]
            for c in range(units.num_classes)
        ]
        self.end = [self.program.continuous(f"e{i}", 0.0, latest) for i in range(units.num_items)]
        self.start = [self.program.continuous(f"s{d}", 0.0, latest) for d in range(self._num + 1)]
        self.finish = [self.program.continuous(f"f{d}", 0.0, latest) for d in range(self._num + 1)]
        self._assign()
        self._time_cpus()
        self._time_accelerators()
        self._cover_paths()
        self.program.minimize([(1.0, self.latest)])

    def devices(self, values: FloatArray) -> Devices:
        """The device of each class in a solution."""
        return [max(range(self._num + 1), key=lambda d: values[row[d].index]) for row in self.on]

    def _row(self, item: int) -> list[Variable]:
        return self.on[self._units.class_of[item]]

    def _edges(self) -> list[tuple[int, int]]:
        return [(j, i) for i, before in enumerate(self._units.before) for j in before]

    def _assign(self) -> None:
        units = self._units
        for row, items, work in zip(self.on, units.items, units.accelerator, strict=True):
            self.program.constrain([(1.0, x) for x in row], "==", 1.0, "one")
            if not all(math.isfinite(units.cpu[i]) for i in items):
                self.program.fix(row[0], 0.0)
            if not math.isfinite(work):
                for x in row[1:]:
                    self.program.fix(x, 0.0)
        limit = units.memory_limit
        for d in range(1, self._num + 1):
            # What does not fit is kept out above; shares of the limit are of a size that tolerances suit.
            fitting = [
                (float(size) / limit if limit else 0.0, row[d])
                for size, row in zip(units.size, self.on, strict=True)
                if size <= 2.0 * limit
            ]
            self.program.constrain(fitting, "<=", 1.0, "memory")
            if d > 1:
                self.program.constrain(
                    [(1.0, self.start[d]), (-1.0, self.start[d - 1])], ">=", 0.0, "order"
                )
        for j, i in self._edges():
            if units.class_of[i] != units.class_of[j]:
                self._follow(self._row(j), self._row(i))

    def _follow(self, earlier: list[Variable], later: list[Variable]) -> None:
        for d in range(1, self._num):
            terms: list[Term] = [(1.0, x) for x in earlier[: d + 1]]
            self.program.constrain([*terms, *((-1.0, x) for x in later[1 : d + 1])], ">=", 0.0, "follow")

    def _time_cpus(self) -> None:
        for i, end in enumerate(self.end):
            self.program.constrain([(1.0, self.latest), (-1.0, end)], ">=", 0.0, "last")
            own = float(self._units.cpu[i]) if math.isfinite(self._units.cpu[i]) else 0.0
            before: list[list[Term]] = [[(-1.0, self.end[j])] for j in self._units.before[i]]
            for terms in before or [[]]:
                self.program.constrain([(1.0, end), (-own, self._row(i)[0]), *terms], ">=", 0.0, "wait")

    def _time_accelerators(self) -> None:
        units, big = self._units, self._horizon
        for d in range(1, self._num + 1):
            load: list[Term] = [
                (float(work), row[d])
                for work, row in zip(units.accelerator, self.on, strict=True)
                if math.isfinite(work)
            ]
            load.extend((cost, self._moved(ends, d)) for ends, cost in units.bundles)
            terms = [(1.0, self.finish[d]), (-1.0, self.start[d]), *((-w, v) for w, v in load)]
            self.program.constrain(terms, "==", 0.0, "load")
            self.program.constrain([(1.0, self.latest), (-1.0, self.finish[d])], ">=", 0.0, "last")
            for i, end in enumerate(self.end):
                self.program.constrain(
                    [(1.0, end), (-1.0, self.finish[d]), (-big, self._row(i)[d])], ">=", -big, "end"
                )
            for j, i in self._edges():
                if units.class_of[i] != units.class_of[j]:
                    taken: list[Term] = [(-big, self._row(i)[d]), (big, self._row(j)[d])]
                    begin: list[Term] = [(1.0, self.start[d]), (-1.0, self.end[j])]
                    self.program.constrain([*begin, *taken], ">=", -big, "begin")

    def _moved(self, ends: tuple[int, ...], d: int) -> Variable:
        moved = self.program.continuous("m", 0.0, 1.0)
        for a, b in zip(ends, ends[1:] + ends[:1], strict=True):
            self.program.constrain(
                [(1.0, moved), (-1.0, self.on[a][d]), (1.0, self.on[b][d])], ">=", 0.0, "move"
            )
        return moved

    def _cover_paths(self) -> None:
        units = self._units
        for path in long_paths(units):
            terms: list[Term] = [(1.0, self.latest)]
            for i in path:
                if math.isfinite(units.cpu[i]):
                    terms.append((-float(units.cpu[i]), self._row(i)[0]))
                if math.isfinite(units.accelerator[units.class_of[i]]):
                    terms.extend((-float(units.work[i]), x) for x in self._row(i)[1:])
            self.program.constrain(terms, ">=", 0.0, "path")


def _capped(units: Units, most: float) -> Units:
    """Units whose times are at most `most`; infinite ones stay."""

    def cap(times: FloatArray) -> FloatArray:
        return np.where(np.isfinite(times), np.minimum(times, most), times)

    return replace(
        units,
        cpu=cap(units.cpu),
        work=cap(units.work),
        accelerator=cap(units.accelerator),
        bundles=tuple((ends, min(cost, most)) for ends, cost in units.bundles),
    )
