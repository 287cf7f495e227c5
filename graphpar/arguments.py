"""Arguments of the public face that are numbers, or made by other calls: refused before any work."""

import contextlib
import math
import numbers
from collections.abc import Callable

from graphpar.calibration import Calibration


def check_limits(
    *, gap: object, time_limit_s: object, measure_s: object = 0.0, calibration: object = None
) -> None:
    """Refuse senseless limits of planning, and a calibration that is none.

    Raises:
        ValueError: Says which and what was given.

    >>> check_limits(gap="1 %", time_limit_s=60)
    Traceback (most recent call last):
    ...
    ValueError: gap must be in [0, 1), got '1 %'
    """
    check_number("gap", gap, "in [0, 1)", lambda x: 0 <= x < 1)
    check_number("time_limit_s", time_limit_s, "positive", lambda x: x > 0)
    check_number("measure_s", measure_s, "zero or more seconds", lambda x: x >= 0)
    if not isinstance(calibration, Calibration | None):
        kind = type(calibration).__name__
        raise ValueError(f"calibration= takes what graphpar.calibrate() gives, not a {kind}")


def check_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    """Refuse what is no number, or one that a rule forbids, also given in words; NaN breaks every rule.

    Raises:
        ValueError: Says which and what was given.
    """
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not holds(number):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def whole_number(name: str, value: object, rule: str, holds: Callable[[int], bool]) -> int:
    """A whole number as an int; what is none, or forbidden by a rule in words, is refused.

    Raises:
        ValueError: Says which and what was given.

    >>> whole_number("processes", 2.0, "a whole number of at least 1", lambda n: n >= 1)
    Traceback (most recent call last):
    ...
    ValueError: processes must be a whole number of at least 1, got 2.0
    """
    number = None if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)
    if number is None or not holds(number):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number
