"""Seeded placement problems like the published ones, to try the solver on what nobody published.

    python benchmarks/placement_family.py FOLDER [--seed 0] [--from PUBLIC.json ...]

Without `--from`, writes made-up layer graphs: convolution branches side by side, recurrent layers with
attention, residual stages, each only run and also trained. With it, writes copies of the files given with
more or fewer accelerators, no CPUs, tight memory, other amounts, and two in a row.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Body: TypeAlias = dict[str, Any]
"""The object of a file."""


@dataclass
class Layers:
    """Collects layers in the order in which they run.

    Attributes:
        seed: Seed of the amounts.
        nodes, edges: As in the file.
    """

    seed: int
    nodes: list[Body] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def add(self, *before: int, work: float = 1.0) -> int:
        """A layer after others; returns its number."""
        time = work * self._random.lognormvariate(0.0, 0.7)
        self.nodes.append(
            {
                "id": len(self.nodes),
                "cpuLatency": 10.0 * time,
                "fpgaLatency": time,
                "supportedOnFpga": True,
                "isBackwardNode": False,
                "colorClass": len(self.nodes),
                "size": 1e6 * self._random.uniform(0.5, 2.0),
                "sends": work * self._random.uniform(0.05, 0.5),
            }
        )
        self.edges.extend((a, len(self.nodes) - 1) for a in before)
        return len(self.nodes) - 1

    def run(self, start: int, length: int) -> int:
        """A chain of layers."""
        for _ in range(length):
            start = self.add(start)
        return start


def branches(modules: int, lengths: tuple[int, ...], seed: int) -> Layers:
    """Convolution modules: chains side by side, then joined."""
    layers = Layers(seed)
    x = layers.add()
    for _ in range(modules):
        x = layers.add(*[layers.run(x, length) for length in lengths])
    return layers


def recurrent(depth: int, seed: int) -> Layers:
    """An encoder and a decoder of residual recurrent layers; the decoder looks at the encoder."""
    layers = Layers(seed)
    encoder = layers.add()
    skips = [encoder]
    for _ in range(depth):
        encoder = layers.add(layers.add(encoder, work=4.0), *skips[-1:])
        skips.append(encoder)
    decoder = attention = layers.add(encoder, layers.add())
    for _ in range(depth):
        decoder = layers.add(layers.add(decoder, attention, work=4.0), decoder)
    layers.add(decoder, attention)
    return layers


def residual(stages: int, seed: int) -> Layers:
    """Chains with a short way around each piece."""
    layers = Layers(seed)
    x = layers.add()
    for _ in range(stages):
        x = layers.add(layers.run(x, 6), layers.run(x, 2))
    return layers


def problem_of(layers: Layers, accelerators: int, *, trained: bool, room: float = 4.0) -> Body:
    """The problem object; the way back shares each layer's colour class and runs in reverse."""
    nodes, edges = [dict(node) for node in layers.nodes], list(layers.edges)
    if trained:
        count = len(nodes)
        for node in layers.nodes:
            back = {**node, "id": node["id"] + count, "isBackwardNode": True}
            nodes.append({**back, "cpuLatency": 2 * back["cpuLatency"], "size": 0.0})
            nodes[-1]["fpgaLatency"] *= 2
        edges += [(b + count, a + count) for a, b in layers.edges]
        edges += [(v, v + count) for v in range(count)]
    sends = [node.pop("sends") for node in nodes]
    total = sum(node["size"] for node in nodes)
    return {
        "maxSizePerFPGA": room * total / accelerators,
        "maxFPGAs": accelerators,
        "maxCPUs": 1,
        "nodes": nodes,
        "edges": [{"sourceId": a, "destId": b, "cost": sends[a]} for a, b in edges],
    }


def made_up(seed: int) -> Iterator[tuple[str, Body]]:
    """Names and problems."""
    graphs = {
        "throughput-branches": branches(9, (2, 4, 6, 3), seed),
        "throughput-recurrent": recurrent(8, seed),
        "throughput-residual": residual(16, seed),
        # 38,810 ideals, somewhat more than any published layer graph has
        "throughput-wide": branches(11, (6, 7, 8, 6), seed),
    }
    for name, layers in graphs.items():
        for trained in (False, True):
            way = "training" if trained else "inference"
            yield f"{name}-{way}", problem_of(layers, 6, trained=trained)
        yield name.replace("throughput", "latency"), problem_of(layers, 4, trained=False, room=1.3)


def altered(name: str, body: Body, seed: int) -> Iterator[tuple[str, Body]]:
    """Copies of one problem, each changed in one way."""
    total = sum(node.get("size", 0.0) for node in body["nodes"])
    for count in (1, 2, 8):
        yield f"{name}-k{count}", {**body, "maxFPGAs": count}
    yield f"{name}-no-cpu", {**body, "maxCPUs": 0}
    tight = 1.15 * total / body["maxFPGAs"]
    yield f"{name}-tight", {**body, "maxSizePerFPGA": tight}
    yield f"{name}-tight-no-cpu", {**body, "maxSizePerFPGA": tight, "maxCPUs": 0}
    yield f"{name}-shaken", shaken(body, seed)
    yield f"{name}-twice", twice(body)


def shaken(body: Body, seed: int) -> Body:
    """Every latency and transfer changed by up to half, at random."""
    draw = random.Random(seed)
    nodes = []
    for node in body["nodes"]:
        factor = draw.uniform(0.5, 1.5)
        changed = {key: node[key] * factor for key in ("cpuLatency", "fpgaLatency")}
        nodes.append({**node, **changed})
    factors: dict[Any, float] = {}
    edges = [
        {**edge, "cost": edge["cost"] * factors.setdefault(edge["sourceId"], draw.uniform(0.5, 1.5))}
        for edge in body["edges"]
    ]
    return {**body, "nodes": nodes, "edges": edges}


def twice(body: Body) -> Body:
    """Two copies, the second's first operators waiting for the first's last ones."""
    ids = [node["id"] for node in body["nodes"] if not node["isBackwardNode"]]
    sources = {edge["sourceId"] for edge in body["edges"]}
    targets = {edge["destId"] for edge in body["edges"]}
    cost_of = {edge["sourceId"]: edge["cost"] for edge in body["edges"]}
    nodes, edges = [], []
    for copy in ("a", "b"):
        for node in body["nodes"]:
            colour = node.get("colorClass")
            named = {"id": f"{copy}{node['id']}"}
            if colour is not None:
                named["colorClass"] = f"{copy}{colour}"
            nodes.append({**node, **named})
        for edge in body["edges"]:
            ends = {key: f"{copy}{edge[key]}" for key in ("sourceId", "destId")}
            edges.append({**edge, **ends})
    last = [v for v in ids if v not in sources] or [
        max(ids, key=lambda v: math.inf if v in sources else 0)
    ]
    first = [v for v in ids if v not in targets]
    edges += [
        {"sourceId": f"a{v}", "destId": f"b{w}", "cost": cost_of.get(v, 0.0)} for v in last for w in first
    ]
    return {**body, "nodes": nodes, "edges": edges}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="public", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.public:
        problems = [
            pair
            for path in options.public
            for pair in altered(path.stem, json.loads(path.read_text()), options.seed)
        ]
    else:
        problems = list(made_up(options.seed))
    for name, body in problems:
        (options.folder / f"{name}.json").write_text(json.dumps(body))
        print(name, len(body["nodes"]), "operators")


if __name__ == "__main__":
    main()
