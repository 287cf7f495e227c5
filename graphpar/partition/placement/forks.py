"""Placements in which two accelerators work side by side, cut from a set that one does alone.

An accelerator's outputs leave it when all of its set is done, so two work at the same time only on parts
that do not wait for each other, each whole, with what comes before and after elsewhere. A single move of
local search is no step in that direction, since only all four together pay.
"""

from collections.abc import Iterator

from graphpar.partition.placement.reach import bits
from graphpar.partition.placement.units import Devices, Units

_MOST_PARTS = 6
"""Of more parts side by side the longest are shared out, the rest go with the first."""


def forks(units: Units, devices: Devices) -> Iterator[Devices]:
    """Copies of a placement with one accelerator's set cut where paths part and meet again.

    What comes before stays; what lies side by side goes to two unused accelerators, in all ways, and what
    comes after to a third one.
    """
    unused = [d for d in range(1, units.num_accelerators + 1) if d not in devices]
    if len(unused) < 3:
        return
    where = [devices[c] for c in units.class_of]
    before: list[int] = []
    for i, near in enumerate(units.before):
        own = 0
        for j in near:
            own |= before[j] | 1 << j
        before.append(own)
        parts, common = _side_by_side(units, before, i)
        held = {where[k] for part in parts for k in bits(part)}
        if len(parts) < 2 or len(held) != 1 or 0 in held:
            continue
        (mine,) = held
        between = 0
        for part in parts:
            between |= part
        for chosen in range(1 << min(len(parts), _MOST_PARTS) - 1):
            found = list(devices)
            for k in (k for k, d in enumerate(where) if d == mine and not common >> k & 1):
                first = not between >> k & 1
                side = next((n for n, part in enumerate(parts) if part >> k & 1), 0)
                found[units.class_of[k]] = unused[2 if first else chosen >> side & 1]
            yield found


def _side_by_side(units: Units, before: list[int], item: int) -> tuple[list[int], int]:
    """What lies before an item on paths that do not wait for each other, and what comes before them."""
    own = [before[j] | 1 << j for j in units.before[item]]
    if len(own) < 2:
        return [], 0
    common = own[0]
    for mask in own[1:]:
        common &= mask
    parts: list[int] = []
    for mask in (mask & ~common for mask in own):
        for part in [p for p in parts if p & mask]:
            parts.remove(part)
            mask |= part
        if mask:
            parts.append(mask)
    return parts, common
