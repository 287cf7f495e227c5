"""The order of the stages of a pipeline that were counted: memory first, then neighbours in one node.

From the end of the pipeline stages stand by growing `due`, the most replicas that may follow (the
earliest due date rule). Who comes forward from there has more replicas behind it, all others have no
more. So after a stage that is to have a neighbour in its node one may follow that stands further back,
if its own due allows it: of the same kind, with room in the node, and in need of a neighbour itself.
Which of those is a matter of how well nodes are filled. There are several ways to choose, all quick; the
one that leaves fewest stages without the neighbours they were counted with is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from graphpar.partition.counting.columns import BODY, FIRST, LAST
from graphpar.partition.unit_arrays import IntArray


@dataclass(frozen=True)
class Placed:
    """A stage to line up.

    `inside` is how many of its boundaries stay inside a node, `room` how many devices that node has.
    """

    role: int
    cell: int
    devices: int
    width: int
    due: int
    inside: int
    room: int


Way = Callable[[Placed, int], tuple[bool | int, ...]]
"""Whom to prefer: a key of a candidate and of the devices that are free in the node."""


def _fills(stage: Placed, free: int) -> bool:
    """Whether as many devices as the node then has in use divide the node."""
    return stage.room % (stage.room - free + stage.devices) == 0


_WAYS: tuple[Way, ...] = (
    # The widest that fits, those with two neighbours first.
    lambda stage, free: (stage.inside == 2 and stage.devices < free, stage.devices),
    lambda stage, free: (stage.inside == 2 and stage.devices < free, _fills(stage, free), stage.devices),
    lambda stage, free: (_fills(stage, free), stage.inside == 2 and stage.devices < free, stage.devices),
)


def line_up(
    stages: list[Placed], rank: IntArray, rooms: Sequence[Sequence[int]] = ()
) -> tuple[list[int], list[bool]]:
    """The order of stages, and for each of that order whether it joins the node of the one before.

    `rank` is an order that keeps memory: the places of the stages, the first stage of the pipeline first.
    `rooms` are the devices of each cell by node.
    """
    best: tuple[int, tuple[list[int], list[bool]]] | None = None
    for way in _WAYS:
        line = _line_up(stages, rank, way)
        alone = _left_alone([stages[i] for i in line[0]], line[1], rooms)
        if best is None or alone < best[0]:
            best = alone, line
        if alone == 0:
            break
    assert best is not None
    return best[1]


def _left_alone(line: list[Placed], joined: list[bool], rooms: Sequence[Sequence[int]]) -> int:
    """Boundaries that were to stay inside a node and do not, where stages take nodes as they will.

    The largest first, as devices are named (`assign`): stages beyond a node, those of large groups, runs.
    """
    begins = [i for i, joins in enumerate(joined) if not joins]
    runs = [line[a:b] for a, b in pairwise([*begins, len(line)])]
    missing = sum(stage.inside for stage in line) - 2 * sum(joined)
    free = [list(own) for own in rooms]

    def urgency(run: list[Placed]) -> tuple[int, int, int]:
        devices = sum(s.devices for s in run)
        beyond = max(max(0, s.devices - s.room) for s in run)
        return -beyond, -max(s.devices // s.width for s in run), -devices * (len(run) > 1)

    for run in sorted(runs, key=urgency) if rooms else ():
        own, devices = free[run[0].cell], sum(s.devices for s in run)
        fitting = [i for i, room in enumerate(own) if room >= devices]
        if fitting:
            own[min(fitting, key=own.__getitem__)] -= devices
            continue
        missing += 2 * (len(run) - 1)
        for node in sorted(range(len(own)), key=lambda i: -own[i]):
            taken = min(own[node], devices)
            own[node], devices = own[node] - taken, devices - taken
    return missing


def _line_up(stages: list[Placed], rank: IntArray, way: Way) -> tuple[list[int], list[bool]]:
    rest = rank.tolist()
    below = sum(stages[i].width for i in rest)
    order: list[int] = []
    joined: list[bool] = []
    free = 0
    while rest:
        place = _neighbour(stages, rest, (order[-1], free, below), way) if order and free > 0 else None
        joined.append(place is not None)
        chosen = rest.pop(place or 0)
        stage = stages[chosen]
        free = (free if joined[-1] else stage.room) - stage.devices
        # A boundary to each side: the one behind is inside if more are wanted than the one ahead.
        if stage.inside <= int(joined[-1]):
            free = 0
        order.append(chosen)
        below -= stage.width
    return order, joined


def _neighbour(stages: list[Placed], rest: list[int], at: tuple[int, int, int], way: Way) -> int | None:
    """The place of who follows in the node; `at`: the last stage, devices free there, replicas below."""
    last, free, below = at
    best: tuple[tuple[bool | int, ...], int] | None = None
    for place, index in enumerate(rest):
        stage = stages[index]
        if stage.cell != stages[last].cell or stage.inside == 0 or stage.devices > free:
            continue
        if (stage.role != BODY and place > 0) or stage.role == FIRST:
            continue
        if (stage.role == LAST and len(rest) > 1) or stage.due < below:
            continue
        key = way(stage, free)
        if best is None or key > best[0]:
            best = (key, place)
    return None if best is None else best[1]
