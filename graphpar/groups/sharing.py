"""The graphs of tensor groups: each stage's sharding programme solved, each member's graph rewritten."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

from graphpar.cluster import Cluster
from graphpar.cost_models.sharding import (
    Sharding,
    choose_sharding,
)
from graphpar.groups.candidates import likeness
from graphpar.groups.settings import group_options, tensor_group
from graphpar.groups.shardings import agreed, recorded, refuse_unfit, restored
from graphpar.ir.chain import build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, axis_shares, whole_along
from graphpar.ir.ops import SOURCES
from graphpar.ir.rules import verify
from graphpar.partition.types import GroupSharding, Partition, Replica, StageChoice
from graphpar.passes.comm import InsertMessages
from graphpar.passes.members import member_stages
from graphpar.passes.place import Place
from graphpar.passes.shard import Shard
from graphpar.rewrite import Pipeline
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.lower import stage_ops
from graphpar.runtime.team_calls import check_in_step
from graphpar.training import Training


def member_graphs(
    graph: Graph,
    lowered: tuple[Graph, ...],
    found: Partition,
    cluster: Cluster,
    training: bool,
    like: Lowered | None = None,
    train: Training | None = None,
) -> dict[int, Graph]:
    """By rank, the graph of every member of a tensor group.

    Args:
        graph: The captured graph.
        lowered: The lowered graph of each pipeline.
        found: Who runs what.
        cluster: The devices.
        training: Whether there is a backward.
        like: Lowered before for the same ranks; its slices of weights are kept.
        train: How the job trains.
    """
    stored = {(r.leader, r.stage): r for r in found.shardings} if like is None else {}
    solver = _Solver(graph, cluster, training, train)
    local: dict[int, Graph] = {}
    units = tuple(unit.ops for unit in solver.chain.units)
    shards: list[tuple[_Group, Shard]] = []
    in_parts: dict[tuple[str, int], frozenset[str]] = {}
    for group in _groups(found, lowered):
        if (group.leader, group.stage) in stored:
            chosen = restored(stored[group.leader, group.stage], group.graph)
            shares = axis_shares(group.replica.member_shares, group.replica.axes)
            refuse_unfit(chosen, group.leader, group.graph, shares, train)
        else:
            fixed = held_slices(like, group.first_rank) if like is not None else None
            chosen = agreed(partial(solver.solve, group, fixed), group.leader, group.graph)
        shard = _shard(group, chosen)
        shards.append((group, shard))
        for axis, along in enumerate(shard.axes):
            own = along.partial_weights(group.graph)
            in_parts[group.leader, axis] = in_parts.get((group.leader, axis), frozenset()) | own
    for group, shard in shards:
        first, size = group.first_rank, len(group.replica.devices)
        before = [local.get(first + member, group.graph) for member in range(size)]
        shard = _in_parts(shard, [in_parts[group.leader, axis] for axis in range(len(shard.axes))])
        again = units[group.choice.first : group.choice.last] if group.choice.recompute else ()
        stages = member_stages(before.__getitem__, shard, size, training, again)
        mesh = group.replica.mesh
        check_in_step(stages, group.stage, training=training, units=again, mesh=mesh)
        local.update(enumerate(stages, first))
        verify(local[group.first_rank])
    return local


def _shard(group: "_Group", chosen: Sharding) -> Shard:
    """The pass that rewrites a group's stage, for any member."""
    shard: Shard | None = None
    for axis, size in zip(reversed(chosen.axes), reversed(group.replica.axes), strict=True):
        shard = Shard(group.stage, 0, axis.chosen, axis.forms, axis.weights, size=size, inner=shard)
    assert shard is not None
    return shard


def _in_parts(shard: Shard, partial: Sequence[frozenset[str]]) -> Shard:
    """The pass with the weights whose gradients are parts along each axis."""
    inner = _in_parts(shard.inner, partial[1:]) if shard.inner is not None else None
    return replace(shard, partial=partial[0], inner=inner)


def settle_shardings(
    graph: Graph, lowered: Sequence[Graph], found: Partition, cluster: Cluster, train: Training | None
) -> tuple[GroupSharding, ...]:
    """How every tensor group of a partition shares its stage, as the plan keeps it.

    Args:
        graph: The captured graph.
        lowered: The lowered graph of each pipeline.
        found: Who runs what.
        cluster: The devices.
        train: How the job trains; None for inference.
    """
    solver = _Solver(graph, cluster, train is not None, train)
    return tuple(
        recorded(solver.solve(group), group.leader, group.stage) for group in _groups(found, lowered)
    )


@dataclass(frozen=True)
class _Group:
    """A tensor group of a partition, with the lowered graph of its pipeline."""

    graph: Graph
    stage: int
    choice: StageChoice
    replica: Replica
    first_rank: int
    least_samples: int

    @property
    def leader(self) -> str:
        return self.replica.device


def _groups(found: Partition, lowered: Sequence[Graph]) -> Iterator[_Group]:
    rank_of = {device: rank for rank, device in enumerate(found.used_devices)}
    for pipeline, graph in zip(found.pipelines, lowered, strict=True):
        for number, stage in enumerate(pipeline.stages):
            for replica in stage.replicas:
                if replica.others:
                    least = min(pipeline.sizes(), default=0)
                    yield _Group(graph, number, stage, replica, rank_of[replica.device], least)


class _Solver:
    """Solves the sharding programmes of groups, those of equal groups once."""

    def __init__(self, graph: Graph, cluster: Cluster, training: bool, train: Training | None) -> None:
        self.cluster, self.chain = cluster, build_chain(graph)
        self.options = partial(group_options, graph, training, train)
        self.solved: dict[object, Sharding] = {}
        self.slices: dict[object, Mapping[str, Layouts]] = {}
        self.held: dict[str, dict[str, Layouts]] = {}

    def solve(self, group: _Group, fixed: Mapping[str, Layouts] | None = None) -> Sharding:
        """How a group shares its stage.

        Replicas of equal shares hold equal slices, and what a group reads in several stages it holds in
        one way.

        Args:
            group: The group.
            fixed: Slices by label that its members hold already; None where they hold none yet.
        """
        members = tensor_group(self.cluster, group.replica)
        lean = group.replica.lean
        stage = (id(group.graph), group.stage, members.shares, members.mesh, lean)
        kinds = tuple(map(likeness, members.devices))
        cuts_batch = group.least_samples >= members.size
        earlier = self.held.setdefault(group.leader, {})
        if fixed is None:
            # Kinds or links of another replica may differ; gradients add up by slices where these agree.
            fixed = {**earlier, **self.slices.get(stage, {})}
        read = {str(op.args[0]) for op in stage_ops(group.graph, group.stage) if op.target in SOURCES}
        fixed = {label: layout for label, layout in fixed.items() if label in read}
        alike = (stage, kinds, members.link, members.links, cuts_batch)
        if (alike, _sorted(fixed)) not in self.solved:
            options = replace(self.options(lean), fixed=fixed, cuts_batch=cuts_batch)
            found = choose_sharding(group.graph, group.stage, self.chain, members, options)
            held = _by_label(group.graph, found)
            # Who holds these slices already shares the stage in the same way.
            self.solved[alike, _sorted(fixed)] = self.solved[alike, _sorted(held)] = found
            self.slices.setdefault(stage, held)
        found = self.solved[alike, _sorted(fixed)]
        earlier.update(_by_label(group.graph, found))
        return found


def _sorted(slices: Mapping[str, Layouts]) -> tuple[tuple[str, Layouts], ...]:
    return tuple(sorted(slices.items(), key=itemgetter(0)))


def _by_label(graph: Graph, sharding: Sharding) -> dict[str, Layouts]:
    return {str(graph[name].args[0]): sharding.held(name) for name in sharding.weights}


def as_one_stage(graph: Graph, num_units: int) -> Graph:
    """A captured graph lowered as a single stage."""
    lowered, _ = Pipeline((Place((0,) * num_units), InsertMessages())).run(graph)
    return lowered


def held_slices(like: Lowered, rank: int) -> Mapping[str, Layouts]:
    """How the weights of a tensor group are held already, by label, along each of its axes."""
    placement = like.placements[rank]
    whole = whole_along(max(1, len(placement.mesh)))
    return {**dict.fromkeys(placement.labels, whole), **placement.held}
