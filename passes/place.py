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


def place_ops(graph: Graph, stages: dict[str, int], made_by: str) -> list[Op]:
    """Ops with stages; those without one (free ops) are repeated in each stage that reads them."""
    last = max(stages.values(), default=0)
    wanted = _stages_that_read(graph, stages, last)
    placed: list[Op] = []
    copies: dict[tuple[str, int], str] = {}
    for op in graph.ops:
        if op.target in SOURCES:
            placed.append(op)
        elif op.target == "output":
            placed.append(_placed_output(op, graph, copies, placed, last, made_by))
        elif op.target == "gp.whole_batch":
            placed.append(_whole_input(op, made_by))
        elif op.name in stages:
            stage = stages[op.name]
            placed.append(_renamed(op, stage, copies).with_attrs(stage=stage))
        else:
            for stage in sorted(wanted[op.name]):
                name = op.name if stage == min(wanted[op.name]) else f"{op.name}__stage{stage}"
                copies[op.name, stage] = name
                copy = replace(_renamed(op, stage, copies), name=name, origin=op.origin or (op.name,))
                placed.append(copy.with_attrs(stage=stage))
    return placed


def _stages_that_read(graph: Graph, stages: dict[str, int], last: int) -> dict[str, set[int]]:
    """For each free op the stages that need it, directly or through other free ops."""
    wanted: dict[str, set[int]] = {}
    for op in reversed(graph.ops):
        if op.target in SOURCES:
            continue
        needs = {last} if op.target == "output" else wanted.setdefault(op.name, set())
        if op.name in stages:
            needs = {stages[op.name]}
        if op.target == "gp.whole_batch":
            needs = set()
        for operand in op.operands():
            if operand not in stages:
                wanted.setdefault(operand, set()).update(needs)
    return wanted


def _renamed(op: Op, stage: int, copies: dict[tuple[str, int], str]) -> Op:
    change = {o: copies[o, stage] for o in op.operands() if (o, stage) in copies}
    return map_arguments(op, change) if change else op


def _whole_input(op: Op, made_by: str) -> Op:
    return replace(op, target="input", args=(WHOLE_PREFIX + op.name,), made_by=made_by, origin=op.origin)


def _placed_output(
    op: Op,
    graph: Graph,
    copies: dict[tuple[str, int], str],
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
    return _renamed(map_arguments(op, change) if change else op, last, copies)
