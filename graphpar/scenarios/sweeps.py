"""Sweeps over one or two settings, and the knee of the curve they draw."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from graphpar.scenarios.asked import items_of, texts_of
from graphpar.scenarios.types import Answer, Scenario

KNEE = 0.5
"""Past the knee, 1 % more of the swept thing gives less than half a per cent of throughput."""

MOST_POINTS = 1000
"""More would take many minutes, and as long to compare with each other."""

_ROUNDING = 1e-9

WIDTHS = ("tp", "pp", "dp", "m")
"""What a configuration made by hand consists of; swept like any path."""


@dataclass(frozen=True)
class Sweep:
    """Values to set one path to.

    >>> Sweep.parse("batch=8,16")
    Sweep(path='batch', values=('8', '16'))
    """

    path: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """From words such as `network.bytes_per_s=1e9,10e9`; ValueError otherwise."""
        path, sign, values = text.partition("=")
        found = tuple(v.strip() for v in values.split(",") if v.strip())
        if not sign or not path.strip() or not found:
            raise ValueError(f"sweep {text!r} is not understood; write PATH=VALUE,VALUE,...")
        return cls(path.strip(), found)


def as_sweeps(given: Mapping[str, Sequence[object]] | Sequence[str]) -> tuple[Sweep, ...]:
    """Sweeps from a dict of values by path, or from words; ValueError for more than two."""
    if isinstance(given, Mapping):
        sweeps = tuple(_of_values(path, values) for path, values in given.items())
    else:
        texts = texts_of((given,) if isinstance(given, str) else given)
        if texts is None:
            raise ValueError(
                "sweep= takes a dict of a path to its values, or words such as 'batch=8,16', not "
                f"{given!r}"
            )
        sweeps = tuple(Sweep.parse(text) for text in texts)
    for sweep in sweeps:
        _check_values(sweep)
    if (number := prod(len(sweep.values) for sweep in sweeps)) > MOST_POINTS:
        raise ValueError(
            f"the sweep has {number} points, and at most {MOST_POINTS} are planned at once; each takes "
            "about half a second of processor time. Sweep fewer values, or in parts: answers are kept"
        )
    if len(sweeps) > 2:
        raise ValueError(f"a sweep is over one or two things, not {len(sweeps)}")
    if len({sweep.path for sweep in sweeps}) < len(sweeps):
        raise ValueError(f"both sweeps are over {sweeps[0].path}; give all its values in one of them")
    return sweeps


def _of_values(path: object, values: object) -> Sweep:
    """
    Raises:
        ValueError: There is no path, or nothing to set it to.
    """
    if isinstance(path, str) and isinstance(values, str):
        return Sweep.parse(f"{path}={values}")
    found = items_of(values)
    if not isinstance(path, str) or found is None:
        raise ValueError(
            "sweep= takes a dict of a path to its values, such as {'batch': [8, 16]}, not "
            f"{{{path!r}: {values!r}}}"
        )
    return Sweep(path, tuple(_written(value) for value in found))


def _check_values(sweep: Sweep) -> None:
    """
    Raises:
        ValueError: There are no values, or one of them twice.
    """
    if not sweep.values:
        raise ValueError(f"the sweep over {sweep.path} has no values")
    twice = [value for value, number in Counter(sweep.values).items() if number > 1]
    if twice:
        raise ValueError(f"the sweep over {sweep.path} has {twice[0]} twice; leave one out")


def _written(value: object) -> str:
    """A value as it would be written; no digit of it is lost.

    >>> _written(25e9), _written(1234567.5), _written(8)
    ('2.5e+10', '1234567.5', '8')
    """
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def scenarios_of(sweeps: Sequence[Sweep]) -> tuple[Scenario, ...]:
    """One scenario per combination of values, the last sweep's values running fastest.

    >>> [s.changes for s in scenarios_of([Sweep("batch", ("8",)), Sweep("tp", ("1", "2"))])]
    [('set batch=8', 'tp=1'), ('set batch=8', 'tp=2')]
    """
    if not sweeps:
        return ()
    paths = [sweep.path for sweep in sweeps]
    rows = itertools.product(*(sweep.values for sweep in sweeps))
    return tuple(
        _point([f"{path}={value}" for path, value in zip(paths, row, strict=True)]) for row in rows
    )


def _point(settings: Sequence[str]) -> Scenario:
    """Widths of a configuration make one change together; everything else is set on its own."""
    widths = [text for text in settings if text.partition("=")[0] in WIDTHS]
    changes = [f"set {text}" for text in settings if text not in widths]
    return Scenario(", ".join(settings), (*changes, *([" ".join(widths)] if widths else [])))


def knee(values: Sequence[float], answers: Sequence[Answer]) -> float | None:
    """The value after which more of it brings little: the knee of the scaling curve.

    None where the curve has no such point among the values, where more of it does harm (a latency) or
    makes no difference at all, or where too few of them are answered. A later rise counts: every point
    beyond must bring little.

    >>> def at(rate): return Answer("", step_s=1 / rate, batch=1)
    >>> knee([1, 2, 4, 8], [at(1.0), at(2.0), at(3.9), at(4.1)])
    4
    >>> knee([1e-6, 1e-5, 1e-4], [at(3.0), at(2.9), at(2.0)]) is None
    True
    >>> knee([0, 1e-6, 1e-5, 1e-4], [at(3.0)] * 4) is None
    True
    """
    points = sorted(
        (value, answer.samples_per_s)
        for value, answer in zip(values, answers, strict=True)
        if answer.status == "ok" and answer.samples_per_s
    )
    if len(points) < 3 or points[-1][1] <= points[0][1] * (1 + _ROUNDING):
        return None
    for i, (low, slow) in enumerate(points[:-1]):
        beyond = [(high, fast) for high, fast in points[i + 1 :] if high > low > 0]
        if beyond and all(fast / slow < (high / low) ** KNEE for high, fast in beyond):
            return low
    return None
