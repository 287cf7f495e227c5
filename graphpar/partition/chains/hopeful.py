"""Which stages a pipeline below a target may have, by run of units, and what these may take."""

from typing import NamedTuple

import numpy as np

from graphpar.partition.unit_arrays import FloatArray, IntArray, starts

Entries = tuple[FloatArray, IntArray, FloatArray, FloatArray, FloatArray]
"""`Allowed` without its names."""

Plain = tuple[IntArray, IntArray, IntArray, Entries]
"""`Hopeful` without its names: compiled code on disk is of no use where types are elsewhere."""


class Allowed(NamedTuple):
    """What columns may take for which others stand, to be in a chain below a target (`sets`).

    By entry: the least extra that counts, and where its windows begin (and one more entry). By window:
    the least and the most extra that a chain may have, and what the cost and post of the column and the
    larger of its extra and that least may come to.

    A chain takes no longer if others stand for all of its stages but this one. A column may have less
    extra than the one that stands for it, and costs more by that at least: counted with as much extra
    its chain still takes no longer. Then whoever stands for stages of the chain has no more extra than
    the window of that chain allows, so that what they cost there at least is known.
    """

    extra_s: FloatArray
    begins: IntArray
    least_s: FloatArray
    most_s: FloatArray
    all_s: FloatArray

    @property
    def plain(self) -> Entries:
        """For loops."""
        return self.extra_s, self.begins, self.least_s, self.most_s, self.all_s


class Hopeful(NamedTuple):
    """Which crews, or which options, there may be: increasing runs, where the list of each begins, the
    lists, and what each entry allows those for whom it stands.

    One more entry of `begins` is where the last list ends; where it is empty any may be anywhere.
    """

    runs: IntArray
    begins: IntArray
    listed: IntArray
    allowed: Allowed

    @property
    def plain(self) -> Plain:
        """For loops."""
        return self.runs, self.begins, self.listed, self.allowed.plain


_NONE, _NOTHING = np.zeros(0, dtype=np.intp), np.zeros(0)

ANY = Hopeful(_NONE, _NONE, _NONE, Allowed(_NOTHING, _NONE, _NOTHING, _NOTHING, _NOTHING))


def all_allowed(number: int) -> Allowed:
    """Nothing is known of so many entries."""
    any_s = np.full(number, np.inf)
    return Allowed(np.zeros(number), np.arange(number + 1), np.zeros(number), any_s, any_s)


def listed(run: IntArray, option: IntArray, allowed: Allowed) -> Hopeful:
    """Entries, which come by run, as lists."""
    begins = np.append(np.flatnonzero(starts(run)), len(run))
    return Hopeful(run[begins[:-1]], begins, option.copy(), allowed)
