"""Timings of this machine that are used again while it is as fast as it was."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

from graphpar.calibration import fingerprint
from graphpar.cost_models.measured import ModelTiming, StageTiming, load_timing, save_timing
from graphpar.neighbours import reference_s

Timed = TypeVar("Timed", ModelTiming, StageTiming)

_STEADY = 0.03
"""Timings are used again while a reference kernel takes what it took beside them, within this share."""


class NotTimedError(Exception):
    """Nothing could be timed; its text says why, as a plan will."""


TOO_LONG = "it would have taken longer than the {:g} s of `measure_s`"


def kept_or_fresh(threads: int, key: str, kind: type[Timed], time_it: Callable[[], Timed]) -> Timed:
    """What is kept under a key, if the machine is as fast as it was then; else timed anew, and kept.

    Args:
        threads: Threads of the workers that were, or will be, timed.
        key: A hash of what is timed and how.
        kind: What a timing is; one of its fields is `reference_s`.
        time_it: Times it; what it raises where that cannot be done is passed on, and nothing kept.
    """
    mine = fingerprint(threads)
    kept = load_timing(mine, key, kind)
    if kept is not None and abs(reference_s() / kept.reference_s - 1) <= _STEADY:
        return kept
    fresh = time_it()
    with contextlib.suppress(OSError):  # what cannot be kept is measured again
        save_timing(mine, key, fresh)
    return fresh
