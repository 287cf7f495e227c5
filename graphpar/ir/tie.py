"""What a rule about an op says: which dimensions run together (`links` has the rules)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graphpar.ir.graph import Graph
from graphpar.ir.ops import Dim, Op, Ref, TensorType


@dataclass(frozen=True)
class Side:
    """Dimensions of one value, the outermost first.

    Attributes:
        slot: Number of the operand; `-1 - i` for result i.
        dims: The dimensions, together one product.
        lead: A factor before them that the other sides lack: the number of chunks of a split.
        tail: A factor after them that the other sides lack: query heads per key head.
    """

    slot: int
    dims: tuple[int, ...]
    lead: int = 1
    tail: int = 1


@dataclass(frozen=True)
class Link:
    """Sides that run together.

    Attributes:
        sides: The values they are dimensions of.
        reduces: Results without the dimension are sums over it.
        special: How a member computes its part where that takes an op of our own: `lookup`,
            `classes`, `experts`.
        first_only: Operands that enter once, not once for each member: a bias beside a sum.
    """

    sides: tuple[Side, ...]
    reduces: bool = False
    special: str = ""
    first_only: tuple[int, ...] = ()


RESULT = -1
Rule = Callable[[Op, Graph], Iterator[Link]]


def shape_of(op: Op, graph: Graph, slot: int) -> tuple[Dim, ...]:
    """Shape of the value in a slot."""
    kind = op.types[-1 - slot] if slot < 0 else graph[op.operands()[slot]].types[0]
    return kind.shape if isinstance(kind, TensorType) else ()


def slot_of(op: Op, position: int, key: str = "") -> int | None:
    """Number of the operand that an argument is; None where it is no tensor."""
    wanted = op.argument(position, key)
    if not isinstance(wanted, Ref):
        return None
    before = 0
    for index, argument in enumerate((*op.args, *(v for _, v in op.kwargs))):
        given = index == position or (index >= len(op.args) and op.kwargs[index - len(op.args)][0] == key)
        if given and argument == wanted:
            return before
        before += sum(1 for _ in _refs(argument))
    return None


def _refs(argument: object) -> Iterator[Ref]:
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _refs(item)


def dim_of(value: object, rank: int) -> int:
    """A dimension counted from the front."""
    return value % rank if isinstance(value, int) and rank else 0


def as_dims(value: object, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front; all of them where none is named."""
    if value is None:
        return tuple(range(rank))
    listed = value if isinstance(value, tuple) else (value,)
    return tuple(dim_of(d, rank) for d in listed) or tuple(range(rank))
