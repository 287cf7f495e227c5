"""Lower bounds on a placement's latency along paths.

Along a path an accelerator's items are consecutive (its set is contiguous), and it takes at
least the work of all that contiguity makes it hold with them (`reach`) plus the transfers over the
path's edges at both ends. The best way to do just one path is a small dynamic programme over its prefixes
and the accelerators used.
"""

import contextlib
import itertools
import math

import numpy as np

from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.placement.reach import Held, Reach, bits
from graphpar.partition.placement.units import Units

_NUM_PATHS = 24
"""Long paths looked at."""

_PLACES_PER_LOOK = 16
"""Places of a path between two looks at the clock."""


def path_bound(reach: Reach, should_stop: ShouldStop = never) -> float:
    """The best latency that some one path allows, of as many as there is time for."""
    bound = _least_bound(reach.units)
    with contextlib.suppress(OutOfTimeError):
        for path in long_paths(reach.units):
            bound = max(bound, _one_path_bound(reach, path, should_stop))
    return bound


def _least_bound(units: Units) -> float:
    """The longest path, each item where it is fastest and nothing moved: takes no time."""
    work = np.where(np.isfinite(units.accelerator[list(units.class_of)]), units.work, np.inf)
    fastest = np.minimum(units.cpu, work if units.num_accelerators else np.inf)
    length: list[float] = []
    for i, before in enumerate(units.before):
        length.append(float(fastest[i]) + max((length[j] for j in before), default=0.0))
    return max(length, default=0.0)


def _one_path_bound(reach: Reach, path: list[int], should_stop: ShouldStop) -> float:
    units = reach.units
    # Transfers count only where a class ends with the set, so the ends are on different devices.
    steps = [0.0, *(units.sends[edge] for edge in itertools.pairwise(path)), 0.0]
    place = {item: k for k, item in enumerate(path, start=1)}
    on_path = sum(1 << item for item in path)
    least = np.full((len(path) + 1, units.num_accelerators + 1), np.inf)
    least[0] = 0.0
    for i, item in enumerate(path, start=1):
        if i % _PLACES_PER_LOOK == 0 and should_stop():
            raise OutOfTimeError
        least[i] = least[i - 1] + units.cpu[item]
        held, begin = Held(reach), i
        later = sum(1 << late for late in path[i:])
        for j in range(i, 0, -1):
            earlier = held.items
            held.take([units.class_of[path[j - 1]]])
            if held.items & later or not math.isfinite(held.work):
                break
            if held.size > units.memory_limit * (1 + 1e-12):
                break
            begin = min([begin, *(place[k] for k in bits(held.items & ~earlier & on_path))])
            if begin == j:
                there = least[j - 1, :-1] + held.work + steps[j - 1] + steps[i]
                least[i, 1:] = np.minimum(least[i, 1:], there)
    return float(least[-1].min())


def long_paths(units: Units) -> list[list[int]]:
    """Paths that between them visit much of the work: longest first, then least seen."""
    with np.errstate(over="ignore"):  # what is as long as that is on the first path in any case
        weight = np.where(np.isfinite(units.cpu), units.cpu, 0.0) + units.work
    paths: list[list[int]] = []
    for _ in range(_NUM_PATHS):
        length: list[float] = []
        for i, before in enumerate(units.before):
            length.append(float(weight[i]) + max((length[j] for j in before), default=0.0))
        item = max(range(len(length)), key=lambda i: length[i])
        path = [item]
        while units.before[item]:
            item = max(units.before[item], key=lambda j: length[j])
            path.append(item)
        if path[::-1] in paths:
            break
        paths.append(path[::-1])
        weight[path] *= 0.5
    return paths
