"""Which lanes a still picture has room for, and which of their events can be told apart in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphpar.schedule import ActionKind
from graphpar.view.model import Lane, ViewData

_MOST_LANES = 40


@dataclass(frozen=True)
class Bar:
    """A stretch of one kind; `microbatch` is None where several events were joined."""

    kind: ActionKind
    start_s: float
    end_s: float
    microbatch: int | None


@dataclass(frozen=True)
class DrawnRow:
    """A rank that is drawn, and how many alike are not."""

    rank: int
    others: int


def drawn_rows(view: ViewData) -> tuple[list[DrawnRow], int]:
    """All ranks if they are few, else one of each stage and kind; and how many groups are left off."""
    if view.num_ranks <= _MOST_LANES:
        return [DrawnRow(rank, 0) for rank in range(view.num_ranks)], 0
    alike: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for rank, device in enumerate(view.devices[: view.num_ranks]):
        alike.setdefault((device.stages, device.kind), []).append(rank)
    groups = list(alike.values())
    return [DrawnRow(g[0], len(g) - 1) for g in groups[:_MOST_LANES]], max(0, len(groups) - _MOST_LANES)


def joined(lane: Lane, kinds: Sequence[ActionKind], narrowest_s: float) -> list[Bar]:
    """The events of some kinds; neighbours of one kind that are too narrow to tell are joined."""
    bars: list[Bar] = []
    for action, start_s, end_s in lane.events():
        if action.kind not in kinds or end_s <= start_s:
            continue
        last = bars[-1] if bars else None
        narrow = end_s - start_s < narrowest_s
        if last and narrow and action.kind == last.kind and start_s - last.end_s < narrowest_s:
            bars[-1] = Bar(last.kind, last.start_s, end_s, None)
        else:
            bars.append(Bar(action.kind, start_s, end_s, action.microbatch))
    return bars
