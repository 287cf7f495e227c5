"""How planning shares out its time limit: for the search, for other orders of work, for saying why.

Capturing the model, pricing it and playing the chosen plan through are outside of the limit: without
them there is nothing to search, or no plan.
"""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

Spends = Callable[..., T]
"""What takes `time_limit_s` at most, or little more."""

_SEARCH_SHARE = 0.95
"""Of the limit, for searches; one is enough but where number formats are chosen or quarrel."""

BRIEF_S, _BRIEF_SHARE = 1.0, 0.5
"""Of a shorter limit than this half: there orders of work bring more than the rest of the search."""

_LEAST_SHARE = 0.1
"""Of the limit at least, for other orders of work, and for a second search and each one after it."""

_MOST_SHARE = 1.1
"""Of the limit, when all is over."""


class PlanTime:
    """What is left of a limit in seconds, as parts of planning spend it, in `plan` and for a scenario.

    >>> clock, told = PlanTime(10.0), lambda time_limit_s: time_limit_s
    >>> clock.search(told), clock.choose(told, 3.0)
    (9.5, 3.0)
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._spent_s = limit_s, 0.0

    def search(self, find: Spends[T]) -> T:
        """Search for a plan."""
        share = _BRIEF_SHARE if self._limit_s < BRIEF_S else _SEARCH_SHARE
        left_s = share * self._limit_s - self._spent_s
        return self._spend(find, max(left_s, _LEAST_SHARE * self._limit_s))

    def choose(self, choose: Spends[T], most_s: float) -> T:
        """Try other ways for a limit twice, `most_s` or less each."""
        left_s = max(self._limit_s - self._spent_s, _LEAST_SHARE * self._limit_s)
        return self._spend(choose, min(most_s, left_s / 2))

    def explain(self, explain: Spends[T], most_s: float) -> T:
        """Say why, in `most_s` or less."""
        left_s = max(_MOST_SHARE * self._limit_s - self._spent_s, 0.0)
        return self._spend(explain, min(most_s, left_s))

    def _spend(self, work: Spends[T], limit_s: float) -> T:
        began_s = time.monotonic()
        try:
            return work(time_limit_s=limit_s)
        finally:
            self._spent_s += time.monotonic() - began_s
