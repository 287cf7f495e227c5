"""The order of the stages of a pipeline that were counted: memory first, then neighbours in one node.

From the end of the pipeline stages stand by growing `due`, the most replicas that may follow (the
earliest due date rule). Who comes forward from there has more replicas behind it, all others have no
more. So after a stage that is to have a neighbour in its node one may follow that stands further back,
if its own due allows it: of the same kind, with room in the node, and in need of a neighbour itself.
"""

from dataclasses import dataclass

from graphpar.partition.counting_columns import BODY, FIRST, LAST
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


def line_up(stages: list[Placed], rank: IntArray) -> tuple[list[int], list[bool]]:
    """The order of stages, and for each of that order whether it joins the node of the one before.

    `rank` is an order that keeps memory: the places of the stages, the first stage of the pipeline first.
    """
    rest = rank.tolist()
    below = sum(stages[i].width for i in rest)
    order: list[int] = []
    joined: list[bool] = []
    free = 0
    while rest:
        place = _neighbour(stages, rest, order[-1], free, below) if order and free > 0 else None
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


def _neighbour(stages: list[Placed], rest: list[int], last: int, free: int, below: int) -> int | None:
    """The place of who follows in the node: the widest that fits, those with two neighbours first."""
    best: tuple[tuple[int, int], int] | None = None
    for place, index in enumerate(rest):
        stage = stages[index]
        if stage.cell != stages[last].cell or stage.inside == 0 or stage.devices > free:
            continue
        if (stage.role != BODY and place > 0) or stage.role == FIRST:
            continue
        if (stage.role == LAST and len(rest) > 1) or stage.due < below:
            continue
        key = (stage.inside == 2 and stage.devices < free, stage.devices)
        if best is None or key > best[0]:
            best = (key, place)
    return None if best is None else best[1]
