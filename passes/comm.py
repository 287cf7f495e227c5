"""Insert a send and a receive wherever a value is read in a later stage than the one that makes it."""

from dataclasses import dataclass, replace

from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Op, Ref, map_arguments


@dataclass(frozen=True)
class InsertMessages:
    """Send every value straight from the stage that makes it to each stage that reads it.

    Messages are numbered; the number is the tag under which sender and receiver meet.

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> g = InsertMessages().run(parse_graph('''graph placed "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %h = aten.abs.default(%x) : float32[B,4] {stage=0}
    ... %y = aten.neg.default(%h) : float32[B,4] {stage=1}
    ... %output = output((%y,))
    ... '''))
    >>> for op in g.ops[2:5]: print(format_op(op))
    %h_to1 = gp.send(%h, 1, 0) : float32[B,4] {stage=0} from(%h) by("comm")
    %h_at1 = gp.recv(%h_to1, 0, 0) : float32[B,4] {stage=1} from(%h) by("comm")
    %y = aten.neg.default(%h_at1) : float32[B,4] {stage=1}
    """

    name: str = "comm"
    takes: Level = "placed"
    gives: Level = "lowered"

    def run(self, graph: Graph) -> Graph:
        """Build the lowered graph."""
        ops: list[Op] = []
        arrived: dict[tuple[str, int], str] = {}
        tag = 0
        for op in graph.ops:
            stage = op.attr("stage")
            if isinstance(stage, int):
                op = map_arguments(
                    op, {o: arrived[o, stage] for o in op.operands() if (o, stage) in arrived}
                )
            ops.append(op)
            if not isinstance(stage, int) or op.target in SOURCES:
                continue
            for target in _later_readers(graph, op.name, stage):
                send, receive = self._message(op, stage, target, tag)
                ops += [send, receive]
                arrived[op.name, target] = receive.name
                tag += 1
        return graph.with_ops(ops, level="lowered")

    def _message(self, op: Op, stage: int, target: int, tag: int) -> tuple[Op, Op]:
        # The op may be one in which parts of the batch meet; its message is none.
        attrs = tuple((key, value) for key, value in op.attrs if key != "meets")
        shared = replace(
            op, kwargs=(), origin=op.origin or (op.name,), made_by=self.name, is_tuple=False, attrs=attrs
        )
        send = replace(
            shared, name=f"{op.name}_to{target}", target="gp.send", args=(Ref(op.name), target, tag)
        )
        receive = replace(
            shared, name=f"{op.name}_at{target}", target="gp.recv", args=(Ref(send.name), stage, tag)
        )
        return send, receive.with_attrs(stage=target)


def _later_readers(graph: Graph, name: str, stage: int) -> list[int]:
    stages = {user.attr("stage") for user in graph.users(name) if user.target != "output"}
    return sorted(s for s in stages if isinstance(s, int) and s > stage)
