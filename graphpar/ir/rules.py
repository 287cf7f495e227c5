"""What is legal in a graph at each level; checked whenever a graph enters that level."""

from collections.abc import Callable, Iterator

from graphpar.errors import VerifyError
from graphpar.ir.formats import FORMATS, role_of
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.text import format_op

ATTRIBUTES: dict[Level, frozenset[str]] = {
    "captured": frozenset(
        "grad samples outer reduces tail meets in_step whole format island writes".split()
    ),
    "placed": frozenset(
        "grad samples outer reduces tail meets in_step whole format island writes stage".split()
    ),
    "lowered": frozenset(
        "grad samples outer reduces tail meets in_step whole format island writes stage".split()
        + "shard inner_shard partial held late".split()
    ),
}
"""Attributes an op may carry, by level.

`grad`: a gradient flows through the result. `samples`: what the result means to the samples of the
batch (see `passes/samples.py`), `outer` how often the batch is repeated along its dimension.
`reduces`: why an op joins samples. `tail`: it runs once, on values of the whole batch (see
`passes/tail.py`). `meets`: parts of the batch meet in it (see `passes/in_step.py`), `in_step` why.
`whole`, on the output: why the batch can neither be split nor go in step.
`format`: the number format its unit computes in (see `formats.py`); `island`: the model itself put it
outside of autocast, and it keeps its types. `writes`: an operator of the user's that changes a buffer.
`stage`: the stage that runs it. Of weights in a tensor group: `shard`: the slice that is held (dimension,
inner size, counts); `partial`: each member's gradient is a part; `held`: the stage whose members all
hold it, whether they read it or not. In a group of two axes `inner_shard` is the slice along the second
one, as if of the whole, and `partial` names the axes. `late`: the places of the weights whose gradients
are made in a second half of the backward.
"""
_OWN = frozenset(
    {
        "gp.dropout",
        "gp.random",
        "gp.bernoulli",
        "gp.attention",
        "gp.share",
        "gp.cast_weight",
        "gp.sum_parts",
    }
)
_GROUP = frozenset(
    """gp.copy_to_group gp.all_reduce gp.reduce_copies gp.take_shard gp.take_part gp.all_gather
    gp.gather_copies gp.reduce_scatter gp.all_to_all gp.lookup gp.class_loss gp.grouped_product
    gp.begin gp.end gp.late_weight gp.late_product gp.sum_together""".split()
)
"""Ops by which the members of a tensor group work together."""
OWN_TARGETS: dict[Level, frozenset[str]] = {
    "captured": _OWN | {"gp.whole_batch"},
    "placed": _OWN | {"gp.collect"},
    "lowered": _OWN | _GROUP | {"gp.collect", "gp.send", "gp.recv"},
}
"""Ops of our own, by level; all others are torch's."""

Rule = Callable[[Graph], Iterator[tuple[Op, str]]]


def _ends_in_one_output(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops[:-1]:
        if op.target == "output":
            yield op, "only the last op may be the output"
    if graph.ops and graph.output.target != "output":
        yield graph.output, "the last op must be the output"


def _sources_name_something(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        if op.target in SOURCES and not (len(op.args) == 1 and isinstance(op.args[0], str)):
            yield op, f"{op.target} must have one argument, the name of what it stands for"


def _getitem_takes_tuples_apart(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        if op.target != "getitem":
            continue
        if len(op.operands()) != 1 or len(op.args) != 2:
            yield op, "getitem needs a tuple and an index"
            continue
        source, index = graph[op.operands()[0]], op.args[1]
        if not source.is_tuple:
            yield op, f"getitem reads %{source.name}, which is no tuple"
        elif not (isinstance(index, int) and -len(source.types) <= index < len(source.types)):
            yield op, f"getitem index {index!r} is outside the {len(source.types)} results"


def _targets_are_legal(graph: Graph) -> Iterator[tuple[Op, str]]:
    own = OWN_TARGETS[graph.level]
    for op in graph.ops:
        if op.target.startswith("gp.") and op.target not in own:
            yield op, f"{op.target} is not legal in a {graph.level} graph"


def _attributes_are_legal(graph: Graph) -> Iterator[tuple[Op, str]]:
    legal = ATTRIBUTES[graph.level]
    for op in graph.ops:
        for key, _ in op.attrs:
            if key not in legal:
                yield op, f"attribute {key!r} is not legal in a {graph.level} graph"


def _stages_are_known(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        if op.target not in SOURCES and op.target != "output" and op.attr("stage") is None:
            yield op, "has no stage"


def _stages_never_go_back(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        stage = op.attr("stage")
        for operand in op.operands() if isinstance(stage, int) else ():
            before = graph[operand].attr("stage")
            if isinstance(before, int) and isinstance(stage, int) and before > stage:
                yield op, f"stage {stage} reads %{operand} of the later stage {before}"


def _stages_meet_only_through_messages(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        stage = op.attr("stage")
        if stage is None or op.target in ("output", "gp.recv"):
            continue
        for operand in op.operands():
            before = graph[operand].attr("stage")
            if before is not None and before != stage:
                yield op, f"stage {stage} reads %{operand} of stage {before} without a message"


def _receives_match_sends(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        if op.target == "gp.recv":
            if not op.operands():
                yield op, "receives from nothing"
                continue
            sender = graph[op.operands()[0]]
            if sender.target != "gp.send":
                yield op, f"receives from %{sender.name}, which is no send"
            elif sender.types != op.types:
                yield op, f"receives {op.types} but %{sender.name} sends {sender.types}"


def _parts_meet_only_where_collected(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        if op.target in (*SOURCES, "output", "gp.collect"):
            continue
        for operand in op.operands():
            made = graph[operand]
            if made.target not in SOURCES and bool(made.attr("tail")) != bool(op.attr("tail")):
                yield op, f"reads %{operand} of the other side of the tail's border without collecting it"


def _products_read_one_format(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        if op.attr("format") is None or role_of(op) != "product":
            continue
        types = [t for name in op.operands() for t in graph[name].types if t is not None]
        found = sorted({t.dtype for t in types if t.dtype in FORMATS})
        if len(found) > 1:
            yield op, f"reads {' and '.join(found)}; a product's operands have one format"


def _weights_are_cast_from_weights(graph: Graph) -> Iterator[tuple[Op, str]]:
    for op in graph.ops:
        if op.target == "gp.cast_weight" and graph[op.operands()[0]].target not in SOURCES:
            yield op, "casts a value that is no parameter or buffer"


_COMMON: tuple[Rule, ...] = (
    _ends_in_one_output,
    _sources_name_something,
    _getitem_takes_tuples_apart,
    _targets_are_legal,
    _attributes_are_legal,
)
RULES: dict[Level, tuple[Rule, ...]] = {
    "captured": (*_COMMON, _weights_are_cast_from_weights),
    "placed": (*_COMMON, _weights_are_cast_from_weights, _stages_are_known, _stages_never_go_back),
    "lowered": (
        *_COMMON,
        _products_read_one_format,
        _weights_are_cast_from_weights,
        _stages_are_known,
        _stages_meet_only_through_messages,
        _receives_match_sends,
        _parts_meet_only_where_collected,
    ),
}


def verify(graph: Graph) -> None:
    """Check a graph against the rules of its level.

    Raises:
        VerifyError: The first broken rule, with the op, who made it, and the ops around it.
    """
    for rule in RULES[graph.level]:
        for op, why in rule(graph):
            raise VerifyError(_report(graph, op, why))


def _report(graph: Graph, op: Op, why: str) -> str:
    place = graph.position[op.name]
    lines = [f"Op %{op.name} ({op.target}, made by {op.made_by}) breaks a rule of {graph.level} graphs:"]
    lines.append(f"  {why}")
    for index in range(max(0, place - 5), min(len(graph), place + 6)):
        marker = ">>" if index == place else "  "
        lines.append(f"{marker} {index:>5} {format_op(graph.ops[index])}")
    return "\n".join(lines)
