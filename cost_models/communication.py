"""Time of collectives over real links: protocols, rings, switches with reduction, and nodes.

A collective of S bytes over n ranks moves `factor * S` through each rank's slowest link, with factor
2(n-1)/n for an all-reduce and (n-1)/n for all-gather, reduce-scatter and all-to-all. Small messages use
a low-latency protocol of a fraction of the bandwidth, larger ones on NVLink one between the two; the
fastest counts, as in NCCL
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-proto).
"""

import math
from dataclasses import dataclass
from typing import Literal

from graphpar import catalogue
from graphpar.catalogue import LinkKind

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]


@dataclass(frozen=True)
class Protocols:
    """What no datasheet says of collectives; fitted by `benchmarks/collectives.py --fit`.

    Attributes:
        ring_base_s: Launch and synchronisation of one ring collective with the bandwidth protocol.
        ring_hops: What each further rank of the ring adds, in latencies of its link.
        quick_base_s: The same launch with the low-latency protocol.
        quick_hops: What each further rank adds there.
        quick_bandwidth: Its share of the bandwidth (half of every word is a flag, and fewer channels).
        line_base_s, line_hops, line_bandwidth: The same of the protocol between the two, which has a flag
            in each line of 128 bytes and needs NVLink inside a node, which keeps a line together (LL128).
        switch_share: All-reduce inside an NVLink switch (NVLS): bytes per second of the message over
            the line rate.
        switch_base_s: Launch of that.
    """

    ring_base_s: float = 34.5e-6
    ring_hops: float = 0.967
    quick_base_s: float = 15.9e-6
    quick_hops: float = 0.620
    quick_bandwidth: float = 0.228
    switch_share: float = 0.584
    switch_base_s: float = 40.4e-6
    line_base_s: float = 32.0e-6
    line_hops: float = 0.667
    line_bandwidth: float = 0.770


PROTOCOLS = Protocols()

NETWORK_LATENCY_S = 15e-6
"""What each node of a ring across nodes adds."""

TREE_LEVEL_S = 14e-6
QUICK_TREE_LEVEL_S = 7e-6
"""What a message to the next node of a tree adds, with either protocol: read off the sums of 32 KiB to
32 MiB among four nodes of https://github.com/stas00/ml-engineering/tree/master/network/benchmarks."""

TREE_SHARE = 0.9
"""Of the rings' bandwidth, what the library expects of trees when it chooses (ncclTopoTuneModel,
https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc)."""

CUBE_MESH_LINKS = {2: 1, 3: 2, 4: 4, 5: 2, 6: 2, 7: 4, 8: 6}
"""NVLink2 lines of 25 GB/s that rings over the first so many V100 of a hybrid cube mesh use together: as
many rings as its wiring holds, both ways round. The fifth device has one neighbour among the first four
and is passed through it; the link between the fifth and the sixth is single."""

CUBE_MESH_LINE_BYTES_PER_S = 25e9
CUBE_MESH_EFFICIENCY = 0.895

RING_FILL = 0.47
"""By what part of a round a ring over NVLink3 falls short, per rank: 197, 221 and 229 of 300 GB/s among
2, 4 and 8 A100 (https://github.com/VIA-Research/vTrain/tree/main/trace)."""

WHOLE_LINE_KINDS = frozenset(
    {"nvlink2", "nvlink2-nvswitch", "nvlink3", "nvlink3-400g", "nvlink4", "nvlink4-400g", "nvlink5"}
)
"""Links of Volta and later data-centre devices, on which the library takes lines of 128 bytes."""

SWITCHED_REDUCTION_KINDS = frozenset({"nvlink4", "nvlink5"})


@dataclass(frozen=True)
class Network:
    """What joins nodes.

    Attributes:
        node_bytes_per_s: Line rate of one node in one direction.
        efficiency: Share of it that large messages reach.
        host_share: What remains of that where the host's processor moves the data, not the adapter.
    """

    node_bytes_per_s: float
    efficiency: float = 0.85
    host_share: float = 1.0

    @property
    def reached_bytes_per_s(self) -> float:
        """What a node sends per second."""
        return self.node_bytes_per_s * self.efficiency * self.host_share


@dataclass(frozen=True)
class Group:
    """Ranks of a collective.

    Attributes:
        ranks: How many take part.
        link: Kind of the link inside a node.
        nodes: Over how many nodes they are spread evenly.
        network: What joins the nodes.
        sharing: How many such groups of other ranks use each node's network at the same time.
        peer_access: Whether devices on PCIe reach each other's memory.
        neighbours: Whether ranks of a node are next to each other, as bridges join them.

    Raises:
        ValueError: If ranks, nodes or sharing are no whole numbers above zero, or the ranks cannot be
            spread evenly over the nodes.

    >>> Group(3, "nvlink3", nodes=2)
    Traceback (most recent call last):
    ValueError: 3 ranks cannot be spread evenly over 2 nodes; nodes_for() gives a count that divides them
    """

    ranks: int
    link: str
    nodes: int = 1
    network: Network | None = None
    sharing: int = 1
    peer_access: bool = True
    neighbours: bool = True

    def __post_init__(self) -> None:
        for name in ("ranks", "nodes", "sharing"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a group is {value!r}: it must be a whole number above zero")
        if self.ranks % self.nodes:
            raise ValueError(
                f"{self.ranks} ranks cannot be spread evenly over {self.nodes} nodes; "
                "nodes_for() gives a count that divides them"
            )

    @property
    def inside(self) -> str:
        """The link that binds a ring over a node's ranks: bridges join pairs, beyond them it is PCIe."""
        paired = self.neighbours and self.ranks // self.nodes <= 2
        return self.link if paired else catalogue.links()[self.link].beyond_pairs or self.link

    @property
    def kind(self) -> LinkKind:
        """That link's entry in the catalogue."""
        return catalogue.links()[self.inside]


def nodes_for(ranks: int, per_node: int) -> int:
    """The fewest nodes of at most `per_node` devices over which ranks can be spread evenly.

    >>> nodes_for(16, 8), nodes_for(9, 8), nodes_for(6, 8), nodes_for(11, 8)
    (2, 3, 1, 11)
    """
    return next(ranks // each for each in range(min(per_node, ranks), 0, -1) if ranks % each == 0)


def collective_s(
    name: CollectiveName, num_bytes: float, group: Group, algo: str = "", p: Protocols = PROTOCOLS
) -> float:
    """Seconds of one collective; `num_bytes` is the size of the whole (gathered) buffer.

    >>> group = Group(8, "nvlink3")
    >>> 7.5e-3 < collective_s("all_reduce", 2**30, group) < 8.7e-3  # measured: 8.2 ms on A100
    True
    """
    if group.ranks <= 1:
        return 0.0
    if name == "send":
        return p.ring_base_s / 2 + num_bytes / ring_bytes_per_s(group)
    moved = num_bytes * bus_factor(name, group.ranks)
    rate = ring_bytes_per_s(group)
    if name == "all_to_all" and group.nodes > 1:
        rate = min(rate, _scatter_bytes_per_s(group))
    hops_s = (group.ranks - 1) * group.kind.latency_s
    network_s = NETWORK_LATENCY_S * (group.nodes - 1)
    ring_s = p.ring_base_s + p.ring_hops * hops_s + moved / rate + network_s
    quick_s = p.quick_base_s + p.quick_hops * hops_s + moved / (rate * p.quick_bandwidth) + network_s
    best = min(ring_s, quick_s)
    if group.nodes == 1 and group.link in WHOLE_LINE_KINDS:
        best = min(best, p.line_base_s + p.line_hops * hops_s + moved / (rate * p.line_bandwidth))
    if name == "all_reduce" and group.nodes > 1 and "ring" not in algo.lower():
        best = _all_reduce_over_nodes_s(num_bytes, group, best, p)
    if name == "all_reduce" and _reduces_in_switch(group, algo):
        best = min(best, p.switch_base_s + num_bytes / (group.kind.bytes_per_s * p.switch_share))
    return best


def _all_reduce_over_nodes_s(num_bytes: float, group: Group, ring_s: float, p: Protocols) -> float:
    """Rings or, where the library takes it for faster, two trees over the nodes and a chain inside each.

    Each tree carries half of the buffer up and down again, over few nodes less than rings send, which the
    library's own choice does not know
    (https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4/).
    """
    network_bytes_per_s = ring_bytes_per_s(group)
    levels = 2 * math.log2(group.nodes)
    chain_s = (group.ranks // group.nodes - 1) * group.kind.latency_s
    heads_s = (
        p.ring_base_s + p.ring_hops * chain_s + levels * TREE_LEVEL_S,
        p.quick_base_s + p.quick_hops * chain_s + levels * QUICK_TREE_LEVEL_S,
    )
    rates = (network_bytes_per_s, network_bytes_per_s * p.quick_bandwidth)
    expected_s = min(h + 2 * num_bytes / (r * TREE_SHARE) for h, r in zip(heads_s, rates, strict=True))
    if expected_s >= ring_s:
        return ring_s
    sent = 2 * num_bytes * (group.nodes - 1) / group.nodes
    inside_s = 2 * num_bytes / _inside_bytes_per_s(group)
    return min(h + max(sent / r, inside_s) for h, r in zip(heads_s, rates, strict=True))


def bus_factor(name: CollectiveName, ranks: int) -> float:
    """Bytes through each rank's link per byte of the buffer.

    >>> bus_factor("all_reduce", 4), bus_factor("all_gather", 4)
    (1.5, 0.75)
    """
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share, "broadcast": 1.0, "send": 1.0}.get(name, share)


def _reduces_in_switch(group: Group, algo: str) -> bool:
    wanted = "ring" not in algo.lower() and group.ranks > 2
    return wanted and group.nodes == 1 and group.link in SWITCHED_REDUCTION_KINDS


def ring_bytes_per_s(group: Group) -> float:
    """What one rank sends per second while all send around the ring."""
    inside = _inside_bytes_per_s(group)
    if group.nodes == 1 or group.network is None:
        return inside
    return min(inside, group.network.reached_bytes_per_s / group.sharing)


def _scatter_bytes_per_s(group: Group) -> float:
    """Of an all-to-all over nodes: all but the part for the own node leaves through its network."""
    if group.network is None:
        return float("inf")
    per_node = max(group.ranks // group.nodes, 1)
    leaving = (group.ranks - per_node) / (group.ranks - 1)
    return group.network.reached_bytes_per_s / group.sharing / (per_node * leaving)


def _inside_bytes_per_s(group: Group) -> float:
    per_node = max(group.ranks // group.nodes, 1)
    if per_node == 1:
        return float("inf")
    kind = group.kind
    if group.link == "nvlink2":
        lines = CUBE_MESH_LINKS.get(per_node, 6)
        return lines * CUBE_MESH_LINE_BYTES_PER_S * CUBE_MESH_EFFICIENCY
    rate = kind.bytes_per_s * kind.reached(group.peer_access)
    if group.link == "nvlink3":
        # Few ranks keep fewer chunks on their way.
        return rate * (1 + RING_FILL / 8) / (1 + RING_FILL / per_node)
    if per_node == 2 and group.link in ("nvlink4", "nvlink5"):
        return rate * 0.85
    return rate
