"""The price of units shared by a tensor group, from the strategies that its sharding programme chose.

Strategies are chosen once, for the whole model as one stage and a typical microbatch, and then priced
at every size of the table. A stage of the plan is solved again with its true borders when it is
lowered; there a value that leaves the stage must be whole, which the price of a cut inside a run of
slices does not hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphpar.calibration import Calibration
from graphpar.cost import CostTable, Mode, ModeCost
from graphpar.cost_models.again import kept_last
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.kept import kept_of
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.memory import ALLOCATOR_SLACK, lower_copy_bytes
from graphpar.cost_models.mesh_times import MeshTimes, share_held
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.rates import rates_of
from graphpar.cost_models.sharding import Sharding, conversions_of
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.strategies import value_of


def tensor_mode(
    table: CostTable,
    graph: Graph,
    chain: Chain,
    group: TensorGroup,
    sharding: Sharding,
    times: Sequence[MeshTimes],
    *,
    shares: tuple[float, ...] = (),
    lean: int = 0,
) -> Mode:
    """One more mode of a table: its units shared by a group.

    Args:
        table: The table with the plain prices.
        graph: The captured graph, lowered as one stage.
        chain: Its units.
        group: Who shares.
        sharding: How, as solved for this graph.
        times: Prices at the table's sizes (`times_by_size`).
        shares: The shares as the partition will name them; empty for equal ones.
        lean: The price of memory that the sharding was chosen at, as the partition will name it.
    """
    first = {kind: unit for unit, kind in reversed(list(enumerate(table.units)))}
    costs = []
    for kind in range(len(table.costs)):
        unit = chain.units[first[kind]]
        ops = [graph[name] for name in unit.ops if graph[name].target != "getitem"]
        costs.append(_unit(table, kind, graph, ops, chain, first[kind], group, sharding, times))
    members = tuple(table.class_of[device.name] for device in group.devices)
    return Mode(members, tuple(costs), shares=shares, link=group.link, mesh=group.mesh, lean=lean)


def times_by_size(
    table: CostTable,
    graph: Graph,
    group: TensorGroup,
    options: ShardingOptions,
    calibration: Calibration | None = None,
) -> list[MeshTimes]:
    """What ops cost a group at every size of a table; whatever memory is worth.

    Args:
        table: The table with the plain prices.
        graph: The captured graph, lowered as one stage.
        group: Who shares.
        options: What shardings are solved for.
        calibration: Measured rates of this machine's processor.
    """
    layout = find_layout(graph)
    return [
        MeshTimes(
            graph, group, replace(options, samples=size), lambda d: rates_of(d, calibration), layout
        )
        for size in table.sizes
    ]


def _unit(
    table: CostTable,
    kind: int,
    graph: Graph,
    ops: Sequence[Op],
    chain: Chain,
    number: int,
    group: TensorGroup,
    sharding: Sharding,
    times: Sequence[MeshTimes],
) -> ModeCost:
    forward, backward, again, sent, sent_anew = [], [], [], [], []
    for at_size in times:
        (ahead, behind), collective = _seconds(graph, ops, sharding, at_size)
        forward.append(ahead)
        backward.append(behind if table.training else 0.0)
        sent.append(collective[0] + (collective[1] if table.training else 0.0))
        anew = _seconds_again(graph, ops, sharding, at_size) if table.training else (0.0, 0.0)
        again.append(anew[0])
        sent_anew.append(anew[1])
    weights = _own_weights(graph, chain, number)
    plain = table.every_mode[table.class_of[group.devices[0].name]].costs[kind]
    trained = [op for op in weights if op.target == "parameter" and op.attr("grad")]
    held = [
        sum(op.type.bytes(1) * _share(sharding, op, at) for op in weights)
        + _lower_copies(graph, ops, sharding, at)
        for at in group.places
    ]
    grads = [sum(op.type.bytes(1) * _share(sharding, op, at) for op in trained) for at in group.places]
    gradients = plain.gradient_bytes[0]
    state = plain.optimizer_bytes[0] / gradients if gradients else 0.0
    part = [_part_held(graph, ops, sharding, at, times[0].options.samples) for at in group.places]
    earlier = {name for unit in chain.units[:number] for name in unit.ops}
    kept = [kept_of(graph, sharding, times[0], ops, earlier, at) for at in group.places]
    return ModeCost(
        forward_s=tuple(forward),
        backward_s=tuple(backward),
        optimizer_s=sum(times[0].optimizer_seconds(op, sharding.held(op.name)) for op in trained)
        * times[0].options.microbatches,
        weight_bytes=tuple(held),
        gradient_bytes=tuple(g if table.training else 0.0 for g in grads),
        optimizer_bytes=tuple(g * state if table.training else 0.0 for g in grads),
        saved_bytes=tuple(
            tuple(x * own.share + own.weight_bytes * ALLOCATOR_SLACK for x in plain.saved_bytes[0])
            if table.training
            else (0.0,) * len(table.sizes)
            for own in kept
        ),
        working_bytes=tuple(tuple(x * share for x in plain.working_bytes[0]) for share in part),
        again_s=tuple(again),
        collective_s=tuple(sent),
        collective_again_s=tuple(sent_anew),
    )


_Ends = tuple[float, float]
"""Seconds forward and backward."""


def _seconds(
    graph: Graph, ops: Sequence[Op], sharding: Sharding, times: MeshTimes
) -> tuple[_Ends, _Ends]:
    """Some ops with the conversions they need, each conversion once; and what of that is collectives."""
    computing: list[_Ends] = []
    sending: list[_Ends] = []
    done: set[tuple[str, Layouts]] = set()
    for op in ops:
        strategy = sharding.ways(op.name)
        if strategy is None:
            continue
        computing.append(times.parts(op, strategy))
        sending.append(times.inner_seconds(op, strategy))
        for name, made, wanted in (*conversions_of(sharding, graph, op), *_forming(sharding, graph, op)):
            found = times.conversion_parts(graph[name], made, wanted)
            if (name, wanted) not in done and found is not None:
                done.add((name, wanted))
                sending.append(found)
    sent = sum(ends[0] for ends in sending), sum(ends[1] for ends in sending)
    own = sum(ends[0] for ends in computing), sum(ends[1] for ends in computing)
    return (own[0] + sent[0], own[1] + sent[1]), sent


def computed_again(graph: Graph, ops: Sequence[Op], times: MeshTimes) -> Sequence[Op]:
    """The ops of a unit up to the last one that keeps something for its backward.

    There torch stops: a sum over the members behind a unit's last product is not made again.
    """
    works = {op.name: work_of(op, graph, times.layout, times.options.samples) for op in ops}
    return ops[: kept_last(graph, works)]


def sent_again(
    sharding: Sharding, graph: Graph, ops: Sequence[Op], again: Sequence[Op]
) -> Iterator[tuple[str, Layouts, Layouts]]:
    """Conversions that are made again: of the unit's own values, and of weights that only it reads.

    What another unit made was sent before the unit and is kept as it arrived.
    """
    own = {op.name for op in ops}
    done: set[tuple[str, Layouts]] = set()
    for number, op in enumerate(again, 1):
        formed = _forming(sharding, graph, op) if number < len(again) else ()
        for name, made, wanted in (*conversions_of(sharding, graph, op), *formed):
            source, _ = value_of(graph, name)
            of_weight = graph[source].target in SOURCES and graph[source].target != "input"
            inside = all(user.name in own for user in graph.users(source)) if of_weight else source in own
            if inside and (name, wanted) not in done:
                done.add((name, wanted))
                yield name, made, wanted


def _seconds_again(
    graph: Graph, ops: Sequence[Op], sharding: Sharding, times: MeshTimes
) -> tuple[float, float]:
    """What a unit that is computed again takes besides its backward, and what of it is collectives."""
    known = [op for op in ops if op.name in sharding.chosen]
    again = computed_again(graph, known, times)
    own = sent = 0.0
    for op in again:
        strategy = sharding.ways(op.name)
        assert strategy is not None
        own += times.parts(op, strategy)[0]
        sent += times.inner_seconds(op, strategy)[0]
    for name, made, wanted in sent_again(sharding, graph, known, again):
        found = times.conversion_parts(graph[name], made, wanted)
        sent += found[0] if found is not None else 0.0
    return own + sent, sent


def _forming(sharding: Sharding, graph: Graph, op: Op) -> list[tuple[str, Layouts, Layouts]]:
    """Results that are brought into a form for all their readers."""
    found = []
    ways = sharding.ways(op.name)
    assert ways is not None
    for index, name in enumerate(_names(graph, op)):
        if name in sharding.forms:
            made = ways.results[min(index, len(ways.results) - 1)]
            found.append((name, made, sharding.form(name, made)))
    return found


def _names(graph: Graph, op: Op) -> list[str]:
    """The op, or where it makes a tuple what takes it apart."""
    taken = [user.name for user in graph.users(op.name) if user.target == "getitem"]
    return taken or [op.name]


def _own_weights(graph: Graph, chain: Chain, number: int) -> list[Op]:
    """Parameters and buffers whose first reader is the unit."""
    earlier = {name for unit in chain.units[:number] for name in unit.ops}
    mine = set(chain.units[number].ops)
    return [
        op
        for op in (*graph.sources("parameter"), *graph.sources("buffer"))
        if any(u.name in mine for u in graph.users(op.name))
        and not any(u.name in earlier for u in graph.users(op.name))
    ]


def _share(sharding: Sharding, op: Op, coords: tuple[int, ...]) -> float:
    return share_held(sharding.held(op.name))(coords)


def _lower_copies(graph: Graph, ops: Sequence[Op], sharding: Sharding, coords: tuple[int, ...]) -> float:
    """Bytes of a member's copies of weights in lower formats."""
    copied = 0.0
    for op in ops:
        ways = sharding.ways(op.name) if op.target == "gp.cast_weight" else None
        if ways is not None:
            copied += lower_copy_bytes(graph, op) * share_held(ways.results[0])(coords)
    return copied


def _part_held(
    graph: Graph, ops: Sequence[Op], sharding: Sharding, coords: tuple[int, ...], samples: int
) -> float:
    """The part of a unit's results that a member holds."""
    whole = own = 0.0
    for op in ops:
        ways = sharding.ways(op.name)
        if ways is None or op.target in SOURCES:
            continue
        for kind, layouts in zip(op.types, ways.results, strict=True):
            if kind is not None:
                num_bytes = kind.bytes(samples)
                whole += num_bytes
                own += num_bytes * share_held(layouts)(coords)
    return own / whole if whole else 1.0
