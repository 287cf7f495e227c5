"""The devices somebody owns and the links between them, as frozen data.

Only `Cluster.local` looks at the machine it runs on, save for the memory of devices of kind `cpu`,
which stand for this machine's processor and are read from the operating system.
"""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graphpar import catalogue
from graphpar.cluster_build import (
    DEFAULT_NETWORK,
    build_link,
    build_node,
    cuda_devices,
    num_cores,
    runs_here,
)
from graphpar.cluster_spec import NetworkSpec, groups, parse, read_file
from graphpar.cost import Topology
from graphpar.device import LOCAL_KIND, Device, Link, Node
from graphpar.errors import ClusterError

__all__ = ["LOCAL_KIND", "Cluster", "Device", "Link", "Node"]


@dataclass(frozen=True, repr=False)
class Cluster:
    """Nodes and the network between them.

    >>> cluster = Cluster.from_dict({"devices": [{"kind": "cpu", "count": 2, "threads": 1}]})
    >>> cluster
    Cluster(1 node, 2 devices: 2 x cpu)
    >>> [device.name for device in cluster.devices]
    ['local/0', 'local/1']
    >>> Cluster.from_dict(cluster.to_dict()) == cluster
    True
    """

    nodes: tuple[Node, ...]
    network: Link
    pairs: tuple[tuple[tuple[str, str], Link], ...] = ()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Cluster":
        """Read a YAML file.

        Raises:
            ClusterError: The file is missing, damaged, or says something impossible.
        """
        return cls._build(read_file(Path(path)), f"cluster file {os.fspath(path)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Cluster":
        """Build from a dict of the same form as the YAML file.

        Raises:
            ClusterError: It says something unknown or impossible.
        """
        return cls._build(data, "cluster")

    @classmethod
    def local(cls, count: int | None = None, *, slowdowns: Sequence[float] = ()) -> "Cluster":
        """This machine: its CUDA devices if torch can use any, else one CPU worker per core.

        Args:
            count: How many devices; all by default. More CPU workers than cores share them.
            slowdowns: For CPU workers, how many times slower each is made by emulation.
        """
        if slowdowns and count not in (None, len(slowdowns)):
            raise ValueError(f"count is {count} but there are {len(slowdowns)} slowdowns.")
        gpus = [] if slowdowns else cuda_devices()
        if gpus:
            if count is not None and count > len(gpus):
                raise ClusterError(f"This machine has {len(gpus)} CUDA devices, not {count}.")
            return cls.from_dict({"devices": gpus[:count]})
        factors = slowdowns or (1.0,) * (count if count is not None else num_cores())
        return cls.from_dict({"devices": [{"kind": LOCAL_KIND, "slowdown": f} for f in factors]})

    @classmethod
    def of(cls, *types_and_counts: str | int) -> "Cluster":
        """Build from cloud instance types, each with a count.

        >>> Cluster.of("p4d.24xlarge", 2, "g5.48xlarge", 1)
        Cluster(3 nodes, 24 devices: 16 x a100-sxm-40gb, 8 x a10g)
        """
        nodes: list[dict[str, Any]] = []
        for name, count in _pairs(types_and_counts):
            key = catalogue.find_instance(name)
            instance = catalogue.instances()[key]
            for _ in range(count):
                node = {
                    "name": f"{key.split('.')[0]}-{len(nodes)}",
                    "devices": {"kind": instance.device, "count": instance.count},
                    "link": instance.link,
                }
                if instance.network_bytes_per_s is not None:
                    node["network"] = _flow(instance)
                nodes.append(node)
        return cls.from_dict({"nodes": nodes, "network": "infiniband-xdr"})

    @classmethod
    def _build(cls, data: Mapping[str, Any], where: str) -> "Cluster":
        spec = parse(data, where)
        cpus = sum(g.count for n in spec.nodes for g in groups(n) if g.kind == LOCAL_KIND)
        nodes = tuple(build_node(node, f"{where}: nodes[{i}]", cpus) for i, node in enumerate(spec.nodes))
        here = all(runs_here(node) for node in nodes)
        default = "loopback" if here else DEFAULT_NETWORK
        if len(nodes) > 1 and spec.network is None and not here:
            warnings.warn(
                f"The {where} says nothing of the network between its nodes; {default} is assumed.",
                stacklevel=3,
            )
        written = spec.network
        network = build_link(written, default, here, f"{where}: network")
        listed = written.pairs if isinstance(written, NetworkSpec) else ()
        pairs = tuple(
            (pair.nodes, build_link(pair, network, here, f"{where}: network.pairs[{i}]"))
            for i, pair in enumerate(listed)
        )
        return cls(nodes, network, pairs)

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """All devices, in node order."""
        return tuple(device for node in self.nodes for device in node.devices)

    @cached_property
    def _by_name(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    @cached_property
    def _node_by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    def device(self, name: str) -> Device:
        """The device of that name.

        Raises:
            ClusterError: There is none.
        """
        if name not in self._by_name:
            near = ", ".join(catalogue.nearest(name, self._by_name, 3))
            raise ClusterError(f"The cluster has no device {name!r}; the nearest names: {near}.")
        return self._by_name[name]

    def node(self, name: str) -> Node:
        """The node of that name."""
        if name not in self._node_by_name:
            raise ClusterError(f"The cluster has no node {name!r}; it has {[*self._node_by_name]}.")
        return self._node_by_name[name]

    def link(self, a: str, b: str) -> Link:
        """The link between two devices, given by name."""
        node, other = self.node(self.device(a).node), self.node(self.device(b).node)
        return node.link if node.name == other.name else self._between(node, other)

    def _between(self, node: Node, other: Node) -> Link:
        for names, link in self.pairs:
            if set(names) == {node.name, other.name}:
                return link
        parts = [self.network, *(n.network for n in (node, other) if n.network is not None)]
        slowest = min(parts, key=lambda link: link.bytes_per_s)
        latency_s = max(link.latency_s for link in parts)
        if latency_s == slowest.latency_s:
            return slowest
        return Link(slowest.bytes_per_s, latency_s, slowest.emulated)

    def topology(self) -> Topology:
        """The links as plain numbers."""
        between = {}
        for node, other in itertools.combinations(self.nodes, 2):
            link = self._between(node, other)
            if link.cost != self.network.cost:
                between[(node.name, other.name)] = link.cost
        return Topology(
            node_of={device.name: device.node for device in self.devices},
            inside={node.name: node.link.cost for node in self.nodes},
            network=self.network.cost,
            between=between,
        )

    def to_dict(self) -> dict[str, Any]:
        """The canonical written form; `from_dict` builds an equal cluster from it."""
        network: Any = self.network.to_dict()
        if self.pairs:
            body = {"kind": network} if isinstance(network, str) else network
            network = {**body, "pairs": [_pair_to_dict(names, link) for names, link in self.pairs]}
        return {"nodes": [node.to_dict() for node in self.nodes], "network": network}

    def __repr__(self) -> str:
        kinds = Counter(device.kind for device in self.devices)
        inside = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        nodes, devices = len(self.nodes), len(self.devices)
        return (
            f"Cluster({nodes} node{'s' * (nodes != 1)}, {devices} device{'s' * (devices != 1)}: {inside})"
        )

    def __str__(self) -> str:
        head = ("devices", "kind", "memory", "bandwidth", "peak", "slowdown", "link in node")
        rows = [head, *(row for node in self.nodes for row in node.table_rows())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        if len(self.nodes) > 1:
            lines.append(f"network between nodes: {self.network}")
            lines += [f"  {a} - {b}: {link}" for (a, b), link in self.pairs]
        return "\n".join(lines)


def _pairs(types_and_counts: Sequence[str | int]) -> list[tuple[str, int]]:
    names, counts = types_and_counts[::2], types_and_counts[1::2]
    found = []
    for name, count in itertools.zip_longest(names, counts):
        if not isinstance(name, str) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"Cluster.of takes instance types, each followed by a count of at least 1, such as "
                f"('p4d.24xlarge', 2); got {name!r}, {count!r}."
            )
        found.append((name, count))
    if not found:
        raise ValueError("Cluster.of needs at least one instance type and its count.")
    return found


_FABRIC = {"efa": "efa", "infiniband": "infiniband-ndr", "ethernet": "ethernet-100g", "ici": "efa"}
"""Which link kind tells the latency and efficiency of a provider's fabric."""


def _flow(instance: catalogue.InstanceKind) -> dict[str, float]:
    """What one flow between two such instances gets: one card's share of the node's network."""
    assert instance.network_bytes_per_s is not None
    fabric = catalogue.links()[_FABRIC[instance.fabric]]
    one_card = instance.network_bytes_per_s / instance.nics
    return {"bytes_per_s": one_card * fabric.efficiency, "latency_s": fabric.latency_s}


def _pair_to_dict(names: tuple[str, str], link: Link) -> dict[str, Any]:
    body = link.to_dict()
    return {"nodes": list(names), **({"kind": body} if isinstance(body, str) else body)}
