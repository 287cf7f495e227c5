"""What tensor groups are asked: for which microbatches, at which prices of memory, over which links.

Needs no torch as long as nobody asks for an optimiser's traits, so that processes that price groups start
fast.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations

from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.ir.chain import Chain
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import line_of
from graphpar.partition.types import Replica
from graphpar.passes.comm import InsertMessages
from graphpar.passes.place import place_ops
from graphpar.training import Training

USUAL_MICROBATCHES = 4
"""Strategies are chosen for a quarter of the batch, whatever the schedule: a price holds for them all."""

ENOUGH_SAMPLES, ENOUGH_BYTES = 4, 1 << 36
"""But for no more samples than this, if their results take so much memory: most plans have microbatches
of a few such samples, and batches share what is found. For one sample alone steps of plans of a Llama-8B
were 6 % longer, and for four of a BERT on 64 tokens 2 %."""

_PRICES = ((4.0, 0.0), (4.0, 1.0), (4.0, 4.0), (16.0, 16.0))
"""By how dear memory is (`Replica.lean`) how often a byte counts as if it were sent: one of weights,
gradients and state, and one kept for backward. A group is there to hold what one device cannot."""


def placed_whole(graph: Graph, chain: Chain) -> Graph:
    """A captured graph, casts and all, lowered as a single stage of these units."""
    stages = {name: 0 for unit in chain.units for name in unit.ops}
    placed = graph.with_ops(place_ops(graph, stages, "place"), level="placed")
    return InsertMessages().run(placed)


def group_options(
    graph: Graph, training: bool, train: Training | None = None, lean: int = 0
) -> ShardingOptions:
    """What strategies are chosen for.

    Args:
        graph: The captured graph.
        training: Whether there is a backward.
        train: How the job trains.
        lean: How dear memory is.

    Raises:
        ValueError: The optimiser's step on one parameter depends on others, which other members hold.
    """
    from graphpar.optimizer_probe import optimizer_traits

    traits = optimizer_traits(train.optimizer) if train is not None else None
    if traits is not None and not traits.separable:
        raise ValueError(
            f"{traits.name} cannot train a model that is shared by several devices: its step on one "
            "parameter depends on the others, and each device holds only some of them. Take an optimiser "
            "that treats every parameter by itself; clip gradients with Training(max_grad_norm=...), "
            "which is exact over all devices."
        )
    usual = ShardingOptions(
        samples=1,
        microbatches=USUAL_MICROBATCHES,
        training=training,
        cuts_weights=traits is None or traits.elementwise,
    )
    return options_at(usual, graph, lean)


def options_at(usual: ShardingOptions, graph: Graph, lean: int) -> ShardingOptions:
    """The same options for the batch of a graph, at a price of memory."""
    hold_factor, keep_factor = _PRICES[lean]
    enough = max(ENOUGH_SAMPLES, ENOUGH_BYTES // max(1, graph.bytes_per_sample))
    samples = max(1, min(graph.batch // USUAL_MICROBATCHES, enough))
    return replace(usual, samples=samples, hold_factor=hold_factor, keep_factor=keep_factor)


def tensor_group(cluster: Cluster, replica: Replica) -> TensorGroup:
    """The devices, shares and worst links of a replica."""

    def link(a: str, b: str) -> LinkCost:
        return cluster.link(a, b).cost

    worst, members = worst_link(replica, link), replica.devices
    rows = (
        [{line_of(k, axis, replica.mesh) for k in range(len(members))} for axis in range(2)]
        if replica.mesh
        else []
    )
    links = tuple(
        _worst_of(link(members[a], members[b]) for line in lines for a, b in combinations(line, 2))
        for lines in rows
    )
    devices = tuple(map(cluster.device, members))
    return TensorGroup(devices, replica.member_shares, worst, replica.mesh, links)


def worst_link(replica: Replica, link: Callable[[str, str], LinkCost]) -> LinkCost:
    """The longest latency and the lowest rate between members of a replica."""
    return _worst_of(link(a, b) for a, b in combinations(replica.devices, 2))


def _worst_of(links: Iterable[LinkCost]) -> LinkCost:
    every = list(links)
    return LinkCost(max(k.latency_s for k in every), min(k.bytes_per_s for k in every))
