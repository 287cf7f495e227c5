"""The graphs of all members of a tensor group: equal members are rewritten once."""

from collections.abc import Callable, Hashable

from graphpar.ir.graph import Graph
from graphpar.ir.mesh import coords_of
from graphpar.ir.recomputed import Units
from graphpar.ir.shards import Split
from graphpar.passes.fuse import FuseComm
from graphpar.passes.shard import Shard
from graphpar.passes.shard_args import moved


def member_stages(
    graph_of: Callable[[int], Graph], shard: Shard, size: int, training: bool, again: Units = ()
) -> list[Graph]:
    """What each member of a group runs of a stage, its collectives rewritten.

    Members that hold as much of everything run the same ops; only what counts from the member's own
    first unit on (rows of a table, say) is told to each.

    Args:
        graph_of: By member the lowered graph that it rewrites.
        shard: How the stage is shared, for any member.
        size: Members.
        training: Whether there is a backward.
        again: Ops of the stage's units whose values are computed again for the backward.

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> from graphpar.ir.strategies import strategies_of
    >>> g = parse_graph('''graph lowered "N" batch=2
    ... %x = input("x") : int64[B]
    ... %w = parameter("w") : float32[6,4] {grad=true}
    ... %y = aten.embedding.default(%w, %x) : float32[B,4] {grad=true, stage=0}
    ... %output = output((%y,))
    ... ''')
    >>> rows = next(s for s in strategies_of(g, (1, 1, 1))["y"] if s.special)
    >>> shard = Shard(0, 0, {"y": rows}, weights={"w": rows.operands[0]})
    >>> for local in member_stages(lambda member: g, shard, 3, True): print(local["y"].args[2])
    0
    2
    4
    """
    done: dict[Hashable, tuple[Graph, Graph]] = {}
    stages = []
    sizes = tuple(axis.size for axis in shard.axes)
    for member in range(size):
        graph = graph_of(member)
        key = _likeness(shard, member)
        if key not in done or done[key][0] is not graph:
            local = shard.at(coords_of(member, sizes) if shard.inner is not None else (member,)).run(
                graph
            )
            done[key] = graph, FuseComm(shard.stage, training, again).run(local)
            stages.append(done[key][1])
        else:
            stages.append(_moved(done[key][1], shard, member))
    return stages


def _likeness(shard: Shard, member: int) -> Hashable:
    """Members of equal likeness have equal ops but for where their units begin."""
    if shard.inner is not None:
        return member
    layouts = {*shard.weights.values(), *shard.forms.values()}
    for strategy in set(shard.chosen.values()):
        layouts.update((*strategy.operands, *strategy.results))
    counts = {layout.counts for layout in layouts if isinstance(layout, Split)}
    if any(layout.of_batch for layout in layouts if isinstance(layout, Split)):
        return member  # sizes name the member whose samples they count
    takes_all = member == 0 and (
        bool(shard.partial) or any(s.first_only or "copied" in s.operands for s in shard.chosen.values())
    )
    return takes_all, tuple(each[member] for each in sorted(counts))


def _moved(graph: Graph, shard: Shard, member: int) -> Graph:
    """A member's graph for another one that is like it."""
    ops = [moved(op, shard.chosen.get(op.name), member) for op in graph.ops]
    if all(a is b for a, b in zip(ops, graph.ops, strict=True)):
        return graph
    return graph.with_ops(ops)
