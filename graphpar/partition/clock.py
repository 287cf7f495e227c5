"""Loops that look at the clock, and the clock of work."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

ItemT = TypeVar("ItemT")
ShouldStop: TypeAlias = Callable[[], bool]

_ITEMS_PER_LOOK = 256


_elsewhere = threading.local()


class OutOfTimeError(Exception):
    """A step was cut short; what it was building is of no use, what was there before still is."""


def never() -> bool:
    """The clock of a caller who waits."""
    return False


def work_s() -> float:
    """Processor time of the calling thread, and of others that ran for it, in seconds."""
    return time.thread_time() + float(getattr(_elsewhere, "work_s", 0.0))


def note_work_elsewhere(seconds: float) -> None:
    """Another thread ran for so long for the calling one, which waited."""
    _elsewhere.work_s = getattr(_elsewhere, "work_s", 0.0) + seconds


def in_time(items: Iterable[ItemT], should_stop: ShouldStop) -> Iterator[ItemT]:
    """The items; raises OutOfTimeError once it is time to stop.

    >>> list(in_time("ab", never))
    ['a', 'b']
    """
    for place, item in enumerate(items):
        if place % _ITEMS_PER_LOOK == 0 and should_stop():
            raise OutOfTimeError
        yield item
