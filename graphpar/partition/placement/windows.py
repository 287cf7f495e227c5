"""What a device saves at best by leaving a free block to a device that holds nothing of its window.

Let a device hold the blocks S, and let free block f be its to take. Leaving f out of S and whatever else
belongs to it changes its load by at least -r, with

    r = work of f + cost of f's bundles that miss S - cost of f's bundles whose other ends are all in S:

adding f to a superset of S brings no more than the first two, and surely saves the third. The r of
several free blocks add up for the same reason.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from graphpar.partition.placement.graph import Blocks, FloatArray, product

BoolArray = npt.NDArray[np.bool_]


class Elsewhere:
    """Savings for many pairs of ideals at a time; a device's blocks are `J - I`."""

    def __init__(self, blocks: Blocks, windows: Mapping[int, frozenset[int]], member: BoolArray) -> None:
        self._free = list(windows)
        self._absent = ~member[:, self._free]
        held = [member[:, list(window)] for window in windows.values()]
        closed = np.stack([part.all(axis=1) for part in held], axis=1)
        self._closing = closed & member[:, self._free]
        self._begun = np.stack([part.any(axis=1) for part in held], axis=1)
        finite = np.where(np.isfinite(blocks.accelerator), blocks.accelerator, 0.0)
        self._work = finite[self._free]
        self._bundles: list[list[tuple[FloatArray, int, bool, float]]] = []
        free = set(self._free)
        for f in self._free:
            own = []
            for ends, cost in blocks.bundles:
                if f in ends:
                    others = sorted(ends - free)
                    count = member[:, others].sum(axis=1).astype(np.float64)
                    own.append((count, len(others), len(others) == len(ends) - 1, cost))
            self._bundles.append(own)

    def given_up(
        self, amounts: npt.NDArray[np.generic], larger: slice, smaller: npt.NDArray[np.intp]
    ) -> FloatArray:
        """`[j, i]`: amounts of the free blocks that J - I would be the last to take."""
        own = amounts[self._free].astype(np.float64)
        return product(self._closing[larger] * own, self._absent[smaller].T.astype(np.float64))

    def saving(self, larger: slice, smaller: npt.NDArray[np.intp]) -> FloatArray:
        """`[j, i]`: the most that J - I saves by leaving those blocks elsewhere."""
        closing, absent, begun = self._closing[larger], self._absent[smaller], self._begun[smaller]
        total = np.zeros((closing.shape[0], len(smaller)))
        for k, work in enumerate(self._work):
            rows = np.flatnonzero(closing[:, k])
            if not rows.size:
                continue
            whole = np.flatnonzero(absent[:, k] & ~begun[:, k])
            missed = sum(cost for _, number, _, cost in self._bundles[k] if number == 0)
            inside = sum(cost for _, number, sole, cost in self._bundles[k] if sole and number)
            if whole.size and work + missed > inside:
                total[np.ix_(rows, whole)] += work + missed - inside
            partly = np.flatnonzero(absent[:, k] & begun[:, k])
            if partly.size:
                saved = np.full((rows.size, partly.size), work)
                for count, number, sole, cost in self._bundles[k]:
                    of_larger = count[larger][rows][:, None]
                    of_smaller = count[smaller][partly][None, :]
                    saved += cost * (of_larger == of_smaller)
                    if sole:
                        saved -= cost * ((of_larger == number) & (of_smaller == 0))
                total[np.ix_(rows, partly)] += np.maximum(0.0, saved)
        return total
