"""Make a member's collectives cheaper: dead ops out, small sums together, the rest beside computing.

Every member of a group decides alike, from names and structure alone, so that all send in one order.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from graphpar.ir.chain import writes_buffer
from graphpar.ir.conversions import COLLECTIVES
from graphpar.ir.formats import multiplies_8_bits
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Op, Ref
from graphpar.ir.optable import packet
from graphpar.ir.recomputed import Units, units_of_member

SMALL_BYTES = 1 << 16
"""Sums below this size take as long as their latency; they share one message."""
_SUMS = ("gp.all_reduce", "gp.reduce_copies", "gp.copy_to_group")
_PRODUCTS = frozenset({"linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "gp.late_product"})
_FRESH = _PRODUCTS | {"gp.lookup", "gp.grouped_product", "conv1d", "conv2d", "conv3d", "convolution"}
"""Ops whose result, and the gradient of whose operands, nobody else keeps: a sum may use their place."""


@dataclass(frozen=True)
class FuseComm:
    """Rewrite the collectives of one stage of a member's graph.

    * What nothing reads is removed.
    * Small sums that do not depend on one another go in one message.
    * A collective begins as soon as its operand is there and is awaited at its first reader. In backward
      weights' gradients are computed while the collective before them is on its way.
    * A sum of a value that nobody else reads uses its place.

    What is begun in a unit that is computed again is awaited there too, or the second time would wait
    for what nobody began. The ops of a unit have to stay together: of such units only sums of one unit's
    values are joined, where the first of them stands.

    Attributes:
        stage: The stage to rewrite.
        training: Whether there is a backward.
        again: Ops of the units whose values are computed again for the backward.

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> g = FuseComm(0, True).run(parse_graph('''graph lowered "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[3,4] {grad=true, shard=(0, 1, 3, 3)}
    ... %n = aten.mul.Tensor(%x, %x) : float32[B,4] {grad=true, stage=0}
    ... %c = gp.copy_to_group(%n) : float32[B,4] {grad=true, stage=0}
    ... %y = aten.linear.default(%c, %w) : float32[B,3] {grad=true, stage=0}
    ... %output = output((%y,))
    ... '''))
    >>> for op in g.ops[3:7]: print(format_op(op).split(" : ")[0])
    %c_begun = gp.begin(%n, "gp.copy_to_group", owned=(false, true))
    %w_late_y = gp.late_weight(%w)
    %c = gp.end(%c_begun)
    %y = gp.late_product(%c, %w_late_y, none, true)
    """

    stage: int
    training: bool
    again: Units = ()
    name: str = "fuse_comm"
    takes: Level = "lowered"
    gives: Level = "lowered"

    def run(self, graph: Graph) -> Graph:
        """Build the new graph."""
        graph = _without_dead(graph, self.stage)
        again = units_of_member(graph, self.stage, self.again)
        unit_of = {name: number for number, names in enumerate(again) for name in names}
        graph = _summed_together(graph, self.stage, self.name, unit_of)
        return _Overlap(graph, self).run()


def _without_dead(graph: Graph, stage: int) -> Graph:
    """Ops of the stage whose result reaches nothing that counts."""
    needed: set[str] = set()
    for op in reversed(graph.ops):
        mine = op.attr("stage") == stage and op.target not in SOURCES
        if not mine or op.target == "gp.send" or writes_buffer(op) or op.name in needed:
            needed.add(op.name)
            needed.update(op.operands())
    if len(needed) == len(graph):
        return graph
    return graph.with_ops(op for op in graph.ops if op.name in needed)


def sends(op: Op, training: bool) -> tuple[bool, bool]:
    """Whether an op sends something in forward, and in backward."""
    ahead, behind = COLLECTIVES.get(op.target, (None, None))
    return ahead is not None, behind is not None and training and bool(op.attr("grad"))


# --- small sums in one message ---


def _summed_together(graph: Graph, stage: int, name: str, unit_of: Mapping[str, int]) -> Graph:
    instead: dict[str, list[Op]] = {}
    for bucket in _buckets(graph, stage, unit_of):
        instead.update((op.name, []) for op in bucket)
        instead[bucket[0 if unit_of else -1].name] = _together(bucket, name)
    if not instead:
        return graph
    return graph.with_ops(_sorted([new for op in graph.ops for new in instead.get(op.name, [op])]))


def _together(bucket: Sequence[Op], name: str) -> list[Op]:
    """One sum in place of several, and what takes its results apart under the old names."""
    first = bucket[0]
    joined = Op(
        name=f"{first.name}_together",
        target="gp.sum_together",
        args=(tuple(Ref(op.operands()[0]) for op in bucket), first.target),
        kwargs=first.kwargs,
        types=tuple(op.type for op in bucket),
        is_tuple=True,
        module=first.module,
        source=first.source,
        attrs=first.attrs,
        origin=tuple(op.name for op in bucket),
        made_by=name,
    )
    parts = (
        replace(op, target="getitem", args=(Ref(joined.name), index), kwargs=(), made_by=name)
        for index, op in enumerate(bucket)
    )
    return [joined, *parts]


def _buckets(graph: Graph, stage: int, unit_of: Mapping[str, int]) -> Iterator[list[Op]]:
    """Runs of small sums of one kind, none of which depends on another.

    Where units are computed again, of values of one unit that are all there before the first sum.
    """
    place = {op.name: number for number, op in enumerate(graph.ops)} if unit_of else {}

    def may_join(op: Op, first: Op) -> bool:
        (mine, *_), (its, *_) = op.operands(), first.operands()
        return not unit_of or (unit_of.get(mine) == unit_of.get(its) and place[mine] < place[first.name])

    bucket: list[Op] = []
    behind: set[str] = set()
    for op in graph.ops:
        if any(name in behind for name in op.operands()):
            behind.add(op.name)
        if op.attr("stage") != stage or op.target not in _SUMS:
            continue
        if bucket and op.kwarg("axis") != bucket[0].kwarg("axis"):
            # Whether it is small differs among those that wait for the bucket: members of a line of one
            # axis may have slices of unlike size of what the other axis sums.
            if len(bucket) > 1:
                yield bucket
            bucket, behind = [], set()
        if op.type.bytes(graph.batch) >= SMALL_BYTES:
            continue
        alike = bucket and _kind(bucket[0]) == _kind(op) and op.name not in behind
        alike = alike and may_join(op, bucket[0])
        if not alike:
            if len(bucket) > 1:
                yield bucket
            bucket, behind = [], set()
        bucket.append(op)
        behind.add(op.name)
    if len(bucket) > 1:
        yield bucket


def _kind(op: Op) -> tuple[object, ...]:
    return op.target, op.type.dtype, bool(op.attr("grad")), op.kwarg("axis")


def _sorted(ops: list[Op], keys: Mapping[str, float] | None = None) -> list[Op]:
    """Every op after what it reads, otherwise in the order of the keys."""
    keys = keys or {op.name: float(i) for i, op in enumerate(ops)}
    place = {op.name: (keys[op.name], i) for i, op in enumerate(ops)}
    by_name = {op.name: op for op in ops}
    waiting = {op.name: len(set(op.operands())) for op in ops}
    readers: dict[str, list[str]] = {op.name: [] for op in ops}
    for op in ops:
        for name in set(op.operands()):
            readers[name].append(op.name)
    ready = [(place[name], name) for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    found = []
    while ready:
        _, name = heapq.heappop(ready)
        found.append(by_name[name])
        for reader in readers[name]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (place[reader], reader))
    return found


# --- beside computing ---


@dataclass
class _Window:
    """A collective, and the products whose weights' gradients are computed while it is on its way."""

    op: Op
    begins: float
    ends: float
    products: list[Op]


class _Overlap:
    """One rewriting."""

    def __init__(self, graph: Graph, options: FuseComm) -> None:
        self.graph, self.options = graph, options
        self.mine = [
            op for op in graph.ops if op.attr("stage") == options.stage and op.target not in SOURCES
        ]
        self.place = {op.name: float(i) for i, op in enumerate(graph.ops)}
        self.products = [self.place[op.name] for op in self.mine if _is_product(op)]
        again = units_of_member(graph, options.stage, options.again)
        self.unit_of = {name: number for number, names in enumerate(again) for name in names}
        self.windows = [self._window(op) for op in self.mine if any(sends(op, options.training))]
        if options.training:
            self._fill()

    def run(self) -> Graph:
        """The graph with its collectives in two places where that helps, and sums in place."""
        keys = dict(self.place)
        changed: dict[str, list[Op]] = {}
        late = {}
        for window in self.windows:
            op = window.op
            owned = replace(op, kwargs=(*op.kwargs, *self._owned(op)))
            beside = window.products or self._computes_between(window)
            if not beside or not self._in_one_unit(op):
                changed[op.name] = [owned]
                continue
            begun = f"{op.name}_begun"
            changed[op.name] = [
                replace(
                    owned,
                    name=begun,
                    target="gp.begin",
                    args=(op.args[0], op.target, *op.args[1:]),
                    types=self.graph[op.operands()[0]].types,
                    made_by=self.options.name,
                ),
                replace(op, target="gp.end", args=(Ref(begun),), kwargs=()),
            ]
            keys[begun], keys[op.name] = window.begins, window.ends
            for product in window.products:
                weight = _weight_of(product)
                held = f"{weight}_late_{product.name}"
                late[product.name] = (held, self._late_weight(weight, held))
                keys[held] = window.begins
                if weight not in self.graph or self.graph[weight].target not in SOURCES:
                    keys[weight] = min(keys[weight], window.begins)
        ops: list[Op] = []
        for op in self.graph.ops:
            if op.name in late:
                held, weight_op = late[op.name]
                ops += [weight_op, self._late_product(op, held)]
            else:
                ops += changed.get(op.name, [op])
        return self.graph.with_ops(_sorted(ops, keys))

    def _window(self, op: Op) -> _Window:
        """Begun behind its operand; a weight's a product ahead. Ended where it is read first."""
        source = self.graph[op.operands()[0]]
        if source.target in SOURCES:
            before = bisect_left(self.products, self.place[op.name])
            begins = self.products[before - 2] + 0.1 if before > 1 else self.place[self.mine[0].name]
        else:
            begins = self.place[source.name] + 0.1
        readers = [self.place[user.name] for user in self.graph.users(op.name)]
        return _Window(op, begins, min(readers, default=self.place[op.name]) - 0.1, [])

    def _in_one_unit(self, op: Op) -> bool:
        """Whether a collective may be begun right behind its operand and awaited at its first reader."""
        if not self.options.again:
            return True
        first = min(self.graph.users(op.name), key=lambda user: self.place[user.name], default=op)
        return not self._on_weight(op) and self._unit_before(op) == self.unit_of.get(first.name)

    def _unit_before(self, op: Op) -> int | None:
        """The unit that makes what an op reads first."""
        return self.unit_of.get(op.operands()[0])

    def _computes_between(self, window: _Window) -> bool:
        """Whether a product stands between the collective's two places."""
        behind = bisect_right(self.products, window.begins)
        return behind < len(self.products) and self.products[behind] < window.ends

    def _fill(self) -> None:
        """Give each product's late gradient to a collective that is on its way in backward.

        What reads a collective's result fills that one; any other product fills the one before.
        """
        windows = {
            w.op.name: w for w in self.windows if sends(w.op, True)[1] and not self._on_weight(w.op)
        }
        by_unit: dict[int | None, list[_Window]] = {}
        for op in self.mine:
            earlier = by_unit.get(self.unit_of.get(op.name))
            if earlier and self._may_be_late(op):
                direct = _rows_of(op) == earlier[-1].op.name
                earlier[-1 if direct or len(earlier) == 1 else -2].products.append(op)
            if op.name in windows and self._in_one_unit(op):
                by_unit.setdefault(self._unit_before(op), []).append(windows[op.name])

    def _on_weight(self, op: Op) -> bool:
        return self.graph[op.operands()[0]].target in SOURCES

    def _may_be_late(self, op: Op) -> bool:
        plain = packet(op) == "linear" or (packet(op) in ("addmm", "mm") and not op.kwargs)
        # Not those that the schedule puts off further, nor those that make both gradients at once.
        if not plain or op.attr("late") or multiplies_8_bits(op):
            return False
        weight = _weight_of(op)
        source = self.graph[weight]
        if source.target == "gp.cast_weight":
            source = self.graph[source.operands()[0]]
        rows = self.graph[_rows_of(op)]
        return source.target == "parameter" and bool(source.attr("grad")) and rows.target != "parameter"

    def _late_weight(self, weight: str, name: str) -> Op:
        return Op(
            name=name,
            target="gp.late_weight",
            args=(Ref(weight),),
            types=self.graph[weight].types,
            made_by=self.options.name,
        ).with_attrs(grad=True, stage=self.options.stage)

    def _late_product(self, op: Op, held: str) -> Op:
        is_linear = packet(op) == "linear"
        bias = op.argument(2, "bias") if is_linear else (op.args[0] if packet(op) == "addmm" else None)
        args = (Ref(_rows_of(op)), Ref(held), bias, is_linear)
        return replace(op, target="gp.late_product", args=args, kwargs=(), made_by=self.options.name)

    def _owned(self, op: Op) -> tuple[tuple[str, tuple[bool, bool]], ...]:
        """Whether a sum may use its operand's place, and in backward its gradient's."""
        if op.target not in _SUMS:
            return ()
        operand = op.operands()[0]
        ahead = packet(self.graph[operand]) in _FRESH and len(self.graph.users(operand)) == 1
        readers = self.graph.users(op.name)
        behind = bool(readers) and all(
            _is_product(r) and r.operands().count(op.name) == 1 for r in readers
        )
        return (("owned", (ahead, behind)),)


def _is_product(op: Op) -> bool:
    return packet(op) in _PRODUCTS


def _rows_of(op: Op) -> str:
    """What a product multiplies its weight with."""
    return op.operands()[1 if packet(op) == "addmm" else 0] if op.operands() else ""


def _weight_of(op: Op) -> str:
    return op.operands()[2 if packet(op) == "addmm" else 1]
