"""Where pipelines side by side must all be cut, so that their sums of gradients end in time.

The units between two boundaries at which all pipelines are cut are a *segment*. Inside it some pipeline
goes on at every boundary, so that neighbouring sums have a device in common and follow one another
(`gradient_sums`): the sums of a segment take at least what one ring over all of its units does, with one
holder in each pipeline. Units without gradients have no sum, and what is before them may be summed on
other devices than what is behind them: the longer of the two counts alone. Where that is more than there
is time for, the segment is too long.

So segments must be short, and a plan has a common cut within each of some *windows*, which follow from
how far segments reach from either end. How many cuts all pipelines have in common is tried from one on: a
pipeline has no more cuts than devices but one. Windows are divided: pipelines that are cut within them
take longer, which leaves less time for sums, which narrows windows.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from graphpar.cost import CostTable
from graphpar.partition.cells import Cells, Links
from graphpar.partition.stage_costs import ring_array
from graphpar.partition.unit_arrays import FloatArray

Windows = tuple[tuple[int, int], ...]
"""For each cut that all pipelines have in common the first and the last unit before which it may be."""


def segment_sums_s(
    table: CostTable, cells: Cells, groups: Sequence[Sequence[int]], across: Sequence[Sequence[Links]]
) -> FloatArray:
    """[first, last]: what the sums of the units between take at least, if they follow one another.

    Args:
        table: What everything costs.
        cells: Where devices stand.
        groups: The devices that each pipeline may use, as counts by cell.
        across: For each pipeline by place the best links to the others (`links_to_others`).
    """
    least = [
        min(float(np.mean(m.costs[kind].gradient_bytes)) for m in table.every_mode)
        for kind in range(len(table.costs))
    ]
    num_bytes = _most_in_a_row(np.array(least)[np.array(table.units)])
    found = np.zeros(num_bytes.shape)
    for group, links in zip(groups, across, strict=True):
        places = {c.place for c, n in zip(cells.cells, group, strict=True) if n}
        rings = [ring_array(links[p], len(groups), num_bytes, table.sum_s_per_byte) for p in places]
        found = np.maximum(found, np.minimum.reduce(rings))
    return np.where(num_bytes > 0, found, 0.0)


def _most_in_a_row(num_bytes: FloatArray) -> FloatArray:
    """[first, last]: the most that any units between have together, none of which has nothing.

    >>> _most_in_a_row(np.array([3.0, 1.0, 0.0, 2.0]))[0]
    array([0., 3., 4., 4., 4.])
    """
    ends = np.arange(len(num_bytes) + 1)
    upto = np.concatenate([[0.0], np.cumsum(num_bytes)])
    row_of = np.maximum.accumulate(np.where(np.append(1.0, num_bytes) > 0, 0, ends))
    ending = upto[None, :] - upto[np.maximum(ends[:, None], row_of[None, :])]
    found: FloatArray = np.maximum.accumulate(np.maximum(ending, 0.0), axis=1)
    return found


def first_windows(sums_s: FloatArray, limit_s: float, most: int) -> list[Windows]:
    """The common cuts of any plan, at most so many, are within some of these if no segment takes longer.

    `sums_s` as `segment_sums_s` gives them, which grow with the segment. Without windows nothing is asked
    for; an empty list says that there is no such plan.

    >>> first_windows(np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), 1.5, 3)
    [((1, 1),)]
    """
    units = len(sums_s) - 1
    if sums_s[0, units] <= limit_s:
        return [()]
    every = [narrowed(sums_s, limit_s, ((1, units - 1),) * n) for n in range(1, min(most, units - 1) + 1)]
    return [windows for windows in every if windows is not None]


def narrowed(sums_s: FloatArray, limit_s: float, windows: Windows) -> Windows | None:
    """The same without places that make a segment too long wherever the other cuts are; None: none."""
    units, firsts, lasts = len(sums_s) - 1, [0], [0]
    for low, high in windows:
        reach = int(np.searchsorted(sums_s[lasts[-1], lasts[-1] :], limit_s, "right")) - 1 + lasts[-1]
        firsts.append(max(low, firsts[-1] + 1))
        lasts.append(min(high, reach))
        # With less than no time left not even a segment without a unit is in time.
        if limit_s < 0 or firsts[-1] > lasts[-1]:
            return None
    end, found = (units, units), []
    for low, high in zip(reversed(firsts[1:]), reversed(lasts[1:]), strict=True):
        reach = int((sums_s[: end[0] + 1, end[0]] > limit_s).sum())
        end = max(low, reach), min(high, end[1] - 1)
        if end[0] > end[1]:
            return None
        found.append(end)
    return tuple(reversed(found))


def halves(windows: Windows) -> list[Windows]:
    """The windows with the widest one divided; nothing where each is one place."""
    wide = max(range(len(windows)), key=lambda i: windows[i][1] - windows[i][0])
    low, high = windows[wide]
    if low == high:
        return []
    middle = (low + high) // 2
    parts = (low, middle), (middle + 1, high)
    return [(*windows[:wide], part, *windows[wide + 1 :]) for part in parts]


def known_sums_s(table: CostTable, sums_s: FloatArray, windows: Windows) -> FloatArray | None:
    """[0 or 1, unit]: what sums before it take at least, where all cuts in common are known.

    In row 0 those since the last cut there or before, in row 1 since the last cut before. Sums of a
    segment follow one another, so that a stage sums after all before it in its segment. Not told (None)
    where some unit has no sum, or groups of devices sum part by part.
    """
    fixed = all(low == high for low, high in windows)
    if not fixed or any(len(m.members) > 1 for m in table.every_mode) or (np.diff(sums_s[0]) <= 0).any():
        return None
    cuts, units = np.array([0, *(low for low, _ in windows)]), np.arange(len(sums_s))
    sides: tuple[Literal["right", "left"], ...] = ("right", "left")
    last = [cuts[np.maximum(np.searchsorted(cuts, units, side) - 1, 0)] for side in sides]
    found: FloatArray = np.stack([sums_s[cut, units] for cut in last])
    return found


def longest_s(sums_s: FloatArray, windows: Windows) -> float:
    """What the sums of some segment take at least."""
    ends = [(0, 0), *windows, (len(sums_s) - 1,) * 2]
    return max(float(sums_s[a[1], b[0]]) if a[1] < b[0] else 0.0 for a, b in pairwise(ends))
