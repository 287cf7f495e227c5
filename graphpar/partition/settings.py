"""What a caller may fix about a plan, and the microbatch counts that are tried."""

from typing import Literal

from graphpar.cost import CostTable
from graphpar.partition.types import SearchedSchedule

Microbatches = int | Literal["auto"]
ScheduleChoice = Literal["auto", "gpipe", "1f1b"]
ScheduleWish = Literal["auto", "gpipe", "1f1b", "interleaved", "zero-bubble"]
"""What may be asked for; the last two are chosen on the stages of a partition that was searched for."""


def searched(wish: ScheduleWish) -> ScheduleChoice:
    """What is searched for where something is wished for.

    >>> searched("zero-bubble"), searched("auto")
    ('1f1b', 'auto')
    """
    return "1f1b" if wish in ("interleaved", "zero-bubble") else wish  # type: ignore[return-value]


EVERY_LEVEL = (1, 2, 3)
"""ZeRO levels that may be proposed."""

SMALL_BATCH = 16
"""Up to this many samples every microbatch count is tried."""


def schedules_of(table: CostTable, schedule: ScheduleChoice) -> tuple[SearchedSchedule, ...]:
    """The schedules of training that are tried: what is asked for, as far as the model allows it."""
    if table.tail_reason:
        return ("gpipe",)
    return ("1f1b", "gpipe") if schedule == "auto" else (schedule,)


def microbatch_counts(table: CostTable, samples: int, microbatches: Microbatches) -> list[int]:
    """The microbatch counts tried for a share of the batch, increasing.

    All of them for few samples; else the small ones and those that give a whole microbatch size.
    """
    most = min(samples, table.max_microbatches)
    if microbatches != "auto":
        return [microbatches] if microbatches <= most else []
    small = range(1, min(most, SMALL_BATCH) + 1)
    sizes = {*table.sizes, *range(1, 9), *(d for d in range(1, samples + 1) if samples % d == 0)}
    return sorted({*small, *(n for s in sizes if (n := -(-samples // s)) <= most)})
