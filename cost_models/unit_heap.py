"""What a unit's backward takes on a processor beside what was kept for it: values, gradients and holes.

The C library gives a tensor the smallest free place that it fits, joins neighbours that are free, and
goes on at the end where there is none. Values of one size take each other's places; where sizes change,
as with logits that are made in 16 bits and needed in 32, the place of the smaller one stays free while
larger ones are made behind it. A unit's values and gradients are put through these rules in the order in
which they come and go.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import ceil

from graphpar.cost_models.layout import Layout, is_view
from graphpar.cost_models.work import OpWork
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.optable import packet

_PASSES_ON = frozenset(["add", "add_", "getitem", "alias", "positive"])
"""Ops whose operands get the gradient of their result as it is, where it is of their size."""

_LEAST_BYTES = 64
"""What is smaller, as a loss, has free places of its own (`graphpar.runtime.heap`)."""

LOSSES = frozenset(["cross_entropy_loss"])
"""Two ops in one: the gradient of the log-probabilities is there beside that of the logits."""


class Heap:
    """Addresses given out by best fit; one byte is as good as another, and all places are whole bytes.

    >>> heap = Heap()
    >>> small, large = heap.take(2.0), heap.take(4.0)
    >>> heap.give_back(small)
    >>> last = heap.take(3.0)
    >>> heap.top_bytes, heap.most_bytes
    (9.0, 7.0)
    """

    def __init__(self) -> None:
        self.top_bytes = self.most_bytes = self.alive_bytes = 0.0
        self._end = 0.0
        self._sizes: dict[float, float] = {}
        self._free: list[tuple[float, float]] = []

    def take(self, num_bytes: float) -> float:
        """The place of so many bytes; only for positive numbers of them."""
        num_bytes = float(ceil(num_bytes))  # neighbours are told by exact sums
        fitting = ((size, k) for k, (_, size) in enumerate(self._free) if size >= num_bytes)
        size, k = min(fitting, default=(0.0, -1))
        if k >= 0:
            place, _ = self._free.pop(k)
            if size > num_bytes:
                self._free.insert(k, (place + num_bytes, size - num_bytes))
        else:
            place, self._end = self._end, self._end + num_bytes
        self._sizes[place] = num_bytes
        self.alive_bytes += num_bytes
        self.top_bytes = max(self.top_bytes, self._end)
        self.most_bytes = max(self.most_bytes, self.alive_bytes)
        return place

    def give_back(self, place: float) -> None:
        """Free a place and join it with its neighbours."""
        size = self._sizes.pop(place)
        self.alive_bytes -= size
        insort(self._free, (place, size))
        k = bisect_left(self._free, (place, size))
        if k + 1 < len(self._free) and place + size == self._free[k + 1][0]:
            self._free[k : k + 2] = [(place, size + self._free[k + 1][1])]
        if k > 0 and sum(self._free[k - 1]) == place:
            self._free[k - 1 : k + 1] = [(self._free[k - 1][0], self._free[k - 1][1] + self._free[k][1])]
        if sum(self._free[-1]) == self._end:
            self._end = self._free.pop()[0]


def unit_bytes(
    graph: Graph,
    layout: Layout,
    works: Mapping[str, OpWork],
    sizes: Mapping[str, float],
    kept: Collection[str],
    *,
    again: bool,
) -> tuple[float, float]:
    """What a unit takes in training beside what it keeps, without and with the gradients of its weights.

    That is the most that is alive at once, and what the heap is larger than all that is alive, gradients
    of weights included. Where these are added to earlier ones, each is there twice for a while; what a
    unit takes with them is told for a backward before which there are none.

    Args:
        graph: The graph the unit is part of.
        layout: Which values share storage.
        works: The unit's ops with their work.
        sizes: Bytes of values, of the unit's ops and of whatever they read.
        kept: Storage that is kept for backward.
        again: Whether another microbatch comes, whose gradients of weights are added to the first one's.
    """
    kept = frozenset(kept)
    whole = _Walk(graph, layout, works, sizes, kept)
    whole.microbatch()
    growing = max(0.0, whole.heap.top_bytes - whole.kept_bytes)
    if again:
        whole.microbatch()
        return max(0.0, whole.heap.top_bytes - whole.kept_bytes), growing
    of_weights = [name for name in sizes if graph[name].target == "parameter"]
    alone = _Walk(graph, layout, works, {**sizes, **dict.fromkeys(of_weights, 0.0)}, kept)
    alone.microbatch()
    holes = whole.heap.top_bytes - whole.heap.most_bytes
    return max(0.0, alone.heap.most_bytes - alone.kept_bytes) + holes, growing


@dataclass
class _Gradient:
    """A place that holds the gradient of one value or more, and of how many."""

    place: float | None
    holders: int = 1


@dataclass
class _Walk:
    graph: Graph
    layout: Layout
    works: Mapping[str, OpWork]
    sizes: Mapping[str, float]
    kept: frozenset[str]
    heap: Heap = field(default_factory=Heap)
    values: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, _Gradient] = field(default_factory=dict)
    of_weights: set[str] = field(default_factory=set)
    kept_bytes: float = 0.0

    def microbatch(self) -> None:
        """Go forward and back; nothing but gradients of weights is left."""
        self.forward()
        self.backward()
        for places in (self.values, self.notes):
            while places:
                self.heap.give_back(places.popitem()[1])
        while self.gradients:
            self._drop(self.gradients.popitem()[1])

    def forward(self) -> None:
        """Make the unit's values; those that nothing later needs go at once."""
        root, ops = self.layout.root, [self.graph[name] for name in self.works]
        last_use = {root[o]: i for i, op in enumerate(ops) for o in op.operands()}
        inside = set(self.works)
        used = {op.name: {user.name for user in self.graph.users(op.name)} for op in ops}
        staying = self.kept | {root[name] for name, users in used.items() if users - inside}
        going: dict[int, list[str]] = {}
        for i, op in enumerate(ops):
            if root[op.name] == op.name and op.target not in ("getitem", "gp.cast_weight", *SOURCES):
                self._put(self.values, op.name, self.sizes[op.name])
                if op.name in self.values and op.name not in staying:
                    going.setdefault(last_use.get(op.name, i), []).append(op.name)
            self._put(self.notes, op.name, self.works[op.name].saved_bytes)
            for name in going.pop(i, ()):
                self.heap.give_back(self.values.pop(name))

    def backward(self) -> None:
        """Follow gradients back; what an op has kept goes when it is done."""
        root = self.layout.root
        savers: dict[str, set[str]] = {}
        for name, work in self.works.items():
            for saved in work.saved if work.backward else ():
                savers.setdefault(root[saved], set()).add(name)
        for name in [n for n in self.values if n not in self.kept]:
            self.heap.give_back(self.values.pop(name))
        self.kept_bytes = self.heap.alive_bytes
        for name in reversed(list(self.works)):
            op = self.graph[name]
            if not op.attr("grad"):
                continue
            self._follow(op)
            for saved in {root[s] for s in self.works[name].saved}:
                savers.get(saved, set()).discard(name)
                if saved in self.values and not savers.get(saved):
                    self.heap.give_back(self.values.pop(saved))
            if name in self.notes:
                self.heap.give_back(self.notes.pop(name))

    def _put(self, places: dict[str, float], name: str, num_bytes: float) -> None:
        if num_bytes >= _LEAST_BYTES:
            places[name] = self.heap.take(num_bytes)

    def _fresh(self, num_bytes: float) -> _Gradient:
        return _Gradient(self.heap.take(num_bytes) if num_bytes >= _LEAST_BYTES else None)

    def _drop(self, gradient: _Gradient) -> None:
        gradient.holders -= 1
        if gradient.holders == 0 and gradient.place is not None:
            self.heap.give_back(gradient.place)

    def _follow(self, op: Op) -> None:
        """Make the gradients of an op's operands from that of its result."""
        own = self.gradients.pop(op.name, None) or self._fresh(self.sizes[op.name])
        sources = [self.graph[o] for o in dict.fromkeys(op.operands())]
        wanted = [source for source in sources if source.attr("grad")]
        passing = self._fresh(sum(self.sizes[s.name] for s in wanted) if packet(op) in LOSSES else 0.0)
        for source in wanted:
            if self._is_passed_on(op, source):
                own.holders += 1
                self._add(source, own)
            else:
                self._add(source, self._fresh(self.sizes[source.name]))
        self._drop(passing)
        self._drop(own)

    def _is_passed_on(self, op: Op, source: Op) -> bool:
        if self.sizes[op.name] != self.sizes[source.name] or op.name in self.layout.copies:
            return False
        return packet(op) in _PASSES_ON or is_view(op, self.graph)

    def _add(self, source: Op, gradient: _Gradient) -> None:
        """Torch adds to what is there, in its place where nobody else holds it."""
        before = self.gradients.get(source.name)
        if source.target == "parameter":
            if source.name in self.of_weights:
                self._drop(gradient)
            self.of_weights.add(source.name)
        elif before is None:
            self.gradients[source.name] = gradient
        elif before.holders == 1:
            self._drop(gradient)
        else:
            self.gradients[source.name] = self._fresh(self.sizes[source.name])
            self._drop(before)
            self._drop(gradient)
