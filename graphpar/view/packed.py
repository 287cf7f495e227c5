"""Timelines in few bytes, for a page that holds hundreds of thousands of events.

Times become whole ticks, everything becomes differences, differences become variable-length
numbers (LEB128, 7 bits a byte), three columns of them are deflated and written in base64. The page
unpacks them (`unpack` of templates/base.js).
"""

import base64
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphpar.schedule import KINDS
from graphpar.view.model import Lane, ViewTimeline

_TICKS = 2**22
"""Ticks per step: finer than a pixel at a zoom of a thousand."""

_KIND_BITS = 4
_NO_MICROBATCH = -1


@dataclass(frozen=True)
class PackedTimeline:
    """A timeline whose events are packed.

    Attributes:
        step_s: Length of the step.
        planned_batch: Whether microbatches are those of the plan.
        tick_s: Length of one tick.
        counts: For each lane its number of events.
        stopped: Ranks that did not finish.
        sizes: Bytes of the three columns: codes, starts, durations.
        data: The deflated columns in base64.
    """

    step_s: float
    note: str
    planned_batch: bool
    tick_s: float
    counts: tuple[int, ...]
    stopped: tuple[int, ...]
    sizes: tuple[int, int, int]
    data: str


def pack(timeline: ViewTimeline, stages_of: Sequence[Sequence[int]]) -> PackedTimeline:
    """Pack a timeline; receives that wait for less than a tick are left out.

    `stages_of` are the stages of each rank; only where there are several they take room.
    """
    tick_s = timeline.step_s / _TICKS or 1.0
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    counts = []
    for lane in timeline.lanes:
        before = len(columns[0])
        _append(columns, lane, tick_s, stages_of[lane.rank])
        counts.append(len(columns[0]) - before)
    packed = [_varints(column) for column in columns]
    return PackedTimeline(
        step_s=timeline.step_s,
        note=timeline.note,
        planned_batch=timeline.planned_batch,
        tick_s=tick_s,
        counts=tuple(counts),
        stopped=tuple(lane.rank for lane in timeline.lanes if lane.stopped),
        sizes=(len(packed[0]), len(packed[1]), len(packed[2])),
        data=base64.b64encode(zlib.compress(b"".join(packed), 9)).decode("ascii"),
    )


def _append(
    columns: tuple[list[int], list[int], list[int]], lane: Lane, tick_s: float, stages: Sequence[int]
) -> None:
    """Microbatches count from the last of the same kind, starts from the last on the same track."""
    codes, starts, durations = columns
    last_microbatch = dict.fromkeys(KINDS, _NO_MICROBATCH)
    last_start = {True: 0, False: 0}
    for action, start_s, end_s in lane.events():
        kind, sends = action.kind, action.kind in "SD"
        start, end = round(start_s / tick_s), round(end_s / tick_s)
        if kind in "RG" and end == start:
            continue
        microbatch = _NO_MICROBATCH if action.microbatch is None else action.microbatch
        step = microbatch - last_microbatch[kind]
        which = _zigzag(step) * len(stages) + stages.index(action.stage)
        codes.append(which << _KIND_BITS | KINDS.index(kind))
        starts.append(_zigzag(start - last_start[sends]))
        durations.append(max(0, end - start))
        last_microbatch[kind], last_start[sends] = microbatch, start


def _zigzag(number: int) -> int:
    """Signed to unsigned, small to small."""
    return number * 2 if number >= 0 else -number * 2 - 1


def _varints(numbers: Iterable[int]) -> bytes:
    out = bytearray()
    for number in numbers:
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        out.append(number)
    return bytes(out)
