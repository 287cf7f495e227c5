"""What members of a tensor group keep from forward to backward.

An op keeps operands as it reads them, so of a value that was gathered for it the gathered copy, of a
slice the slice; whatever reads the same value in the same layouts keeps the same storage.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

from graphpar.cost_models.layout import Layout as Storage
from graphpar.cost_models.memory import HELD
from graphpar.cost_models.mesh_times import MeshTimes, shares_held
from graphpar.cost_models.sharding import Sharding
from graphpar.cost_models.work import OpWork
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts
from graphpar.ir.ops import Op
from graphpar.ir.shards import Layout
from graphpar.ir.strategies import value_of


@dataclass(frozen=True)
class Kept:
    """What a member keeps of a unit for one microbatch.

    Attributes:
        share: Its part of what one device would keep; more than 1 where copies are kept.
        weight_bytes: Copies of weights that were gathered, whatever the microbatch.
    """

    share: float
    weight_bytes: float


@dataclass(frozen=True)
class _Value:
    """A value in the layouts in which it is kept; `size` names what its bytes are counted of."""

    size: str
    layouts: Layouts
    is_weight: bool


def kept_of(
    graph: Graph,
    sharding: Sharding,
    times: MeshTimes,
    ops: Collection[Op],
    earlier: Collection[str],
) -> tuple[Kept, ...]:
    """What each member keeps of a unit, and no earlier unit of its stage does.

    Args:
        graph: The lowered graph.
        sharding: How the group computes it.
        times: Prices at the microbatch size that counts.
        ops: The unit's ops.
        earlier: Names of the ops of earlier units.
    """
    storage, samples = times.layout, times.options.samples
    works = {op.name: times.alone.work(op) for op in ops}
    inside = set(works)
    values = _values(graph, sharding, storage, works)
    roots = {key[0] for key in values} - inside
    before = [
        user.name
        for root in roots
        for name in storage.sharers[root]
        for user in graph.users(name)
        if user.name in earlier
    ]
    done = _values(graph, sharding, storage, {n: times.alone.work(graph[n]) for n in before})
    whole = _bytes_alone(graph, storage, works, {key[0] for key in done}, samples)
    whole += sum(work.saved_bytes for work in works.values())
    size, axes = times.group.size, times.group.axes
    own, copies = [0.0] * size, [0.0] * size
    for key, value in values.items():
        if key not in done:
            num_bytes = _num_bytes(graph[value.size], samples)
            side = copies if value.is_weight else own
            for member, share in enumerate(shares_held(value.layouts, axes)):
                side[member] += num_bytes * share
    for op in ops:
        ways, saved = sharding.ways(op.name), works[op.name].saved_bytes
        if saved:
            shares = times.shares(ways) if ways is not None else (1.0,) * size
            for member, share in enumerate(shares):
                own[member] += saved * share
    return tuple(
        Kept(part / whole if whole else 1.0, extra) for part, extra in zip(own, copies, strict=True)
    )


_Key = tuple[str, Hashable]
"""Storage, and what tells a copy of it from the value as it was made."""


def _values(
    graph: Graph, sharding: Sharding, storage: Storage, works: Mapping[str, OpWork]
) -> dict[_Key, _Value]:
    found: dict[_Key, _Value] = {}
    for op_name, work in works.items():
        ways = sharding.ways(op_name)
        if ways is None or not work.backward:
            continue
        slots = graph[op_name].operands()
        for name in work.saved:
            root = storage.root[name]
            is_held = graph[root].target in HELD
            if name == op_name:
                found[root, ""] = _Value(root, ways.results[0], False)
                continue
            wanted = ways.operands[slots.index(name)]
            if not _is_copy(_made(graph, sharding, name), wanted):
                if not is_held:
                    found.setdefault((root, ""), _Value(root, wanted, False))
            elif graph[root].target != "input":
                found[root, (name, wanted)] = _Value(name, wanted, is_held)
    return found


def _made(graph: Graph, sharding: Sharding, name: str) -> Layouts:
    source, index = value_of(graph, name)
    maker = sharding.ways(source)
    return maker.results[index] if maker is not None else sharding.held(name)


def _is_copy(made: Layouts, wanted: Layouts) -> bool:
    """Whether another tensor is read than was made; a copy for its gradient's sake is none."""
    return any(a != b and not {a, b} <= _SAME for a, b in zip(made, wanted, strict=True))


_SAME: set[Layout] = {"whole", "copied"}


def _bytes_alone(
    graph: Graph, storage: Storage, works: Mapping[str, OpWork], done: Iterable[str], samples: int
) -> float:
    """What one device keeps of the values, each storage once."""
    roots = {storage.root[n] for work in works.values() if work.backward for n in work.saved}
    kept = roots - set(done)
    return sum(_num_bytes(graph[r], samples) for r in kept if graph[r].target not in HELD)


def _num_bytes(op: Op, samples: int) -> float:
    return float(sum(kind.bytes(samples) for kind in op.types if kind is not None))
