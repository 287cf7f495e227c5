"""How the stages of the counting programme may be staffed."""

from functools import cache

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, StageOption, pareto

_EQUAL_PARTS = (1, 2)
"""All devices of a kind may be one stage, or two equally wide ones."""


def counting_options(table: CostTable, cells: Cells, max_width: int) -> list[StageOption]:
    """Stages of interchangeable replicas, in widths 1 to 4 and then in steps of at most a half.

    And in those widths of which one or two use up all devices of a kind.

    Replicas are devices or tensor groups of one class, which stand inside a node unless the network is
    as good as the link their price holds for.
    """
    options: list[StageOption] = []
    placed: dict[tuple[int, int, int], StageOption] = {}
    for index, cell in enumerate(cells.cells):
        for number, mode in enumerate(table.every_mode):
            if set(mode.members) != {cell.device_class}:
                continue
            most = cells.groups(index, mode)
            whole = {most // parts for parts in _EQUAL_PARTS} - {0}
            for width in sorted({*widths(min(most, max_width)), *(w for w in whole if w <= max_width)}):
                if width == 1 and mode.zero > 0:
                    continue
                where = index, len(mode.members), width
                if where not in placed:
                    placed[where] = _option(cells, index, number, len(mode.members), width)
                options.append(_in_mode(placed[where], number))
    return options


def _in_mode(option: StageOption, mode: int) -> StageOption:
    """The same devices in another mode."""
    return StageOption(
        option.take,
        option.places,
        option.ring,
        (mode,) * option.width,
        option.groups,
        option.sides,
    )


def node_group(table: CostTable, cells: Cells, option: StageOption) -> int:
    """Devices that must stand in one node."""
    free = cells.stands_anywhere(option.groups[0][0], table.every_mode[option.staff[0]])
    return 1 if free else len(option.groups[0])


def _option(cells: Cells, index: int, mode: int, group: int, width: int) -> StageOption:
    """A stage of one class: links inside a node as long as a node has room.

    With more replicas than nodes two of them share one, and exchange over the links inside as well. With
    more devices than any zone of nodes has two replicas exchange over a link between zones: where two
    devices in unlike zones are of one replica, those of another one are in another zone than either.
    """
    devices = group * width
    size, place = cells.node_sizes[index], cells.cells[index].place
    inside, network = cells.links[place][place], cells.links[-1][0]
    ring = [inside] if devices <= size else [network]
    ring += [inside] if width > len(cells.rooms[index]) else []
    ring += [link for most, link in cells.beyond[index] if devices > most] if cells.beyond else []
    near = (inside, network) if devices < size else (network,)
    return StageOption(
        take=tuple(devices if i == index else 0 for i in range(len(cells.counts))),
        places=frozenset({place}),
        ring=frozenset() if width == 1 else pareto(k for k in ring if k is not None),
        staff=(mode,) * width,
        groups=((index,) * group,) * width,
        sides=tuple(dict.fromkeys(frozenset({k}) for k in near if k is not None)),
    )


@cache
def widths(most: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to the given number.

    >>> widths(20)
    (1, 2, 3, 4, 6, 8, 12, 16)
    """
    found = {p * f // 2 for p in (2**i for i in range(1, 32)) for f in (1, 2, 3)}
    return tuple(sorted(w for w in found if w <= most))
