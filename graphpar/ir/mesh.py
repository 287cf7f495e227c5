"""Tensor groups of two axes: members stand in rows, and a value has a layout along each axis.

Along the first axis the members are numbered by row, along the second by their place in the row. A
value's *layouts* say along each axis what the members of a line have: along the second axis of what the
first one leaves them. So a slice along both is a slice of a slice, a sum along both a sum of sums, and
whatever brings a value into another layout along one axis works on each line by itself.

A group of one axis is a mesh of one, and nothing here changes what it does.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import permutations, product

from graphpar.ir.conversions import CollectiveName, Conversion, conversion
from graphpar.ir.ops import BatchSize, Dim, TensorType, apportion
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy

Layouts = tuple[Layout, ...]
"""A value's layout along each axis."""
_SENT: dict[CollectiveName | None, float] = {
    None: 0.0, "all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 0.5
}  # fmt: skip
"""What is sent, about, in values that go round once."""


def whole_along(axes: int) -> Layouts:
    """The layouts of what every member has."""
    whole: Layout = "whole"
    return (whole,) * axes


@lru_cache(maxsize=65536)
def same_units(a: Layout, b: Layout) -> bool:
    """Whether two layouts cut the same units of the same dimension.

    >>> same_units(Split(1, (2, 2), 1, 8), Split(1, (3, 1), 1, 8)), same_units("whole", "whole")
    (True, False)
    """
    return isinstance(a, Split) and isinstance(b, Split) and place_of(a) == place_of(b)


def place_of(split: Split) -> tuple[object, ...]:
    """Which units of which dimension a split cuts."""
    return split.dim, split.outer, split.inner, split.of_batch, 0 if split.of_batch else split.units


def within(split: Split, outer: Split, member: int) -> Split:
    """A split as it cuts what another one has left to a member.

    >>> within(Split(0, (16, 16)), Split(0, (24, 8)), 1)  # the same units: 8 are left
    Split(dim=0, counts=(4, 4), outer=1, inner=1, of_batch=False)
    >>> str(within(Split(0, (3, 1), 1, 10), Split(0, (1, 1), 4, 5), 0))  # half of what is in its units
    'dim0:3/1x5'
    """
    if split.dim != outer.dim:
        return split
    if same_units(split, outer):
        return replace(split, counts=apportion(outer.counts[member], split.counts))
    if split.inner < outer.inner:
        return replace(split, outer=_fewer(split.outer, outer, member))
    return replace(split, inner=split.inner // outer.units * outer.counts[member])


def _fewer(runs: Dim, outer: Split, member: int) -> Dim:
    """How often a run of units comes where only a member's units of an outer split are left."""
    if outer.of_batch:
        assert isinstance(runs, BatchSize)
        return BatchSize(runs.times, outer.counts, member)
    if isinstance(runs, BatchSize):
        return BatchSize(runs.times // outer.units * outer.counts[member], runs.parts, runs.member)
    return runs // outer.units * outer.counts[member]


def localized(layouts: Sequence[Layout], coords: Sequence[int]) -> Layouts:
    """Each layout as it stands in what the axes before leave.

    Args:
        layouts: Along each axis.
        coords: The member's place along each.
    """
    found: list[Layout] = []
    for layout in layouts:
        for before, member in zip(found, coords, strict=False):
            if isinstance(layout, Split) and isinstance(before, Split):
                layout = within(layout, before, member)
        found.append(layout)
    return tuple(found)


def local_type(kind: TensorType, layouts: Sequence[Layout], coords: Sequence[int]) -> TensorType:
    """The type of what a member has of a value.

    >>> kind = TensorType((8, 6), "float32")
    >>> str(local_type(kind, (Split(0, (3, 1), 1, 2), Split(1, (2, 1), 1, 2)), (0, 1)))
    'float32[6,2]'
    """
    for layout, member in zip(localized(layouts, coords), coords, strict=True):
        if isinstance(layout, Split):
            kind = layout.local(kind, member)
    return kind


def seen_along(axis: int, layouts: Sequence[Layout], coords: Sequence[int]) -> Layout:
    """The layout along an axis as its line sees it: in what all the other axes leave."""
    order = [*(k for k in range(len(layouts)) if k != axis), axis]
    return localized([layouts[k] for k in order], [coords[k] for k in order])[-1]


def fit(layouts: Sequence[Layout], sizes: Sequence[int]) -> bool:
    """Whether a value can be held so: units that both axes cut suffice for every member.

    Samples are cut along one axis at most, since how many each line has is known only when they come.
    """
    for k, inner in enumerate(layouts):
        for outer in layouts[:k]:
            if isinstance(inner, Split) and isinstance(outer, Split):
                if inner.of_batch and outer.of_batch:
                    return False
                if same_units(inner, outer) and min(outer.counts) < sizes[k]:
                    return False
    return True


@dataclass(frozen=True)
class Move:
    """One step from a value's layouts to others.

    Attributes:
        axis: Along which axis; None for all members at once.
        how: The op that does it.
        before: Layouts before it.
        after: Layouts after it.
    """

    axis: int | None
    how: Conversion
    before: Layouts
    after: Layouts


@lru_cache(maxsize=65536)
def at_once(layouts: Layouts, sizes: tuple[int, ...]) -> Layout | None:
    """Layouts that are alike along all axes as one over all members, row by row; None where they differ.

    >>> at_once((Split(0, (4, 4)), Split(0, (4, 4))), (2, 2))
    Split(dim=0, counts=(2, 2, 2, 2), outer=1, inner=1, of_batch=False)
    """
    first, *others = layouts
    if not isinstance(first, Split):
        return first if all(other == first for other in others) else None
    if first.of_batch or not all(same_units(first, other) for other in others):
        return None
    flat = first
    for other, size in zip(others, sizes[1:], strict=True):
        assert isinstance(other, Split)
        counts = (within(other, flat, k).counts for k in range(len(flat.counts)))
        flat = replace(flat, counts=tuple(c for row in counts for c in row))
        assert len(flat.counts) % size == 0
    return flat


@lru_cache(maxsize=65536)
def route(
    sizes: tuple[int, ...], made: Layouts, wanted: Layouts, has_gradient: bool, is_weight: bool = False
) -> tuple[Move, ...] | None:
    """How a value comes from some layouts to others; None where it cannot.

    Where both axes do the same, all members do it at once; else axis by axis, in the order that sends
    less.

    Args:
        sizes: Members along each axis.
        made: Layouts it is made in.
        wanted: Layouts it is wanted in.
        has_gradient: Whether a gradient flows back.
        is_weight: Whether it is a weight (see `conversion`).

    >>> moves = route((2, 2), ("partial", "partial"), ("whole", "whole"), True)
    >>> [(move.axis, move.how.target) for move in moves]
    [(None, 'gp.all_reduce')]
    >>> moves = route((2, 2), ("partial", "whole"), (Split(0, (2, 2)), "copied"), True)
    >>> [(move.axis, move.how.target) for move in moves]
    [(0, 'gp.reduce_scatter'), (1, 'gp.copy_to_group')]
    """
    if made == wanted:
        return ()
    changed = [axis for axis in range(len(sizes)) if made[axis] != wanted[axis]]
    if len(changed) > 1:
        flat = [at_once(layouts, sizes) for layouts in (made, wanted)]
        if flat[0] is not None and flat[1] is not None:
            how = conversion(flat[0], flat[1], has_gradient, is_weight)
            if how is not None and how.target:
                return (Move(None, how, made, wanted),)
    orders = permutations(changed)
    found = [moves for o in orders if (moves := _in_order(o, made, wanted, has_gradient, is_weight))]
    if "first" in wanted:
        # The others do without it, so along no axis may it take part in what has to be in step.
        found = [moves for moves in found if not any(m.how.forward or m.how.backward for m in moves)]
    if len(found) < 2:
        return found[0] if found else None
    return min(found, key=lambda moves: _sent(sizes, moves))


def _in_order(
    order: Sequence[int], made: Layouts, wanted: Layouts, has_gradient: bool, is_weight: bool
) -> tuple[Move, ...] | None:
    now, moves = made, []
    for axis in order:
        after = (*now[:axis], wanted[axis], *now[axis + 1 :])
        within_it = now[axis + 1 :]
        if any(same_units(each, own) for each in within_it for own in (now[axis], after[axis])):
            return None  # slices within its slices have to come together first
        how = conversion(now[axis], wanted[axis], has_gradient, is_weight)
        if how is None:
            return None
        moves.append(Move(axis, how, now, after))
        now = after
    return tuple(moves)


def part_left(sizes: Sequence[int], layouts: Sequence[Layout], without: int | None = None) -> float:
    """About what part of a value a member has; as if one axis had all of it."""
    left = 1.0
    for axis, (size, layout) in enumerate(zip(sizes, layouts, strict=True)):
        if axis != without and isinstance(layout, Split):
            left /= size
    return left


def _sent(sizes: Sequence[int], moves: Sequence[Move]) -> float:
    """About what a route sends in both directions, in parts of the value."""
    total = 0.0
    for move in moves:
        assert move.axis is not None
        turns = (sizes[move.axis] - 1) / sizes[move.axis]
        ends = _SENT[move.how.forward] + _SENT[move.how.backward]
        total += ends * turns * part_left(sizes, move.before, move.axis)
    return total


def numbered(coords: Sequence[int], sizes: Sequence[int]) -> int:
    """The member's number in the group, row by row.

    >>> numbered((1, 2), (2, 4)), coords_of(6, (2, 4))
    (6, (1, 2))
    """
    number = 0
    for place, size in zip(coords, sizes, strict=True):
        number = number * size + place
    return number


def coords_of(member: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The inverse of `numbered`."""
    found: list[int] = []
    for size in reversed(sizes):
        member, place = divmod(member, size)
        found.append(place)
    return tuple(reversed(found))


def line_of(member: int, axis: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The members that differ from one along an axis alone, itself among them, in order.

    >>> line_of(5, 0, (2, 4)), line_of(5, 1, (2, 4))
    ((1, 5), (4, 5, 6, 7))
    """
    own = coords_of(member, sizes)
    rows = ((*own[:axis], k, *own[axis + 1 :]) for k in range(sizes[axis]))
    return tuple(numbered(row, sizes) for row in rows)


def axis_shares(shares: Sequence[float], sizes: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Shares along each axis, of members whose shares are products of theirs.

    >>> axis_shares((0.3, 0.3, 0.2, 0.2), (2, 2))
    ((0.6, 0.4), (0.5, 0.5))
    """
    found = []
    for axis, size in enumerate(sizes):
        sums = [0.0] * size
        for member, share in enumerate(shares):
            sums[coords_of(member, sizes)[axis]] += share
        found.append(tuple(sums))
    return tuple(found)


@dataclass(frozen=True)
class Ways:
    """One way for a group to compute an op: a strategy along each axis."""

    along: tuple[Strategy, ...]

    @cached_property
    def operands(self) -> tuple[Layouts, ...]:
        """The layouts wanted of each operand."""
        return tuple(zip(*(way.operands for way in self.along), strict=True))

    @cached_property
    def results(self) -> tuple[Layouts, ...]:
        """The layouts of each result."""
        return tuple(zip(*(way.results for way in self.along), strict=True))

    @cached_property
    def special(self) -> bool:
        """Whether members compute their parts in a way of their own (see `Strategy`)."""
        return any(way.special for way in self.along)

    @property
    def divides(self) -> bool:
        """Whether members share the work."""
        return any(way.shares for way in self.along)

    @property
    def samples(self) -> bool:
        """Whether members share the samples."""
        return any(way.samples for way in self.along)


def ways_of(
    tables: Sequence[Mapping[str, Sequence[Strategy]]], sizes: Sequence[int], names: Container[str]
) -> dict[str, tuple[Ways, ...]]:
    """The ways to compute ops, from the strategies along each axis, as far as values can be held so."""
    made: dict[tuple[int, ...], tuple[Ways, ...]] = {}
    found = {}
    for name in tables[0]:
        if name not in names:
            continue
        rows = [table[name] for table in tables]
        key = tuple(map(id, rows))  # rows of equal ops are one object
        if key not in made:
            every = map(Ways, product(*rows))
            made[key] = tuple(
                w for w in every if all(fit(layouts, sizes) for layouts in (*w.operands, *w.results))
            )
        found[name] = made[key]
    return found
