"""Devices that are equal for all purposes, and the stages that can be made of them.

Two devices are interchangeable when the cost table gives them the same class and every link looks
the same from both. A *cell* is such a set; a plan need only say how many devices of each cell a
stage takes. Nodes between which no link differs are merged into one *place* first, so that a cluster
of single-device nodes on one network is as symmetric as one node.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from graphpar.cost import CostTable, LinkCost, Mode
from graphpar.partition.zones import Zone, crossings, find_zones

Links = frozenset[LinkCost]


@dataclass(frozen=True)
class Cell:
    """Interchangeable devices: one class, one place."""

    device_class: int
    place: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Cells:
    """All cells of a cluster.

    `links[place][place]` is None where a place holds one device. The rest is kept only where cells
    span nodes: `node_sizes`, the most devices of any node that holds a device of the cell; `rooms`,
    for each cell its devices in each node; `worst_inside`, the worst link inside those nodes;
    `worst_across`, the worst link between any two nodes; `alone`, whether a cell's nodes hold no others;
    `zone`, which nodes are close where pairs of them have links of their own; `beyond`, for each cell
    what more devices than one zone has meet (`zones.crossings`).
    """

    cells: tuple[Cell, ...]
    links: tuple[tuple[LinkCost | None, ...], ...]
    node_sizes: tuple[int, ...] = ()
    rooms: tuple[tuple[int, ...], ...] = ()
    worst_inside: tuple[LinkCost | None, ...] = ()
    worst_across: LinkCost | None = None
    alone: tuple[bool, ...] = ()
    zone: Zone | None = None
    beyond: tuple[tuple[tuple[int, LinkCost], ...], ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Devices in each cell."""
        return tuple(len(c.devices) for c in self.cells)

    def stands_anywhere(self, cell: int, mode: Mode) -> bool:
        """Whether a group of a mode may have its members in any nodes of a cell."""
        if len(mode.members) == 1 or mode.link is None or not self.rooms:
            return True
        links = [self.worst_across] if len(self.rooms[cell]) > 1 else []
        links += [self.worst_inside[cell]] if max(self.rooms[cell]) > 1 else []
        return all(k is not None and k.at_least(mode.link) for k in links)

    def groups(self, cell: int, mode: Mode) -> int:
        """How many groups of a mode may stand in a cell at once, joined by what its price needs."""
        size = len(mode.members)
        if self.stands_anywhere(cell, mode):
            return self.counts[cell] // size
        worst = self.worst_inside[cell]
        if worst is None or mode.link is None or not worst.at_least(mode.link):
            return 0
        return sum(room // size for room in self.rooms[cell])


@dataclass(frozen=True)
class StageOption:
    """A way to staff a stage.

    Attributes:
        take: `take[i]` devices of cell i.
        places: Where they stand.
        ring: Kinds of links between replicas.
        staff: The mode of each replica, likes next to each other.
        groups: For each replica the cell of each of its members.
        sides: The kinds of links the stage's boundaries may have; None for those that the places of
            the other options give.
    """

    take: tuple[int, ...]
    places: frozenset[int]
    ring: Links
    staff: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    sides: tuple[Links, ...] | None = None

    @property
    def width(self) -> int:
        """Number of replicas."""
        return len(self.staff)

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return sum(self.take)


def find_cells(table: CostTable) -> Cells:
    """Group the devices of a table into cells, larger nodes first in the order of the table."""
    places = _merge_nodes(table)
    place_of = {node: i for i, nodes in enumerate(places) for node in nodes}
    found: dict[tuple[int, int], list[str]] = {}
    for index, device_class in enumerate(table.device_classes):
        for device in device_class.devices:
            node = table.topology.node_of[device]
            found.setdefault((index, place_of[node]), []).append(device)
    cells = tuple(Cell(c, p, tuple(d)) for (c, p), d in found.items())
    return Cells(cells, _place_links(table, places))


def relaxed_cells(table: CostTable) -> Cells:
    """One cell per device class in one place whose link is better than every real link.

    Prices under these cells are lower bounds on prices under the real ones.
    """
    sizes = _node_sizes(table)
    inside = {table.topology.inside[a] for a, number in sizes.items() if number > 1}
    best = _best(inside | table.topology.between_nodes(sizes, sizes))
    cells = tuple(Cell(i, 0, c.devices) for i, c in enumerate(table.device_classes) if c.devices)
    return Cells(cells, ((best,),), zone=_zone(table))


def class_cells(table: CostTable) -> Cells:
    """One cell per device class, a place of its own: its best link inside a node, and across nodes.

    Prices under these cells are lower bounds on prices under the real ones, if boundaries and rings
    that must leave a node are priced as such.
    """
    sizes, nodes = _node_sizes(table), table.topology.node_of
    used = [(i, c) for i, c in enumerate(table.device_classes) if c.devices]
    cross = table.topology.between_nodes(sizes, sizes)
    network = _best(cross)
    inside = [
        _best([table.topology.inside[n] for n in {nodes[d] for d in c.devices} if sizes[n] > 1])
        for _, c in used
    ]
    homes = [{nodes[d] for d in c.devices} for _, c in used]

    def between(i: int, j: int) -> LinkCost | None:
        together = [table.topology.inside[n] for n in homes[i] & homes[j]]
        return _best([*together, *([network] if network else [])])

    links = tuple(
        tuple(inside[i] if i == j else between(i, j) for j in range(len(used))) for i in range(len(used))
    )
    cells = tuple(Cell(i, place, c.devices) for place, (i, c) in enumerate(used))
    largest = tuple(max(sizes[nodes[d]] for d in c.devices) for _, c in used)
    rooms = [Counter(nodes[d] for d in c.devices) for _, c in used]
    worst = tuple(_worst([table.topology.inside[n] for n, k in r.items() if k > 1]) for r in rooms)
    whole = tuple(tuple(r.values()) for r in rooms)
    alone = tuple(all(sizes[n] == k for n, k in r.items()) for r in rooms)
    zone = _zone(table)
    beyond = tuple(crossings(table.topology, zone, r) for r in rooms) if zone is not None else ()
    across = (*links, (network,) * len(used))
    return Cells(cells, across, largest, whole, worst, _worst(cross), alone, zone, beyond)


def _zone(table: CostTable) -> Zone | None:
    nodes = list(_node_sizes(table))
    return find_zones(table.topology, nodes) if table.topology.between else None


def _best(links: Collection[LinkCost]) -> LinkCost | None:
    """A link no worse than any of some."""
    if not links:
        return None
    return LinkCost(min(k.latency_s for k in links), max(k.bytes_per_s for k in links))


def _worst(links: Collection[LinkCost]) -> LinkCost | None:
    """A link no better than any of some."""
    if not links:
        return None
    return LinkCost(max(k.latency_s for k in links), min(k.bytes_per_s for k in links))


def pareto(links: Iterator[LinkCost] | Sequence[LinkCost]) -> Links:
    """Only links that can be the slowest for some message size."""
    kept: list[LinkCost] = []
    for link in sorted(set(links), key=lambda k: (k.bytes_per_s, -k.latency_s)):
        if all(link.latency_s > other.latency_s for other in kept):
            kept.append(link)
    return frozenset(kept)


def count_vectors(limits: Sequence[int], total: int) -> list[tuple[int, ...]]:
    """All non-zero vectors below the limits with at most `total` in sum.

    >>> count_vectors((1, 1), 1)
    [(0, 1), (1, 0)]
    """
    ranges = [range(min(n, total) + 1) for n in limits]
    return [v for v in product(*ranges) if 0 < sum(v) <= total]


def make_option(cells: Cells, groups: Sequence[tuple[int, ...]], staff: Sequence[int]) -> StageOption:
    """The stage option whose replicas have members of the given cells and the given modes."""
    take = [0] * len(cells.cells)
    places: list[frozenset[int]] = []
    for group in groups:
        places.append(frozenset(cells.cells[i].place for i in group))
        for i in group:
            take[i] += 1
    ring: set[LinkCost | None] = set()
    for left, right in combinations(places, 2):
        ring |= {cells.links[a][b] for a in left for b in right}
    return StageOption(
        tuple(take),
        frozenset().union(*places),
        pareto(k for k in ring if k is not None),
        tuple(staff),
        tuple(groups),
    )


def plain_option(cells: Cells, take: Sequence[int]) -> StageOption:
    """The given number of devices of each cell, each a replica in the plain mode of its class."""
    groups = [(i,) for i, number in enumerate(take) for _ in range(number)]
    return make_option(cells, groups, [cells.cells[i].device_class for (i,) in groups])


def links_to_others(
    cells: Cells, groups: Sequence[Sequence[int]], own: Sequence[int]
) -> tuple[Links, ...]:
    """For each place the best links to each group but one that is its own; groups are counts by cell.

    Whoever stands in a place and exchanges with all other groups meets links no better than these.
    """
    others = list(map(tuple, groups))
    others.remove(tuple(own))
    found = []
    for here in range(max(c.place for c in cells.cells) + 1):
        links = []
        for group in others:
            there = {c.place for c, n in zip(cells.cells, group, strict=True) if n}
            best = _best([k for p in there if (k := cells.links[here][p]) is not None])
            links += [best] if best is not None else []
        found.append(pareto(links))
    return tuple(found)


def _node_sizes(table: CostTable) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for device in table.class_of:
        node = table.topology.node_of[device]
        sizes[node] = sizes.get(node, 0) + 1
    return sizes


def _merge_nodes(table: CostTable) -> list[list[str]]:
    """Put a node into the first place all of whose links it shares, else open a new place.

    Nodes named in `between` see links of their own; they stay apart. So do nodes of several devices whose
    links inside are not those of the network.
    """
    topology = table.topology
    special = {node for pair in topology.between for node in pair}
    places: list[list[str]] = []
    shared: list[str] | None = None
    for node, number in _node_sizes(table).items():
        alike = node not in special and (number == 1 or topology.inside[node] == topology.network)
        if alike and shared is not None:
            shared.append(node)
            continue
        places.append([node])
        if alike:
            shared = places[-1]
    return places


def _place_links(table: CostTable, places: list[list[str]]) -> tuple[tuple[LinkCost | None, ...], ...]:
    sizes, topology = _node_sizes(table), table.topology
    rows: list[list[LinkCost | None]] = [[topology.network] * len(places) for _ in places]
    for i, (first, *others) in enumerate(places):
        if not others:
            rows[i][i] = topology.inside[first] if sizes[first] > 1 else None
    # Nodes with links of their own are alone in their places.
    place_of = {nodes[0]: i for i, nodes in enumerate(places)}
    for (a, b), link in topology.between.items():
        if a != b and a in place_of and b in place_of:
            rows[place_of[a]][place_of[b]] = link
            rows[place_of[b]][place_of[a]] = topology.between.get((b, a), link)
    return tuple(map(tuple, rows))
