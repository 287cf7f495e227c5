"""Which nodes are close: zones within zones, from the links between nodes.

Nodes that are joined by links of some quality or better, directly or over others, form a zone; with worse
links zones grow together. Where nodes hang on a tree of switches, zones are what hangs below one switch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from graphpar.cost import LinkCost, Topology


@dataclass(frozen=True)
class Zone:
    """Nodes, and the zones they form that are closer; a single node has no parts."""

    nodes: tuple[str, ...]
    parts: tuple["Zone", ...] = ()


def find_zones(topology: Topology, nodes: Sequence[str]) -> Zone:
    """All nodes as zones within zones, those joined by the best links the innermost.

    >>> link, slow = LinkCost(0.0, 1e10), LinkCost(0.0, 1e9)
    >>> racks = Topology({}, {}, slow, {("a", "c"): link, ("b", "d"): link})
    >>> [zone.nodes for zone in find_zones(racks, "abcd").parts]
    [('a', 'c'), ('b', 'd')]
    """
    zones = [Zone((node,)) for node in nodes]
    for link in sorted(_links(topology, nodes), key=closeness):
        if len(zones) == 1:
            break
        zones = list(_joined(topology, zones, link))
    return zones[0] if len(zones) == 1 else Zone(tuple(nodes), tuple(zones))


def closeness(link: LinkCost) -> tuple[float, float]:
    """Links in order, the best first: by bandwidth, then by latency."""
    return 1 / link.bytes_per_s, link.latency_s


def _links(topology: Topology, nodes: Sequence[str]) -> set[LinkCost]:
    mine = set(nodes)
    named = {k for (a, b), k in topology.between.items() if a in mine and b in mine}
    return named | ({topology.network} if len(mine) > 1 else set())


def _joined(topology: Topology, zones: Sequence[Zone], link: LinkCost) -> Iterator[Zone]:
    """Zones with those as one that are joined by a link."""
    group = list(range(len(zones)))
    for i, j in combinations(range(len(zones)), 2):
        if group[i] != group[j] and _meet(topology, zones[i], zones[j], link):
            group = [group[i] if g == group[j] else g for g in group]
    for leader in dict.fromkeys(group):
        parts = tuple(zone for zone, g in zip(zones, group, strict=True) if g == leader)
        nodes = tuple(node for part in parts for node in part.nodes)
        yield parts[0] if len(parts) == 1 else Zone(nodes, parts)


def _meet(topology: Topology, zone: Zone, other: Zone, link: LinkCost) -> bool:
    found = topology.between
    return any(
        (found.get((a, b)) or found.get((b, a)) or topology.network) == link
        for a in zone.nodes
        for b in other.nodes
    )


def crossings(
    topology: Topology, zone: Zone, rooms: Mapping[str, int]
) -> tuple[tuple[int, LinkCost], ...]:
    """What devices that do not fit into one zone meet: for each level, the outermost first.

    `rooms` are the devices of each node. A level cuts all nodes into zones; with the most devices that
    one of them has comes a link that is no worse than any between two of them. More devices than that
    are in two zones at least, and some link between them is that good at best.

    >>> link, slow = LinkCost(0.0, 1e10), LinkCost(0.0, 1e9)
    >>> racks = Topology({}, {}, slow, {("a", "c"): link, ("b", "d"): link})
    >>> [n for n, _ in crossings(racks, find_zones(racks, "abcd"), {"a": 4, "c": 4, "b": 2})]
    [8, 4]
    """
    found = []
    level = [zone]
    while any(z.parts for z in level):
        level = [part for z in level for part in (z.parts or (z,))]
        mine = [[n for n in z.nodes if rooms.get(n)] for z in level]
        mine = [nodes for nodes in mine if nodes]
        links = {k for a, b in combinations(mine, 2) for k in topology.between_nodes(a, b)}
        if links:
            most = max(sum(rooms[n] for n in nodes) for nodes in mine)
            best = LinkCost(min(k.latency_s for k in links), max(k.bytes_per_s for k in links))
            found.append((most, best))
    return tuple(found)
