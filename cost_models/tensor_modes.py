"""The price of units shared by a tensor group, from the strategies that its sharding programme chose.

Strategies are chosen once, for the whole model as one stage and a typical microbatch, and then priced
at every size of the table. A stage of the plan is solved again with its true borders when it is
lowered; there a value that leaves the stage must be whole, which the price of a cut inside a run of
slices does not hold.
"""

from collections.abc import Sequence
from dataclasses import replace

from graphpar.calibration import Calibration
from graphpar.cost import CostTable, Mode, ModeCost
from graphpar.cost_models.group_times import OpTimes, ShardingOptions, TensorGroup
from graphpar.cost_models.rates import rates_of
from graphpar.cost_models.sharding import Sharding, conversions_of
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.shards import Layout, Split


def tensor_mode(
    table: CostTable,
    graph: Graph,
    chain: Chain,
    group: TensorGroup,
    sharding: Sharding,
    options: ShardingOptions,
    *,
    shares: tuple[float, ...] = (),
    calibration: Calibration | None = None,
) -> Mode:
    """One more mode of a table: its units shared by a group.

    Args:
        table: The table with the plain prices.
        graph: The captured graph, lowered as one stage.
        chain: Its units.
        group: Who shares.
        sharding: How, as solved for this graph.
        options: What it was solved for.
        shares: The shares as the partition will name them; empty for equal ones.
        calibration: Measured rates of this machine's processor.
    """
    times = [
        OpTimes(graph, group, replace(options, samples=size), lambda d: rates_of(d, calibration))
        for size in table.sizes
    ]
    first = {kind: unit for unit, kind in reversed(list(enumerate(table.units)))}
    costs = []
    for kind in range(len(table.costs)):
        unit = chain.units[first[kind]]
        ops = [graph[name] for name in unit.ops if graph[name].target != "getitem"]
        costs.append(_unit(table, kind, graph, ops, chain, first[kind], group, sharding, times))
    members = tuple(table.class_of[device.name] for device in group.devices)
    return Mode(members, tuple(costs), shares=shares, link=group.link)


def _unit(
    table: CostTable,
    kind: int,
    graph: Graph,
    ops: Sequence[Op],
    chain: Chain,
    number: int,
    group: TensorGroup,
    sharding: Sharding,
    times: Sequence[OpTimes],
) -> ModeCost:
    forward, backward = [], []
    for at_size in times:
        ahead, behind = _seconds(graph, ops, sharding, at_size)
        forward.append(ahead)
        backward.append(behind if table.training else 0.0)
    weights = _own_weights(graph, chain, number)
    plain = table.every_mode[table.class_of[group.devices[0].name]].costs[kind]
    trained = [op for op in weights if op.target == "parameter" and op.attr("grad")]
    held = [sum(op.type.bytes(1) * _share(sharding, op, k) for op in weights) for k in range(group.size)]
    grads = [sum(op.type.bytes(1) * _share(sharding, op, k) for op in trained) for k in range(group.size)]
    gradients = plain.gradient_bytes[0]
    state = plain.optimizer_bytes[0] / gradients if gradients else 0.0
    kept = [_kept_share(graph, ops, sharding, k, times[0].options.samples) for k in range(group.size)]
    return ModeCost(
        forward_s=tuple(forward),
        backward_s=tuple(backward),
        optimizer_s=sum(
            times[0].optimizer_seconds(op, sharding.weights.get(op.name, "whole")) for op in trained
        )
        * times[0].options.microbatches,
        weight_bytes=tuple(held),
        gradient_bytes=tuple(g if table.training else 0.0 for g in grads),
        optimizer_bytes=tuple(g * state if table.training else 0.0 for g in grads),
        saved_bytes=tuple(tuple(x * share for x in plain.saved_bytes[0]) for share in kept),
        working_bytes=tuple(tuple(x * share for x in plain.working_bytes[0]) for share in kept),
    )


def _seconds(graph: Graph, ops: Sequence[Op], sharding: Sharding, times: OpTimes) -> tuple[float, float]:
    """Forward and backward of some ops with the conversions they need, each conversion once."""
    ahead = behind = 0.0
    done: set[tuple[str, Layout]] = set()
    for op in ops:
        strategy = sharding.chosen.get(op.name)
        if strategy is None:
            continue
        for parts in (times.parts(op, strategy), times.inner_seconds(op, strategy)):
            ahead, behind = ahead + parts[0], behind + parts[1]
        for name, made, wanted in (*conversions_of(sharding, graph, op), *_forming(sharding, graph, op)):
            found = times.conversion_parts(graph[name], made, wanted)
            if (name, wanted) not in done and found is not None:
                done.add((name, wanted))
                ahead, behind = ahead + found[0], behind + found[1]
    return ahead, behind


def _forming(sharding: Sharding, graph: Graph, op: Op) -> list[tuple[str, Layout, Layout]]:
    """Results that are brought into a form for all their readers."""
    found = []
    results = sharding.chosen[op.name].results
    for index, name in enumerate(_names(graph, op)):
        if name in sharding.forms:
            found.append((name, results[min(index, len(results) - 1)], sharding.forms[name]))
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


def _share(sharding: Sharding, op: Op, member: int) -> float:
    layout = sharding.weights.get(op.name, "whole")
    return layout.share(member) if isinstance(layout, Split) else 1.0


def _kept_share(graph: Graph, ops: Sequence[Op], sharding: Sharding, member: int, samples: int) -> float:
    """The part of a unit's results that a member holds."""
    whole = own = 0.0
    for op in ops:
        strategy = sharding.chosen.get(op.name)
        if strategy is None or op.target in SOURCES:
            continue
        for kind, layout in zip(op.types, strategy.results, strict=True):
            if kind is not None:
                num_bytes = kind.bytes(samples)
                whole += num_bytes
                own += num_bytes * (layout.share(member) if isinstance(layout, Split) else 1.0)
    return own / whole if whole else 1.0
