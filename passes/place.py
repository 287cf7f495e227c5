"""Give every op its stage; repeat free ops wherever they are needed."""

from dataclasses import dataclass, replace

from graphpar.errors import VerifyError
from graphpar.ir.chain import build_chain
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Op, Ref, map_arguments
from graphpar.ir.whole import WHOLE_PREFIX


@dataclass(frozen=True)
class Place:
    """Assign ops to the stages of one pipeline.

    Attributes:
        stage_of_unit: For each unit of the graph's chain the stage that runs it, never decreasing.

    >>> from graphpar.ir.text import format_graph, parse_graph
    >>> g = parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("a.weight") : float32[4,4]
    ... %v = parameter("b.weight") : float32[4,4]
    ... %h = aten.linear.default(%x, %w) : float32[B,4]
    ... %y = aten.linear.default(%h, %v) : float32[B,4]
    ... %output = output((%y,))
    ... ''')
    >>> [op.attr("stage") for op in Place((0, 1)).run(g) if op.target.startswith("aten")]
    [0, 1]
    """

    stage_of_unit: tuple[int, ...]
    name: str = "place"
    takes: Level = "captured"
    gives: Level = "placed"

    def run(self, graph: Graph) -> Graph:
        """Build the placed graph.

        Raises:
            VerifyError: The stages do not fit the graph's chain.
        """
        chain = build_chain(graph)
        if len(self.stage_of_unit) != len(chain.units):
            raise VerifyError(
                f"Pass place was given stages for {len(self.stage_of_unit)} units, "
                f"but the graph has {len(chain.units)}."
            )
        stages = {
            name: stage
            for unit, stage in zip(chain.units, self.stage_of_unit, strict=True)
            for name in unit.ops
        }
        return graph.with_ops(place_ops(graph, stages, self.name), level="placed")


Where = tuple[int, bool]
"""A stage, and whether it is about its tail."""


def place_ops(graph: Graph, stages: dict[str, int], made_by: str) -> list[Op]:
    """Ops with stages; those without one (free ops) are repeated in each stage that reads them.

    So are ops that make a number of a tensor (`item`), for no message carries a number.
    The tail runs in the last stage. What it reads of the parts of the batch it reads through
    `gp.collect`, and it repeats free ops on the whole batch for itself.
    """
    last = max(stages.values(), default=0)
    stages = {name: stage for name, stage in stages.items() if not _is_number(graph, name)}
    wanted = _places_that_read(graph, stages, last)
    placed: list[Op] = []
    copies: dict[tuple[str, Where], str] = {}
    for op in graph.ops:
        if op.target in SOURCES:
            placed.append(op)
        elif op.target == "output":
            placed.append(_placed_output(op, graph, copies, placed, last, made_by))
        elif op.target == "gp.whole_batch":
            placed.append(_whole_input(op, made_by))
        elif op.name in stages and not op.attr("tail"):
            where = stages[op.name], False
            placed.append(_renamed(op, where, copies).with_attrs(stage=where[0]))
        else:
            places = {(last, True)} if op.name in stages else wanted[op.name]
            for where in sorted(places):
                if where[1]:
                    placed += _collected(op, graph, stages, last, copies, made_by)
                name = op.name if where == min(places) else f"{op.name}__{_called(where)}"
                copies[op.name, where] = name
                copy = replace(_renamed(op, where, copies), name=name)
                if op.name not in stages:
                    copy = replace(copy, origin=op.origin or (op.name,))
                copy = copy.with_attrs(stage=where[0])
                placed.append(copy.with_attrs(tail=True) if where[1] else copy)
    return placed


def _is_number(graph: Graph, name: str) -> bool:
    """Whether an op makes something that is no tensor, which others read."""
    return not graph[name].types and not graph[name].is_tuple and bool(graph.users(name))


def _called(where: Where) -> str:
    return "tail" if where[1] else f"stage{where[0]}"


def _collected(
    op: Op,
    graph: Graph,
    stages: dict[str, int],
    last: int,
    copies: dict[tuple[str, Where], str],
    made_by: str,
) -> list[Op]:
    """What has to be collected before an op of the tail can read it."""
    found: list[Op] = []
    for name in dict.fromkeys(op.operands()):
        made, here = graph[name], (last, True)
        if name not in stages or made.attr("tail") or (name, here) in copies:
            continue
        collect = replace(
            made,
            name=f"{name}__whole",
            target="gp.collect",
            args=(Ref(name),),
            kwargs=(),
            origin=made.origin or (name,),
            made_by=made_by,
        )
        kept = {k: v for k, v in made.attrs if k in ("grad", "samples", "outer")}
        found.append(replace(collect, attrs=()).with_attrs(**kept, stage=last, tail=True))
        copies[name, here] = collect.name
    return found


def _places_that_read(graph: Graph, stages: dict[str, int], last: int) -> dict[str, set[Where]]:
    """For each free op the places that need it, directly or through other free ops."""
    wanted: dict[str, set[Where]] = {}
    for op in reversed(graph.ops):
        if op.target in SOURCES:
            continue
        needs = {(last, False)} if op.target == "output" else wanted.setdefault(op.name, set())
        if op.name in stages or op.attr("tail"):
            needs = {(last, True) if op.attr("tail") else (stages[op.name], False)}
        if op.target == "gp.whole_batch":
            needs = set()
        for operand in op.operands():
            if operand not in stages:
                in_tail = op.target == "output" and bool(graph[operand].attr("tail"))
                places = {(last, in_tail)} if op.target == "output" else needs
                wanted.setdefault(operand, set()).update(places)
        if op.target not in ("output", "gp.whole_batch") and op.name not in stages:
            wanted[op.name] = needs
    return wanted


def _renamed(op: Op, where: Where, copies: dict[tuple[str, Where], str]) -> Op:
    change = {o: copies[o, where] for o in op.operands() if (o, where) in copies}
    return map_arguments(op, change) if change else op


def _whole_input(op: Op, made_by: str) -> Op:
    return replace(op, target="input", args=(WHOLE_PREFIX + op.name,), made_by=made_by, origin=op.origin)


def _placed_output(
    op: Op,
    graph: Graph,
    copies: dict[tuple[str, Where], str],
    placed: list[Op],
    last: int,
    made_by: str,
) -> Op:
    """The output; results that are bare inputs or parameters become a copy in the last stage."""
    change: dict[str, str] = {}
    for name in op.operands():
        source = graph[name]
        if source.target in SOURCES and name not in change:
            copy = replace(
                source,
                name=f"{name}__result",
                target="aten.alias.default",
                args=(Ref(name),),
                origin=(name,),
                made_by=made_by,
            )
            placed.append(copy.with_attrs(stage=last))
            change[name] = copy.name
    op = map_arguments(op, change) if change else op
    in_tail = {o: (last, bool(graph[o].attr("tail"))) for o in op.operands() if o in graph}
    return map_arguments(op, {o: copies[o, w] for o, w in in_tail.items() if (o, w) in copies})
