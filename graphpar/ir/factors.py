"""Which dimensions of a graph run together, and what they are products of.

Every dimension of every value is a product of *factors*. Operators tie the dimensions of what they
read to those of what they make; where one side of a tie is a single dimension of 4096 and the other
is (32, 128), as in a view that takes heads apart, the first becomes the product of two factors too.
Factors that are tied are one factor, wherever they stand, so that a split of one is told everywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphpar.ir.graph import Graph
from graphpar.ir.links import links_of
from graphpar.ir.ops import BatchSize, Dim, Op, TensorType
from graphpar.ir.tie import Link, Side

_BATCH = 1_000_003
"""Stands for the unknown batch size when sizes are compared: a prime larger than any real factor."""


def symbolic(size: Dim) -> int:
    """A size as one number; sizes that scale with the batch are multiples of a large prime."""
    return size.times * _BATCH if isinstance(size, BatchSize) else size


def as_dim(number: int) -> Dim:
    """The inverse of `symbolic`."""
    return BatchSize(number // _BATCH) if number % _BATCH == 0 else number


@dataclass(frozen=True)
class Place:
    """Where a factor stands in a dimension: its size is outer x factor x inner."""

    dim: int
    outer: Dim
    inner: int


@dataclass(frozen=True)
class Loop:
    """One factor that an op runs over, and where it stands in what the op reads and makes.

    Attributes:
        units: Size of the factor; 0 for the samples of a microbatch.
        places: By slot (see `Side`), where the factor stands there.
        link: The tie it comes from.
    """

    units: int
    places: tuple[tuple[int, Place], ...]
    link: Link


class Factors:
    """Factors of all dimensions of a graph's values."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._size: list[int] = []
        self._same: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}
        self._dims: dict[tuple[str, int], list[list[int]]] = {}
        for op in graph.ops:
            if op.target == "getitem":
                self._dims[op.name, 0] = self._dims[taken(op, graph)]
                continue
            for index, kind in enumerate(op.types):
                if kind is not None:
                    self._dims[op.name, index] = [self._dimension(size) for size in kind.shape]
        self.links: dict[str, tuple[Link, ...]] = {op.name: links_of(op, graph) for op in graph.ops}
        for op in graph.ops:
            for link in self.links[op.name]:
                self._tie(op, link)

    def loops(self, op: Op) -> Iterator[Loop]:
        """The factors an op runs over that could be cut."""
        for link in self.links[op.name]:
            rows = [self._located(op, side) for side in link.sides]
            if len({tuple(root for root, _ in row) for row in rows}) != 1:
                continue  # the sides did not fit each other
            for position, (root, _) in enumerate(rows[0]):
                units = self._size[root]
                places = [
                    (side.slot, row[position][1]) for side, row in zip(link.sides, rows, strict=True)
                ]
                if units == _BATCH and all(p is not None and p.outer == 1 for _, p in places):
                    yield Loop(0, tuple((s, p) for s, p in places if p is not None), link)
                elif units % _BATCH and units > 1 and all(place is not None for _, place in places):
                    yield Loop(units, tuple((s, p) for s, p in places if p is not None), link)

    # --- building ---

    def _dimension(self, size: Dim) -> list[int]:
        number = symbolic(size)
        return [] if number <= 1 else [self._new(number)]

    def _new(self, size: int) -> int:
        self._size.append(size)
        self._same.append(len(self._same))
        return len(self._same) - 1

    def _root(self, node: int) -> int:
        while self._same[node] != node:
            self._same[node] = self._same[self._same[node]]
            node = self._same[node]
        return node

    def _leaves(self, nodes: Sequence[int]) -> list[int]:
        found: list[int] = []
        for node in nodes:
            root = self._root(node)
            if root in self._parts:
                found += self._leaves(self._parts[root])
            else:
                found.append(root)
        return found

    def _side(self, op: Op, side: Side) -> list[int]:
        key = value_at(op, side.slot)
        return [node for d in side.dims for node in self._dims[key][d]]

    def _tie(self, op: Op, link: Link) -> None:
        first, *others = link.sides
        for other in others:
            a, b = self._side(op, first), self._side(op, other)
            self._unify(self._widened(a, other, first), self._widened(b, first, other))

    def _widened(self, nodes: list[int], other: Side, own: Side) -> list[int]:
        """A side with the factors that only the other one has."""
        before = [self._new(other.lead)] if other.lead > own.lead else []
        after = [self._new(other.tail)] if other.tail > own.tail else []
        return [*before, *nodes, *after]

    def _unify(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Tie two products of equal size, from their innermost factors outwards, as far as they fit."""
        left, right = self._leaves(a), self._leaves(b)
        while left and right:
            x, y = left.pop(), right.pop()
            if x == y:
                continue
            small, large = (x, y) if self._size[x] <= self._size[y] else (y, x)
            if self._size[large] % self._size[small]:
                return
            if self._size[large] != self._size[small]:
                rest = self._new(self._size[large] // self._size[small])
                self._parts[large] = (rest, small)
                (left if large == x else right).append(rest)
            else:
                self._same[large] = small

    def _located(self, op: Op, side: Side) -> list[tuple[int, Place | None]]:
        """Leaves of a side with their places; those of its lead are left out."""
        key = value_at(op, side.slot)
        found: list[tuple[int, Place | None]] = []
        for d in side.dims:
            leaves = self._leaves(self._dims[key][d])
            sizes = [self._size[leaf] for leaf in leaves]
            for i, leaf in enumerate(leaves):
                outer, inner = _product(sizes[:i]), _product(sizes[i + 1 :])
                ok = inner % _BATCH != 0 and outer % (_BATCH * _BATCH) != 0
                found.append((leaf, Place(d, as_dim(outer), inner) if ok else None))
        return self._without(side.lead, found, 0, self._without(side.tail, found, -1, found))

    def _without(
        self,
        factor: int,
        found: list[tuple[int, Place | None]],
        end: int,
        result: list[tuple[int, Place | None]],
    ) -> list[tuple[int, Place | None]]:
        """The leaves but for those at one end that make up a factor of the side alone."""
        while factor > 1 and found and factor % self._size[found[end][0]] == 0:
            factor //= self._size[found.pop(end)[0]]
        return result


def value_at(op: Op, slot: int) -> tuple[str, int]:
    """The value in a slot of an op: an operand, or a result of its own."""
    return (op.operands()[slot], 0) if slot >= 0 else (op.name, -1 - slot)


def taken(op: Op, graph: Graph) -> tuple[str, int]:
    """The value that a `getitem` takes out of a tuple."""
    source, index = op.operands()[0], op.args[1]
    assert isinstance(index, int)
    return source, index % len(graph[source].types)


def type_at(graph: Graph, op: Op, slot: int) -> TensorType | None:
    """The type of the value in a slot of an op."""
    name, index = value_at(op, slot)
    return graph[name].types[index]


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
