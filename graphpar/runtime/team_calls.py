"""What a member of a tensor group asks of the others, in order, read off its graph before anything runs.

Members wait for one another in every collective. If one of them asks for another one, or for one more,
the job hangs or adds up what does not belong together; so their orders are compared beforehand. Which
collectives a backward has depends on what a gradient reaches: autograd runs nodes in the reverse order
of their making, those on a way from the results to something trained.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from graphpar.errors import VerifyError
from graphpar.ir.conversions import COLLECTIVES
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import line_of
from graphpar.ir.ops import SOURCES, Argument, Dim, Op, TensorType
from graphpar.ir.optable import packet
from graphpar.ir.recomputed import Units, units_of_member
from graphpar.ir.text import format_op
from graphpar.runtime.lower import interface, stage_ops
from graphpar.runtime.recompute import UnitPart, cut_out

_SHOWN = 10
_ONE_BY_ONE = ("broadcast_tensors", "meshgrid")
"""Ops that make each of their results of one operand."""


@dataclass(frozen=True)
class TeamCall:
    """One call that all members have to make together.

    Attributes:
        kind: `sum`, `maximum` or `exchange`, as in `Team`.
        types: What is summed or exchanged; sizes of cut dimensions, which differ by member, are -1.
        cuts: Dimension, units of each member and inner size of each cut of an exchange.
        phase: `forward`, `backward`, or `again` where a unit is computed again.
        op: Name of the op that makes the call.
        axis: Along which axis of a mesh, with the members of that line; None for the whole group.
    """

    kind: str
    types: tuple[TensorType, ...]
    cuts: tuple[Argument, ...] = ()
    phase: str = "forward"
    op: str = ""
    axis: int | None = None

    def __str__(self) -> str:
        cut = f" cut {self.cuts}" if self.cuts else ""
        along = f" along axis {self.axis}" if self.axis is not None else ""
        return f"{self.phase} {self.kind} of {', '.join(map(str, self.types))}{cut}{along} by %{self.op}"

    def meets(self, other: "TeamCall", axis: int | None) -> bool:
        """Whether a member that differs along an axis alone makes the call that belongs to this one.

        Along the other axis it does so with others, who have slices of another size.
        """
        if self.axis in (None, axis):
            return replace(self, op=other.op) == other
        return (self.kind, self.phase, self.axis) == (other.kind, other.phase, other.axis)


def team_calls(graph: Graph, stage: int, *, training: bool, units: Units = ()) -> tuple[TeamCall, ...]:
    """What one microbatch makes a member ask of its group, forward and then backward.

    Args:
        graph: The member's graph.
        stage: The stage that is shared.
        training: Whether there is a backward.
        units: Ops of the units that are computed again, as in the captured graph.

    >>> from graphpar.ir.text import parse_graph
    >>> g = parse_graph('''graph lowered "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[4,2] {grad=true, shard=(1, 1, 2, 2)}
    ... %h = gp.take_part(%x, 1, (2, 2), 1) : float32[B,2] {stage=0}
    ... %y = aten.linear.default(%h, %w) : float32[B,4] {grad=true, stage=0}
    ... %y__whole = gp.all_reduce(%y) : float32[B,4] {grad=true, stage=0}
    ... %output = output((%y__whole,))
    ... ''')
    >>> for call in team_calls(g, 0, training=True): print(call)
    forward sum of float32[B,4] by %y__whole
    """
    ops = stage_ops(graph, stage)
    results = [name for _, name in interface(graph, stage).results]
    again = units_of_member(graph, stage, units)
    items: Sequence[Op | UnitPart] = ops
    if again and not any(op.attr("tail") for op in ops):
        buffers = {op.name: op for op in ops if op.target == "buffer"}
        items = cut_out(ops, again, results, buffers)
    ordered = list(chain.from_iterable(i.ops if isinstance(i, UnitPart) else (i,) for i in items))
    found = list(_ahead(graph, ordered))
    if training:
        found += _backward(graph, items, ordered, results)
    return tuple(found)


def check_in_step(
    graphs: Sequence[Graph],
    stage: int,
    *,
    training: bool,
    units: Units = (),
    mesh: tuple[int, ...] = (),
) -> None:
    """Compare what the members of a group ask of each other.

    Args:
        graphs: The members' graphs.
        stage: The stage that they share.
        training: Whether there is a backward.
        units: Ops of the units that are computed again.
        mesh: Members along each axis of a group of two.

    Raises:
        VerifyError: They differ; names the first call that does, and the ops around.
    """
    first = [next(k for k, other in enumerate(graphs) if _alike(graph, other)) for graph in graphs]
    calls = {k: team_calls(graphs[k], stage, training=training, units=units) for k in set(first)}
    for before, member, axis in _neighbours(len(graphs), mesh):
        if first[before] == first[member]:
            continue
        pairs = zip_longest(calls[first[before]], calls[first[member]])
        for number, (a, b) in enumerate(pairs):
            if a is None or b is None or not a.meets(b, axis):
                shown = (_shown(graphs[k], k, call) for k, call in ((before, a), (member, b)))
                raise VerifyError(
                    f"pass shard: the members of a tensor group do not ask the same of each other in "
                    f"stage {stage}; the job would wait for ever, so it is not started. This is a bug "
                    "of graphpar, please report it; tensor=1 plans without groups. Call "
                    f"{number + 1} differs:\n" + "\n".join(shown)
                )


def _neighbours(size: int, mesh: tuple[int, ...]) -> Iterator[tuple[int, int, int | None]]:
    """Each member with the first one of every line it stands in, and the axis of the line."""
    for member in range(size):
        for axis in range(len(mesh)):
            yield line_of(member, axis, mesh)[0], member, axis
        if not mesh:
            yield 0, member, None


def _alike(a: Graph, b: Graph) -> bool:
    """Whether two members run the same ops but for where their units begin."""
    return len(a) == len(b) and all(
        x is y
        or (
            (x.name, x.target, x.operands(), x.types) == (y.name, y.target, y.operands(), y.types)
            and x.attrs == y.attrs
            and x.target != "gp.begin"
            and x.target not in COLLECTIVES
        )
        for x, y in zip(a.ops, b.ops, strict=True)
    )


def _shown(graph: Graph, member: int, call: TeamCall | None) -> str:
    lines = [f"  member {member}: {call or 'nothing more'}"]
    if call is not None:
        near = graph.position[call.op]
        around = graph.ops[max(0, near - _SHOWN // 2) : near + _SHOWN // 2]
        lines += (f"    {format_op(op)}" for op in around)
    return "\n".join(lines)


def _ahead(graph: Graph, ops: Iterable[Op], phase: str = "forward") -> Iterator[TeamCall]:
    """Calls of ops in their order, a collective where it is begun."""
    for op in ops:
        if op.target == "gp.class_loss":
            rows = graph[op.operands()[0]].type.shape[0]
            yield _numbers("maximum", (rows,), op, phase)
            yield _numbers("sum", (2, rows), op, phase)
        else:
            ahead, _ = _ends(op)
            if ahead and op.target != "gp.end":
                yield _call(graph, op, ahead, phase)


def _backward(
    graph: Graph, items: Sequence[Op | UnitPart], ordered: Sequence[Op], results: Sequence[str]
) -> Iterator[TeamCall]:
    """Calls of the backward, units computed again where it first comes to them."""
    reached = _reached(ordered, results)
    for item in reversed(items):
        ops = [op for op in (item.ops if isinstance(item, UnitPart) else (item,)) if op.name in reached]
        if ops and isinstance(item, UnitPart):
            yield from _ahead(graph, item.ops, "again")
        for op in reversed(ops):
            begun = graph[op.operands()[0]] if op.target == "gp.end" else op
            _, behind = _ends(begun)
            if behind and op.target != "gp.begin":
                yield _call(graph, begun, behind, "backward")


def _reached(ops: Sequence[Op], results: Iterable[str]) -> set[str]:
    """Ops whose node the backward runs: from a result or a message, towards something trained."""
    live: set[str] = set()
    ops_by_name = {op.name: op for op in ops}
    for op in ops:
        trained = op.target in ("parameter", "gp.recv", "gp.collect")
        if op.attr("grad") and (trained or any(name in live for name in _followed(op, ops_by_name))):
            live.add(op.name)
    reached = {name for name in results if name in live}
    for op in reversed(ops):
        if (op.target in ("gp.send", "gp.collect") and op.attr("grad")) or op.name in reached:
            reached.update(name for name in _followed(op, ops_by_name) if name in live)
    return reached - {op.name for op in ops if op.target in SOURCES}


def _followed(op: Op, ops: Mapping[str, Op]) -> tuple[str, ...]:
    """What an op's gradient goes to; a part of a tuple that was made one by one goes to its own."""
    source = ops.get(op.operands()[0]) if op.target == "getitem" else None
    if source is not None and packet(source) in _ONE_BY_ONE and isinstance(op.args[1], int):
        return (source.operands()[op.args[1]],)
    return op.operands()


def _ends(op: Op) -> tuple[str | None, str | None]:
    """What an op sends in forward and in backward."""
    target = op.args[1] if op.target in ("gp.begin", "gp.sum_together") else op.target
    return COLLECTIVES.get(str(target), (None, None))


def _call(graph: Graph, op: Op, collective: str, phase: str) -> TeamCall:
    if op.target == "gp.sum_together":
        types = tuple(t for t in op.types if t is not None)
        return TeamCall("sum", types, (), phase, op.name, _axis(op))
    cuts = op.args[2:] if op.target == "gp.begin" else op.args[1:]
    dims = {dim for dim in cuts[::3] if isinstance(dim, int)}
    given = graph[op.operands()[0]].type
    shape: tuple[Dim, ...] = tuple(-1 if d in dims else size for d, size in enumerate(given.shape))
    kind = "sum" if collective == "all_reduce" else "exchange"
    return TeamCall(kind, (TensorType(shape, given.dtype),), cuts, phase, op.name, _axis(op))


def _numbers(kind: str, shape: tuple[Dim, ...], op: Op, phase: str) -> TeamCall:
    return TeamCall(kind, (TensorType(shape, "float32"),), (), phase, op.name, _axis(op))


def _axis(op: Op) -> int | None:
    axis = op.kwarg("axis")
    return axis if isinstance(axis, int) else None
