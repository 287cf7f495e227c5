"""The loops of `sets`, compiled: cheapest chains of stages, by units, links and the devices behind.

Places on the way are numbered as in `path_loops`. A *group* are columns of the same devices on the same
slot that as many replicas may follow: the cheapest of them speaks for all.
"""

import numpy as np

from graphpar.partition.jit import compiled_exactly
from graphpar.partition.unit_arrays import FloatArray, IntArray


@compiled_exactly
def group_columns(
    slot: IntArray, team: IntArray, most: IntArray, teams: int, levels: int
) -> tuple[IntArray, IntArray]:
    """The group of each column, and of each group its first column; columns come by slot."""
    known = np.full(teams * levels, -1, dtype=np.intp)
    group, first = np.empty(len(slot), dtype=np.intp), np.empty(len(slot), dtype=np.intp)
    count, begin = 0, 0
    for c in range(len(slot)):
        if slot[c] != slot[begin]:
            for other in range(begin, c):
                known[team[other] * levels + most[other]] = -1
            begin = c
        place = team[c] * levels + most[c]
        if known[place] < 0:
            known[place] = first[count] = c
            group[c] = count
            count += 1
        else:
            group[c] = group[known[place]]
    return group, first[:count]


@compiled_exactly
def below_target(
    columns: tuple[IntArray, FloatArray, FloatArray],
    group: IntArray,
    groups: tuple[IntArray, IntArray, IntArray, IntArray],
    sets: tuple[IntArray, IntArray, IntArray, IntArray],
    sizes: tuple[int, int, int],
    target: float,
) -> tuple[float, IntArray, FloatArray]:
    """What the cheapest chain of some columns costs, which of them are in one below the target, and
    what the other stages of a chain through each of these cost at least.

    Args:
        columns: Which there are, what each costs, and what chains with it cost more, by column.
        group: By column its group.
        groups: Places before and after each, its team, and the most replicas that may be behind it; by
            first unit.
        sets: Sets of devices that may be behind a team, with fewer replicas first; where those of each
            team begin; by how much the number of a set rises with a team; the replicas of sets.
        sizes: Places, sets of devices, units.
        target: What chains cost less than.
    """
    index, cost, more = columns
    head, after, team, most = groups
    sources, begins, rises, replicas = sets
    places, number, end = sizes
    least = np.full(len(head), np.inf)
    for i in range(len(index)):
        own = group[index[i]]
        least[own] = min(least[own], cost[index[i]])
    rest, gone = np.full((places, number), np.inf), np.full((places, number), np.inf)
    rest[end, 0] = 0.0
    gone[0] = 0.0
    for g in range(len(head) - 1, -1, -1):
        if not least[g] < np.inf:
            continue
        own, rise = least[g], rises[team[g]]
        start, behind = rest[head[g]], rest[after[g]]
        for i in range(begins[team[g]], begins[team[g] + 1]):
            here = sources[i]
            if replicas[here] > most[g]:
                break
            start[here + rise] = min(start[here + rise], own + behind[here])
    for g in range(len(head)):
        if not least[g] < np.inf:
            continue
        own, best, rise = least[g], np.inf, rises[team[g]]
        before, ahead, behind = gone[head[g]], gone[after[g]], rest[after[g]]
        for i in range(begins[team[g]], begins[team[g] + 1]):
            here = sources[i]
            if replicas[here] > most[g]:
                break
            value = own + before[here + rise]
            ahead[here] = min(ahead[here], value)
            best = min(best, value + behind[here])
        # What a chain through the group costs without the stage itself.
        least[g] = best - own
    kept, others = np.empty(len(index), dtype=np.intp), np.empty(len(index))
    count = 0
    for i in range(len(index)):
        c = index[i]
        if least[group[c]] + cost[c] + more[c] < target:
            kept[count], others[count] = c, least[group[c]]
            count += 1
    return rest[0].min(), kept[:count], others[:count]
