"""Units whose values are computed again for the backward, and what a member has of them besides."""

from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES

Units = tuple[tuple[str, ...], ...]
"""Names of the ops of each unit that is computed again."""

_SENDS_NOTHING_AHEAD = ("gp.copy_to_group", "gp.take_shard", "gp.take_part")


def units_of_member(graph: Graph, stage: int, units: Units) -> Units:
    """The units with what a member's graph has besides: collectives and what holds their places.

    A value that another unit made is sent once, before the unit that reads it, and kept as it arrived.
    What is made of weights alone (a weight that is gathered for a product) is made anew instead of kept,
    and so is what only takes a part of a value.

    Args:
        graph: A member's graph.
        stage: Which stage of it.
        units: Ops of each unit in the graph that was rewritten.

    >>> from graphpar.ir.text import parse_graph
    >>> g = parse_graph('''graph lowered "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[2,4] {grad=true, shard=(0, 1, 2, 2)}
    ... %a = aten.neg.default(%x) : float32[B,4] {grad=true, stage=0}
    ... %a__copied = gp.copy_to_group(%a) : float32[B,4] {grad=true, stage=0}
    ... %w__whole = gp.all_gather(%w, 0, (2, 2), 1) : float32[4,4] {grad=true, stage=0}
    ... %y = aten.linear.default(%a__copied, %w__whole) : float32[B,4] {grad=true, stage=0}
    ... %output = output((%y,))
    ... ''')
    >>> units_of_member(g, 0, (("a",), ("y",)))
    (('a',), ('y', 'w__whole', 'a__copied'))
    """
    unit_of = {name: number for number, names in enumerate(units) for name in names}
    own = [op for op in graph.ops if op.attr("stage") == stage and op.target not in SOURCES]
    of_weights = {op.name for op in graph.ops if op.target in SOURCES and op.target != "input"}
    for op in own:
        if op.operands() and all(name in of_weights for name in op.operands()):
            of_weights.add(op.name)
    more: list[list[str]] = [[] for _ in units]
    for op in reversed(own):
        free = op.target in _SENDS_NOTHING_AHEAD or op.name in of_weights
        readers = {unit_of.get(user.name) for user in graph.users(op.name)}
        if op.name in unit_of or not free or len(readers) != 1:
            continue
        (number,) = readers
        if number is not None:
            unit_of[op.name] = number
            more[number].append(op.name)
    return tuple((*names, *others) for names, others in zip(units, more, strict=True))
