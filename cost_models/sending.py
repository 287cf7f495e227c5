"""What a group sends to bring values from some layouts to others, whatever the values' sizes.

A programme asks for every pair of hundreds of layouts, of which nearly all are alike: what
`ir.mesh.route` says depends on which layouts are equal, which cut the same units, and how large the
slices are. So pairs are told apart by that, in arrays, and one of each kind is looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
import numpy.typing as npt

from graphpar.ir.conversions import CollectiveName
from graphpar.ir.mesh import Layouts, Move, at_once, place_of, route, same_units
from graphpar.ir.shards import Layout, Split

Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True)
class SentOnce:
    """What one conversion sends: forward, backward, along which axis, and of what part of the value.

    `once`: what it sends in backward is sent once a step.
    """

    forward: CollectiveName | None
    backward: CollectiveName | None
    axis: int | None
    left: float
    once: bool


Sent = tuple[SentOnce, ...]
"""What one way to convert a value sends, step by step."""

_MOST_KINDS = 2**20
"""Kinds of layouts are numbered below this."""


class Sending:
    """The ways to send between layouts along so many members of each axis, each kind found once."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self._axes = axes
        self._numbers: dict[object, int] = {}
        self._traits: dict[Layouts, tuple[int, ...]] = {}
        self._alone: dict[tuple[Layouts, Layouts, bool, bool], Sent | None] = {}
        self._ways: list[Sent | None] = []
        self._number_of_way: dict[Sent | None, int] = {}
        self._of_kind: dict[tuple[int, bool, bool], int] = {}
        self._tables: dict[object, tuple[tuple[Sent | None, ...], Numbers]] = {}

    def way(self, made: Layouts, wanted: Layouts, has_gradient: bool, is_weight: bool) -> Sent | None:
        """What is sent from some layouts to others; None where there is no way."""
        key = made, wanted, has_gradient, is_weight
        if key not in self._alone:
            moves = route(self._axes, *key)
            self._alone[key] = (
                None
                if moves is None
                else tuple(_sent(move, is_weight) for move in moves if move.how.target)
            )
        return self._alone[key]

    def table(
        self, made: Sequence[Layouts], wanted: Sequence[Layouts], has_gradient: bool, is_weight: bool
    ) -> tuple[tuple[Sent | None, ...], Numbers]:
        """The ways that there are, and by number which leads from each layout to each other one."""
        key = tuple(made), tuple(wanted), has_gradient, is_weight
        if key not in self._tables:
            kinds = self._kinds(made, wanted)
            some, first, alike = np.unique(kinds, return_index=True, return_inverse=True)
            ways = [
                self._way(
                    kind, made[at // len(wanted)], wanted[at % len(wanted)], has_gradient, is_weight
                )
                for kind, at in zip(some.tolist(), first.tolist(), strict=True)
            ]
            used, numbers = np.unique(ways, return_inverse=True)
            table = numbers[alike.ravel()].reshape(len(made), len(wanted))
            self._tables[key] = tuple(self._ways[way] for way in used.tolist()), table
        return self._tables[key]

    def _way(self, kind: int, made: Layouts, wanted: Layouts, has_gradient: bool, is_weight: bool) -> int:
        """The number of what is sent between layouts of a kind, of which these are some."""
        key = kind, has_gradient, is_weight
        if key not in self._of_kind:
            sent = self.way(made, wanted, has_gradient, is_weight)
            self._of_kind[key] = self._number_of_way.setdefault(sent, len(self._ways))
            if self._of_kind[key] == len(self._ways):
                self._ways.append(sent)
        return self._of_kind[key]

    def _kinds(self, made: Sequence[Layouts], wanted: Sequence[Layouts]) -> npt.NDArray[np.int64]:
        """[made, wanted]: a number for each pair; pairs of one number send the same."""
        rows, columns = (
            np.array([self._traits_of(layouts) for layouts in side], dtype=np.int64).T
            for side in (made, wanted)
        )
        size = len(self._axes)
        found: npt.NDArray[np.int64] = rows[0][:, None] * _MOST_KINDS + columns[0]
        # Along each axis the same, and the same taken as one over all members.
        same = [rows[k][:, None] == columns[k] for k in range(1, size + 2)]
        places = [(rows[k][:, None], columns[k]) for k in range(size + 2, 2 * size + 2)]
        # Slices of one side within those of the other.
        for (outer_made, outer_wanted), (inner_made, inner_wanted) in combinations(places, 2):
            same.append((inner_made == outer_wanted) & (inner_made >= 0))
            same.append((outer_made == inner_wanted) & (outer_made >= 0))
        for bit in same:
            found = 2 * found + bit
        return found

    def _traits_of(self, layouts: Layouts) -> tuple[int, ...]:
        """Numbers for what they are by themselves, as one over all members, along each axis, and for the
        units cut along each (-1 for none)."""
        if layouts not in self._traits:
            kind = (
                tuple(_alone(layout) for layout in layouts),
                tuple(same_units(a, b) for a, b in combinations(layouts, 2)),
            )
            number = self._number(kind)
            assert number < _MOST_KINDS
            whole = self._number(at_once(layouts, self._axes))
            own = map(self._number, layouts)
            places = (self._number(place_of(each)) if isinstance(each, Split) else -1 for each in layouts)
            self._traits[layouts] = (number, whole, *own, *places)
        return self._traits[layouts]

    def _number(self, thing: object) -> int:
        return self._numbers.setdefault(thing, len(self._numbers))


def _alone(layout: Layout) -> object:
    """What is told of a layout that is not compared with any other."""
    return (layout.of_batch, largest_part((layout,))) if isinstance(layout, Split) else layout


def _sent(move: Move, is_weight: bool) -> SentOnce:
    left = 1.0 if move.axis is None else largest_part(move.before, move.axis)
    once = is_weight and move.how.target == "gp.copy_to_group"
    return SentOnce(move.how.forward, move.how.backward, move.axis, left, once)


def largest_part(layouts: Layouts, without: int | None = None) -> float:
    """The largest part of a value that a member has; as if one axis had all of it."""
    return prod(
        max(layout.counts) / layout.units
        for axis, layout in enumerate(layouts)
        if axis != without and isinstance(layout, Split)
    )
