"""Ties of ops that take apart, join, pool, contract or compare: rules as in `links`, op by op."""

from collections.abc import Iterator
from string import ascii_letters

from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op
from graphpar.ir.optable import packet
from graphpar.ir.tie import RESULT, Link, Rule, Side, as_dims, dim_of, shape_of


def _all_results(op: Op, dim: int) -> tuple[Side, ...]:
    return tuple(Side(-1 - i, (dim,)) for i, t in enumerate(op.types) if t is not None)


def _unbind(op: Op, graph: Graph) -> Iterator[Link]:
    rank = len(shape_of(op, graph, 0))
    dim = dim_of(op.argument(1, "dim", 0), rank)
    for d in range(rank):
        if d != dim:
            yield Link((Side(0, (d,)), *_all_results(op, d - (d > dim))))


def _stack(op: Op, graph: Graph) -> Iterator[Link]:
    rank = len(shape_of(op, graph, RESULT))
    dim = dim_of(op.argument(1, "dim", 0), rank)
    for d in range(rank):
        if d != dim:
            operands = (Side(slot, (d - (d > dim),)) for slot in range(len(op.operands())))
            yield Link((Side(RESULT, (d,)), *operands))


def _broadcast_tensors(op: Op, graph: Graph) -> Iterator[Link]:
    result = shape_of(op, graph, RESULT)
    for d, size in enumerate(result):
        sides = [*_all_results(op, d)]
        for slot in range(len(op.operands())):
            shape = shape_of(op, graph, slot)
            own = d - len(result) + len(shape)
            if own >= 0 and shape[own] == size:
                sides.append(Side(slot, (own,)))
        if size != 1:
            yield Link(tuple(sides))


def _comparison(op: Op, graph: Graph) -> Iterator[Link]:
    """A loss of two equal shapes: element by element, or the sum of that."""
    first, second = shape_of(op, graph, 0), shape_of(op, graph, 1)
    reduction = op.argument(2, "reduction", 1)
    if first != second or reduction not in (0, 2):
        return
    for d in range(len(first)):
        result = (Side(RESULT, (d,)),) if reduction == 0 else ()
        yield Link((*result, Side(0, (d,)), Side(1, (d,))), reduction == 2)


def _but_last(count: int) -> Rule:
    """All dimensions but the last few, the same in every result."""

    def rule(op: Op, graph: Graph) -> Iterator[Link]:
        for d in range(len(shape_of(op, graph, 0)) - count):
            yield Link((Side(0, (d,)), *_all_results(op, d)))

    return rule


def _but(position: int, key: str) -> Rule:
    """All dimensions but those that an argument names; without it none is left."""

    def rule(op: Op, graph: Graph) -> Iterator[Link]:
        rank = len(shape_of(op, graph, 0))
        blocked = as_dims(op.argument(position, key), rank)
        for d in range(rank):
            if d not in blocked:
                yield Link((Side(0, (d,)), *_all_results(op, d)))

    return rule


def _gone(keep_position: int) -> Rule:
    """A reduction that is no sum: what it leaves may be cut, what it reduces may not."""

    def rule(op: Op, graph: Graph) -> Iterator[Link]:
        rank = len(shape_of(op, graph, 0))
        given = op.argument(1, "dim")
        gone = as_dims(given, rank) if given is not None else tuple(range(rank))
        keep = op.argument(keep_position, "keepdim", False) is True
        place = 0
        for d in range(rank):
            if d not in gone:
                yield Link((Side(0, (d,)), *_all_results(op, place)))
            place += keep or d not in gone

    return rule


def _gather(op: Op, graph: Graph) -> Iterator[Link]:
    source, index = shape_of(op, graph, 0), shape_of(op, graph, 1)
    dim = dim_of(op.argument(1, "dim"), len(source))
    for d in range(len(source)):
        if d != dim and source[d] == index[d]:
            yield Link((Side(RESULT, (d,)), Side(0, (d,)), Side(1, (d,))))


def _einsum(op: Op, graph: Graph) -> Iterator[Link]:
    """Every letter is a loop; one that the result lacks is summed over."""
    equation = op.args[0]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return
    left, result = equation.replace(" ", "").split("->")
    terms = left.split(",")
    if any(len(set(t)) != len(t) for t in (*terms, result)):
        return
    for letter in sorted(set(left) & set(ascii_letters)):
        sides = [Side(slot, (t.index(letter),)) for slot, t in enumerate(terms) if letter in t]
        if letter in result:
            yield Link((Side(RESULT, (result.index(letter),)), *sides))
        elif len(sides) > 1:
            yield Link(tuple(sides), True)


def _repeat(op: Op, graph: Graph) -> Iterator[Link]:
    """Dimensions that are repeated once."""
    before, after = shape_of(op, graph, 0), shape_of(op, graph, RESULT)
    for d, size in enumerate(after):
        own = d - len(after) + len(before)
        if own >= 0 and before[own] == size:
            yield Link((Side(RESULT, (d,)), Side(0, (own,))))


def _halves(op: Op, graph: Graph) -> Iterator[Link]:
    """A gated linear unit joins the two halves of one dimension."""
    rank = len(shape_of(op, graph, 0))
    dim = dim_of(op.argument(1, "dim", -1), rank)
    for d in range(rank):
        if d == dim:
            yield Link((Side(0, (d,), lead=2), Side(RESULT, (d,))))
        else:
            yield Link((Side(0, (d,)), Side(RESULT, (d,))))


MORE_RULES: dict[str, Rule] = {
    "unbind": _unbind, "stack": _stack, "broadcast_tensors": _broadcast_tensors, "gather": _gather,
    "einsum": _einsum, "glu": _halves, "repeat": _repeat, "roll": _but(2, "dims"),
    **dict.fromkeys("mse_loss l1_loss smooth_l1_loss huber_loss".split(), _comparison),
    **dict.fromkeys("tril triu max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d".split(),
                    _but_last(2)),
    **dict.fromkeys("max_pool1d avg_pool1d adaptive_avg_pool1d".split(), _but_last(1)),
    **dict.fromkeys("upsample_nearest2d upsample_bilinear2d".split(), _but_last(2)),
    "flip": _but(1, "dims"), "cumprod": _but(1, "dim"), "logcumsumexp": _but(1, "dim"),
    **dict.fromkeys("logsumexp prod any all".split(), _gone(2)),
    **dict.fromkeys("max min argmax argmin".split(), _gone(2)),
}  # fmt: skip
"""By packet."""


def rule_for(op: Op) -> Rule | None:
    """The rule of one of these ops; None for any other."""
    name = packet(op)
    if name in ("max", "min") and len(op.operands()) > 1:
        return None
    return MORE_RULES.get(name)
