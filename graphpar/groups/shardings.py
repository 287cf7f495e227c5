"""How tensor groups share their stages, as part of a plan: settled once, the same for every process."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import msgspec
import torch.distributed as dist

from graphpar.cost_models.sharding import Sharding
from graphpar.errors import PlanError, RunError
from graphpar.ir.graph import Graph
from graphpar.ir.shards import Layout, parse_layout
from graphpar.ir.strategies import Strategy, strategies_of
from graphpar.optimizer_probe import optimizer_traits
from graphpar.partition.types import GroupSharding, GroupStrategy
from graphpar.runtime.messages import Message
from graphpar.runtime.torchrun import exchange, under_torchrun
from graphpar.training import Training


def recorded(sharding: Sharding, leader: str, stage: int) -> GroupSharding:
    """A sharding as plain data."""
    numbers: dict[Strategy, int] = {}
    chosen = {name: numbers.setdefault(s, len(numbers)) for name, s in sharding.chosen.items()}
    return GroupSharding(
        leader=leader,
        stage=stage,
        strategies=tuple(
            GroupStrategy(
                tuple(map(str, s.operands)), tuple(map(str, s.results)), s.special, s.first_only, s.shares
            )
            for s in numbers
        ),
        chosen=chosen,
        forms={name: str(layout) for name, layout in sharding.forms.items()},
        weights={name: str(layout) for name, layout in sharding.weights.items()},
        whole=sharding.whole,
        inner=recorded(sharding.inner, leader, stage) if sharding.inner is not None else None,
    )


def restored(record: GroupSharding, graph: Graph) -> Sharding:
    """The sharding that was recorded, for the graph it was made for.

    Raises:
        PlanError: It names ops or layouts that do not exist.
    """
    try:
        ways = [
            Strategy(_layouts(w.operands), _layouts(w.results), w.special, w.first_only, w.shares)
            for w in record.strategies
        ]
        chosen = {name: ways[number] for name, number in record.chosen.items()}
        forms, weights = _parsed(record.forms), _parsed(record.weights)
    except (ValueError, IndexError) as error:
        raise PlanError(
            f"partition.shardings of {record.leader}: {error}; mend the file, or make the plan anew with "
            "`graphpar plan`"
        ) from error
    names = (*chosen, *forms, *weights)
    wrong = next((n for n in names if n not in graph or not _fits(chosen.get(n), n, graph)), None)
    if wrong is not None:
        raise PlanError(
            f"partition.shardings of {record.leader} names {wrong!r}, which the captured model does not "
            "have, or with other operands: it was planned with another version of torch or of the "
            "model's code; make the plan anew"
        )
    inner = restored(record.inner, graph) if record.inner is not None else None
    if inner is not None and inner.chosen.keys() != chosen.keys():
        raise PlanError(
            f"partition.shardings of {record.leader}: its two axes name unlike ops; make the plan anew "
            "with `graphpar plan`"
        )
    return Sharding(chosen, forms, weights, inner=inner)


def refuse_unfit(
    found: Sharding,
    leader: str,
    graph: Graph,
    axes: Sequence[tuple[float, ...]],
    train: Training | None = None,
) -> None:
    """Refuse what a plan may say and would give other numbers without an error.

    Args:
        found: A sharding out of a plan, which may have been edited or made for another optimiser.
        leader: The group's first device.
        graph: The graph it was restored for.
        axes: The shares of the group's members along each axis.
        train: How the job trains.

    Raises:
        PlanError: It is for a group of another shape, or computes or holds something as cannot be.
        ValueError: Members hold slices of what the optimiser needs whole.
    """
    where = f"partition.shardings of {leader}"
    if len(found.axes) != len(axes):
        raise PlanError(
            f"{where}: axes of the sharding {len(found.axes)}, of the group {len(axes)}; make the plan "
            "anew with `graphpar plan`"
        )
    for axis, shares in zip(found.axes, axes, strict=True):
        table = strategies_of(graph, shares)
        ways = (name for name, way in axis.chosen.items() if way not in table.get(name, ()))
        held = (
            name
            for name, layout in axis.weights.items()
            if layout != "whole" and layout not in _read_as(name, graph, table)
        )
        wrong = next(chain(ways, held), None)
        if wrong is not None:
            raise PlanError(
                f"{where} has a way for {wrong!r} that a group with the shares {list(shares)} cannot "
                "take: the file was edited, or planned with another version; make the plan anew with "
                "`graphpar plan`"
            )
    cut = (n for axis in found.axes for n, layout in axis.weights.items() if layout != "whole")
    sliced = next((name for name in cut if graph[name].attr("grad")), None)
    if train is None or sliced is None or (traits := optimizer_traits(train.optimizer)).elementwise:
        return
    raise ValueError(
        f"Under this plan the members of the tensor group of {leader} hold slices of "
        f"{graph[sliced].args[0]}, but {traits.name} needs whole parameters. Plan with this optimiser "
        "(graphpar.plan(train=...)): then weights stay whole."
    )


def _read_as(name: str, graph: Graph, table: Mapping[str, Sequence[Strategy]]) -> set[Layout]:
    """The layouts in which ops may want a weight."""
    return {
        layout
        for user in graph.users(name)
        for way in table.get(user.name, ())
        for operand, layout in zip(user.operands(), way.operands, strict=True)
        if operand == name
    }


def _layouts(texts: tuple[str, ...]) -> tuple[Layout, ...]:
    return tuple(map(parse_layout, texts))


def _parsed(texts: Mapping[str, str]) -> dict[str, Layout]:
    return {name: parse_layout(text) for name, text in texts.items()}


def _fits(way: Strategy | None, name: str, graph: Graph) -> bool:
    op = graph[name]
    return way is None or (len(way.operands) == len(op.operands()) and len(way.results) == len(op.types))


def agreed(solve: Callable[[], Sharding], leader: str, graph: Graph) -> Sharding:
    """The same sharding on all processes of torchrun: the first one solves, the others hear of it.

    Raises:
        RunError: The first process could not solve it.
    """
    if not (under_torchrun() and dist.is_initialized()):
        return solve()
    if dist.get_rank() == 0:
        try:
            found = solve()
        except Exception as error:
            exchange(Message("error", {"text": str(error)}))
            raise
        exchange(Message("sharding", {"record": msgspec.to_builtins(recorded(found, leader, 0))}))
        return found
    first = exchange(Message("idle"))[0]
    if first.kind == "error":
        raise RunError(f"Sharing a stage failed on rank 0: {first.data['text']}", rank=0)
    return restored(msgspec.convert(first.data["record"], GroupSharding), graph)
