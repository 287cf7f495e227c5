"""The model as a chain of units: contiguous runs of ops, cut where little data crosses.

Equal units (repeated blocks) are found by a structural hash and share one `kind`, so that everything
downstream prices and solves each distinct block once.

Ops that depend on nothing but the inputs and constants (masks, positions, rotary tables) are *free*:
every stage that needs them computes them again, since inputs reach every stage anyway. They belong to
no unit and cross no boundary.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.optable import packet
from graphpar.ir.text import format_argument, format_op

RANDOM_TARGETS = frozenset({"gp.dropout", "gp.random", "gp.bernoulli", "gp.attention"})
MAX_FINE_UNITS = 64
"""Chains with more units than this are made of whole blocks where blocks repeat."""
_HEAVY = ("linear", "matmul", "mm", "bmm", "addmm", "convolution", "conv1d", "conv2d", "conv3d",
          "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "einsum", "baddbmm",
          "embedding", "sort", "topk", "_grouped_mm", "conv_transpose1d", "conv_transpose2d",
          "conv_transpose3d", "bilinear")  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A contiguous run of ops; units of equal `kind` are equal but for their weights."""

    name: str
    ops: tuple[str, ...]
    kind: int


@dataclass(frozen=True)
class Chain:
    """The units in order of execution, and the ops that every stage repeats for itself."""

    units: tuple[Unit, ...]
    free: frozenset[str]

    def unit_of(self) -> dict[str, int]:
        """Op name to the index of its unit."""
        return {name: i for i, unit in enumerate(self.units) for name in unit.ops}


@dataclass(frozen=True)
class Crossing:
    """A value made in unit `source` and last read in unit `target`, and the op that makes it."""

    name: str
    source: int
    target: int


def free_ops(graph: Graph) -> frozenset[str]:
    """Names of cheap ops that depend on inputs, constants and unchanging buffers alone.

    Whatever feeds the loss without any parameter in it (a count of labels, say) is free too.
    """
    written = written_buffers(graph)
    free: set[str] = set()
    for op in graph.ops:
        if op.target in SOURCES:
            if op.target in ("input", "constant") or (op.target == "buffer" and op.name not in written):
                free.add(op.name)
        elif op.target != "output" and op.target not in RANDOM_TARGETS:
            if all(operand in free for operand in op.operands()) and _is_cheap(graph, op):
                free.add(op.name)
    return frozenset(name for name in free if graph[name].target not in SOURCES)


_CHEAP_BYTES = 2**20
"""A product of operands up to this size is cheaper to repeat than to send (rotary angles, masks)."""


def _is_cheap(graph: Graph, op: Op) -> bool:
    if not _is_heavy(op):
        return True
    types = [t for name in op.operands() for t in graph[name].types if t is not None]
    return sum(t.bytes(graph.batch) for t in types) <= _CHEAP_BYTES


def _is_heavy(op: Op) -> bool:
    return packet(op) in _HEAVY or op.target == "gp.attention"


def build_chain(graph: Graph) -> Chain:
    """Cut a captured graph into units.

    >>> from graphpar.ir.text import parse_graph
    >>> g = parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("a.weight") : float32[4,4] {grad=true}
    ... %v = parameter("b.weight") : float32[4,4] {grad=true}
    ... %h = aten.linear.default(%x, %w) : float32[B,4] {grad=true} @ "a" ""
    ... %i = aten.linear.default(%h, %v) : float32[B,4] {grad=true} @ "b" ""
    ... %y = aten.linear.default(%i, %v) : float32[B,4] {grad=true} @ "c" ""
    ... %output = output((%y,))
    ... ''')
    >>> [(u.name, u.kind) for u in build_chain(g).units]  # a sends no gradient to its input
    [('a', 0), ('b', 1), ('c', 1)]
    """
    free = free_ops(graph)
    core = [op for op in graph.ops if op.target not in (*SOURCES, "output") and op.name not in free]
    if not core:
        core = [op for op in graph.ops if op.target not in (*SOURCES, "output")]
        free = frozenset()
    if not core:
        return Chain((), frozenset())
    crossing, alone = _crossing_bytes(graph, core)
    cuts = _narrow_places(crossing, alone, [_has_weight(graph, op) for op in core])
    cuts = _without_idle_runs(cuts, crossing, [_is_heavy(op) for op in core])
    runs = [core[a:b] for a, b in pairwise([0, *cuts, len(core)])]
    hashes = [structural_hash(graph, run) for run in runs]
    firsts = _merged_periods([hashes.index(h) for h in hashes], MAX_FINE_UNITS)
    if len(firsts) < len(runs):
        runs = [list(chain.from_iterable(runs[a:b])) for a, b in pairwise([*firsts, len(runs)])]
    kinds: dict[str, int] = {}
    names = _unique([_common_path(run) for run in runs])
    units = []
    for name, run in zip(names, runs, strict=True):
        kind = kinds.setdefault(structural_hash(graph, run), len(kinds))
        units.append(Unit(name, tuple(op.name for op in run), kind))
    return Chain(tuple(units), free)


def extended(chain: Chain, graph: Graph) -> Chain:
    """The chain of a graph to which ops were added (casts): each joins the unit that first reads it.

    Kinds are found anew. Ops that no unit reads join the free ones.
    """
    unit_of = chain.unit_of()
    members: list[list[str]] = [[] for _ in chain.units]
    for op in reversed(graph.ops):
        if op.target in SOURCES or op.target == "output" or op.name in chain.free:
            continue
        if op.name not in unit_of:
            readers = [unit_of[user.name] for user in graph.users(op.name) if user.name in unit_of]
            if not readers:
                continue
            unit_of[op.name] = min(readers)
        members[unit_of[op.name]].append(op.name)
    kinds: dict[str, int] = {}
    units = []
    for unit, names in zip(chain.units, members, strict=True):
        names.reverse()
        kind = kinds.setdefault(structural_hash(graph, [graph[name] for name in names]), len(kinds))
        units.append(Unit(unit.name, tuple(names), kind))
    inside = {name for unit in units for name in unit.ops}
    rest = (o.name for o in graph.ops if o.target not in (*SOURCES, "output") and o.name not in inside)
    return Chain(tuple(units), frozenset(rest))


def crossings(graph: Graph, chain: Chain) -> tuple[Crossing, ...]:
    """Values read beyond the unit that makes them; sources and free ops are not counted."""
    unit_of = chain.unit_of()
    found = []
    for op in graph.ops:
        made = unit_of.get(op.name)
        if made is None:
            continue
        last = max((unit_of[u.name] for u in graph.users(op.name) if u.name in unit_of), default=made)
        if last > made:
            found.append(Crossing(op.name, made, last))
    return tuple(found)


_FORBIDDEN = float("inf")


def _crossing_bytes(graph: Graph, core: Sequence[Op]) -> tuple[list[float], list[bool]]:
    """For each place between two core ops what is made before and read after it.

    Returns the bytes, and whether it is a single value.
    """
    place = {op.name: i for i, op in enumerate(core)}
    change = [0] * (len(core) + 1)
    values = [0] * (len(core) + 1)
    forbidden = [0] * (len(core) + 1)
    for i, op in enumerate(core):
        last = max((place[u.name] for u in graph.users(op.name) if u.name in place), default=i)
        if op.is_tuple:
            _mark(forbidden, i, last)
        else:
            _mark(change, i, last, sum(t.bytes(graph.batch) for t in op.types if t is not None))
            _mark(values, i, last)
    for first, last in _mutated_spans(graph, place):
        _mark(forbidden, first, last)
    tail = [i for i, op in enumerate(core) if op.attr("tail")]
    if tail:  # it runs in one place
        _mark(forbidden, tail[0], len(core) - 1)
    closed = list(accumulate(forbidden))[1:-1]
    crossing = list(accumulate(change))[1:-1]
    counts = list(accumulate(values))[1:-1]
    return (
        [_FORBIDDEN if shut else num_bytes for shut, num_bytes in zip(closed, crossing, strict=True)],
        [count == 1 for count in counts],
    )


def _mark(changes: list[int], first: int, last: int, amount: int = 1) -> None:
    """Add an amount to places first+1 .. last, as differences between neighbours."""
    if last > first:
        changes[first + 1] += amount
        changes[last + 1] -= amount


def _mutated_spans(graph: Graph, place: dict[str, int]) -> Iterable[tuple[int, int]]:
    """First and last core op that touch each buffer that some op writes to, or a view of it."""
    for touched in _write_paths(graph).values():
        users = {user.name for name in touched for user in graph.users(name)}
        places = [place[user] for user in users if user in place]
        if len(places) > 1:
            yield min(places), max(places)


def written_buffers(graph: Graph) -> frozenset[str]:
    """Names of the buffers that some op writes to, be it through views."""
    return frozenset(_write_paths(graph))


def _write_paths(graph: Graph) -> dict[str, set[str]]:
    """For each buffer written to, its name and those of the views it is written through."""
    paths: dict[str, set[str]] = {}
    for op in graph.ops:
        for name in op.operands() if writes_buffer(op) else ():
            path = [name]
            while graph[path[-1]].target not in SOURCES and graph[path[-1]].operands():
                path.append(graph[path[-1]].operands()[0])
            if graph[path[-1]].target == "buffer":
                paths.setdefault(path[-1], set()).update(path)
    return paths


def writes_buffer(op: Op) -> bool:
    """Whether an op changes one of the buffers it reads."""
    if op.target.startswith("aten.batch_norm.") or op.target.startswith("aten.instance_norm."):
        return op.argument(5, "training") is True and op.argument(3, "running_mean") is not None
    packet = op.target.split(".")[1] if op.target.count(".") >= 2 else ""
    return bool(op.attr("writes")) or (packet.endswith("_") and not packet.endswith("__"))


def _has_weight(graph: Graph, op: Op) -> bool:
    return any(graph[operand].target == "parameter" for operand in op.operands())


_FEW_CUTS = 8
"""With fewer cuts than this, places that are not the best next to them serve, too."""
_NUMBER_BYTES = 16
"""What a single number takes at most."""


def _narrow_places(
    crossing: Sequence[float], alone: Sequence[bool], has_weight: Sequence[bool]
) -> list[int]:
    """Places where crossing bytes are at a local minimum, or a single value crosses.

    Of neighbouring places with equal bytes (layers in sequence without skips) those just before an op
    with weights are taken, or the first where there is none. A single value that is wider than the
    cuts next to it (the middle of a bottleneck) is no place to cut, unless it is as wide over several
    layers or there are few other places; a lone number (a loss) is no cut that others are measured by.
    """
    valleys: list[tuple[float, bool, list[int]]] = []
    index = 0
    while index < len(crossing):
        end = index
        while end + 1 < len(crossing) and crossing[end + 1] == crossing[index]:
            end += 1
        left = crossing[index - 1] if index else _FORBIDDEN
        right = crossing[end + 1] if end + 1 < len(crossing) else _FORBIDDEN
        here = crossing[index]
        lowest = here <= left and here <= right
        if here != _FORBIDDEN and (lowest or all(alone[index : end + 1])):
            places = [place + 1 for place in range(index, end + 1)]
            chosen = [place for place in places if has_weight[place]] or places[:1]
            valleys.append((here, lowest, chosen))
        index = end + 1
    cuts: list[int] = []
    wider: list[int] = []
    for number, (here, lowest, chosen) in enumerate(valleys):
        near = valleys[max(number - 1, 0) : number + 2]
        beside = [v[0] for v in near if v[0] > _NUMBER_BYTES or v[0] == here]
        layers = len(chosen) > 1
        if lowest or layers or len(beside) == 1 or min(beside) == here or max(beside) > here:
            cuts += chosen
        else:
            wider += chosen
    return cuts if len(cuts) >= _FEW_CUTS else sorted(cuts + wider)


def _merged_periods(kinds: Sequence[int], limit: int) -> list[int]:
    """First units of the joined ones, when a chain longer than `limit` repeats a pattern of units.

    Every full pattern in the longest run of repetitions becomes one unit: blocks instead of their
    parts, where there are so many that parts would not balance stages any better.

    >>> _merged_periods([0, 1, 2, 1, 2, 1, 2, 3], limit=4)
    [0, 1, 3, 5, 7]
    """
    firsts = list(range(len(kinds)))
    if len(kinds) <= limit:
        return firsts
    best_start, best_period, best_length = 0, 1, 0
    for period in range(2, min(8, len(kinds) // 2) + 1):
        start = 0
        for place in range(len(kinds) - period + 1):
            same = place + period < len(kinds) and kinds[place] == kinds[place + period]
            if same:
                continue
            length = (place + period - start) // period
            if length >= 2 and length * period > best_length * best_period:
                best_start, best_period, best_length = start, period, length
            start = place + 1
    inside = range(best_start, best_start + best_period * best_length)
    return [u for u in firsts if u not in inside or (u - best_start) % best_period == 0]


def _without_idle_runs(
    cuts: Sequence[int], crossing: Sequence[float], heavy: Sequence[bool]
) -> list[int]:
    """Join runs without a heavy op to a neighbour, across the wider of their two boundaries."""
    kept = list(cuts)
    index = 0
    while kept and index <= len(kept):
        start = kept[index - 1] if index else 0
        end = kept[index] if index < len(kept) else len(heavy)
        if any(heavy[start:end]):
            index += 1
        elif index == 0 or (index < len(kept) and crossing[end - 1] >= crossing[start - 1]):
            del kept[index]
        else:
            del kept[index - 1]
            index -= 1
    return kept


def structural_hash(graph: Graph, run: Sequence[Op]) -> str:
    """A hash of what a run of ops computes, blind to names, weights and places in the source."""
    local = {op.name: str(i) for i, op in enumerate(run)}
    outside: dict[str, str] = {}
    digest = hashlib.sha256()
    for op in run:
        for operand in op.operands():
            if operand not in local and operand not in outside:
                made = graph[operand]
                kind = "value" if made.target not in SOURCES or made.target == "input" else made.target
                types = ",".join(map(str, made.types))
                outside[operand] = f"{kind}{len(outside)}:{types}:{made.attr('grad', False)}"
        names = {**local, **outside}
        shown = Op(
            "_",
            op.target,
            types=op.types,
            is_tuple=op.is_tuple,
            attrs=tuple((k, v) for k, v in op.attrs if k not in ("reduces", "format", "whole")),
        )
        digest.update(format_op(shown).encode())
        digest.update("|".join(names[o] for o in op.operands()).encode())
        digest.update(_literals(op).encode())
    return digest.hexdigest()


def _literals(op: Op) -> str:
    parts = [format_argument(a) for a in op.args]
    parts += [f"{k}={format_argument(v)}" for k, v in op.kwargs if k != "stream"]
    text = "\0".join(parts)
    for operand in sorted(set(op.operands()), key=len, reverse=True):
        text = text.replace(f"%{operand}", "%")
    return text


def _common_path(run: Sequence[Op]) -> str:
    paths = [op.module.split(".") for op in run if op.module]
    if not paths:
        return run[0].target
    common = paths[0]
    for path in paths[1:]:
        same = 0
        while same < min(len(common), len(path)) and common[same] == path[same]:
            same += 1
        common = common[:same]
    if common:
        return ".".join(common)
    first, last = ".".join(paths[0]), ".".join(paths[-1])
    return first if first == last else f"{first}+{last}"


def _unique(names: Sequence[str]) -> list[str]:
    """Tell units of the same module apart: `h.0 1/2`, `h.0 2/2`."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        places[name].append(i)
    result = list(names)
    for name, indices in places.items():
        for count, i in enumerate(indices, start=1):
            if len(indices) > 1:
                result[i] = f"{name} {count}/{len(indices)}"
    return result
