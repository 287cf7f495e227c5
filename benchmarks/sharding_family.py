"""Seeded sharding problems that look like the contest's, to try the solver on what nobody published.

    python benchmarks/sharding_family.py FOLDER [--scale 0.1] [--seed 0] [--from PUBLIC.json.gz ...]

Writes one `.json.gz` a recipe: transformers, graph networks, U-Nets, mixtures of experts and diffusion
models, trained or only run, on meshes of two and three axes; and, of each public file given, copies with
less memory, other costs, repeated strategies, and several joined in time. A made-up model is a list of
operations over shaped tensors. An operation's strategies say which of its dimensions each mesh axis
splits; its cost is the reduction of what was summed in parts, an edge's cost is the traffic of moving the
operand from one layout to the one wanted, and the memory limit is a little above the least possible peak,
as in the public files.
"""

import argparse
import gzip
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

IMPOSSIBLE = 10**18

Layout: TypeAlias = tuple[str, ...]
"""For each mesh axis the dimension that it splits, or an empty string."""

Body: TypeAlias = dict[str, Any]
"""The `problem` object of a file."""


@dataclass
class Operation:
    """One node: a tensor and the dimensions that its computation runs over.

    Attributes:
        shape: Size of each named dimension of the result.
        summed: Dimensions that are summed away; splitting one costs a reduction.
        operands: Positions of other operations.
        bound: The operand's layout must be taken over as it is (an update in place, a loop).
    """

    shape: dict[str, int]
    summed: dict[str, int] = field(default_factory=dict)
    operands: tuple[int, ...] = ()
    bound: bool = False
    kept: bool = False


class Model:
    """Collects operations in the order in which they run."""

    def __init__(self, seed: int) -> None:
        self.operations: list[Operation] = []
        self.random = random.Random(seed)

    def add(
        self,
        shape: dict[str, int],
        *operands: int,
        summed: dict[str, int] | None = None,
        bound: bool = False,
        kept: bool = False,
    ) -> int:
        """Add an operation; returns its position."""
        self.operations.append(Operation(shape, summed or {}, operands, bound, kept))
        return len(self.operations) - 1

    def pointwise(self, x: int, *others: int, bound: bool = False) -> int:
        """An operation on every entry of `x`."""
        return self.add(self.operations[x].shape, x, *others, bound=bound)

    def product(self, x: int, w: int) -> int:
        """A contraction over the dimensions that both have and that are no batch."""
        left, right = self.operations[x].shape, self.operations[w].shape
        common = {d: n for d, n in left.items() if d in right and not d.startswith("b")}
        kept = {d: n for d, n in {**left, **right}.items() if d not in common}
        return self.add(kept, x, w, summed=common)

    def total(self, x: int, dimension: str) -> int:
        """A sum over one dimension."""
        shape = dict(self.operations[x].shape)
        size = shape.pop(dimension)
        return self.add(shape, x, summed={dimension: size})

    def renamed(self, x: int, names: dict[str, str]) -> int:
        """A reshape that only renames dimensions."""
        shape = {names.get(d, d): n for d, n in self.operations[x].shape.items()}
        return self.add(shape, x)


def transformer(layers: int, training: bool, seed: int) -> Model:
    """Attention and a feed-forward net, per layer."""
    model = Model(seed)
    batch, width, inner = 64, 1024 * model.random.choice([1, 2, 4]), 4096
    x = model.add({"b": batch, "s": 512, "e": width}, kept=True)
    weights, trail = [], []
    for _ in range(layers):
        w = [
            model.add(shape, kept=True)
            for shape in ({"e": width, "h": width}, {"h": width, "e": width}, {"e": width, "f": inner})
        ]
        weights += w
        norm = model.pointwise(x, model.total(x, "e"))
        q, k = model.product(norm, w[0]), model.product(norm, w[0])
        k = model.renamed(k, {"s": "t"})
        scores = model.add({"b": batch, "s": 512, "t": 512}, q, k, summed={"h": width})
        scores = model.pointwise(scores, model.total(scores, "t"))
        mixed = model.add({"b": batch, "s": 512, "h": width}, scores, k, summed={"t": 512})
        x = model.pointwise(model.product(mixed, w[1]), x)
        hidden = model.pointwise(model.product(x, w[2]))
        back = model.renamed(w[2], {})
        x = model.pointwise(model.product(hidden, back), x)
        trail += [q, scores, mixed, hidden]
    return _trained(model, x, weights, trail) if training else model


def graph_network(steps: int, training: bool, seed: int) -> Model:
    """Messages along edges, summed at nodes; a few weights shared by every step."""
    model = Model(seed)
    nodes, links, width = 4096, 16384, 512
    x = model.add({"b": nodes, "e": width}, kept=True)
    table = model.add({"b": nodes, "i": 2}, kept=True)
    weights, trail = [], []
    w = [model.add({"e": width, "f": width}, kept=True) for _ in range(4)]
    for step in range(steps):
        if step % 8 == 0:
            w = [model.add({"e": width, "f": width}, kept=True) for _ in range(4)]
            weights += w
        sent = model.add({"bl": links, "e": width}, x, table)
        sent = model.pointwise(model.renamed(model.product(sent, w[step % 4]), {"f": "e"}))
        scale = model.total(sent, "e")
        sent = model.pointwise(sent, scale)
        taken = model.add({"b": nodes, "e": width}, sent, summed={"bl": links})
        x = model.pointwise(taken, x)
        trail += [sent, taken]
    return _trained(model, x, weights, trail) if training else model


def u_net(levels: int, training: bool, seed: int) -> Model:
    """Convolutions going down and up, with long skips."""
    model = Model(seed)
    x = model.add({"b": 64, "p": 4096, "c": 64}, kept=True)
    weights: list[int] = []
    trail: list[int] = []
    skips: list[int] = []
    width = 64
    for level in range(2 * levels):
        down = level < levels
        if not down and skips:
            x = model.pointwise(x, skips.pop())
        for _ in range(3):
            w = model.add({"c": width, "d": width}, kept=True)
            weights.append(w)
            y = model.renamed(model.product(x, w), {"d": "c"})
            mean = model.total(model.total(y, "p"), "b")
            x = model.pointwise(model.pointwise(y, mean), x)
            trail.append(y)
        if down:
            skips.append(x)
    return _trained(model, x, weights, trail) if training else model


def mixture(layers: int, training: bool, seed: int) -> Model:
    """Attention, then experts that tokens are sent to and fetched from, per layer."""
    model = Model(seed)
    width, inner, experts, room = 1024, 2048, 32, 1024
    x = model.add({"b": 64, "s": 512, "e": width}, kept=True)
    weights, trail = [], []
    for _ in range(layers):
        shapes: tuple[dict[str, int], ...] = (
            {"e": width, "h": width},
            {"h": width, "e": width},
            {"e": width, "x": experts},
            {"bx": experts, "e": width, "f": inner},
            {"bx": experts, "f": inner, "e": width},
        )
        w = [model.add(shape, kept=True) for shape in shapes]
        weights += w
        norm = model.pointwise(x, model.total(x, "e"))
        q = model.product(norm, w[0])
        scores = model.add(
            {"b": 64, "s": 512, "t": 512}, q, model.renamed(q, {"s": "t"}), summed={"h": width}
        )
        mixed = model.add({"b": 64, "s": 512, "h": width}, scores, q, summed={"t": 512})
        x = model.pointwise(model.product(mixed, w[1]), x)
        gates = model.product(x, w[2])
        gates = model.pointwise(gates, model.total(gates, "x"))
        sent = model.add({"bx": experts, "k": room, "e": width}, x, gates, summed={"b": 64})
        hidden = model.pointwise(model.product(sent, w[3]))
        back = model.product(hidden, w[4])
        x = model.pointwise(
            model.add({"b": 64, "s": 512, "e": width}, back, gates, summed={"bx": experts, "k": room}), x
        )
        trail += [scores, mixed, sent, hidden]
    return _trained(model, x, weights, trail) if training else model


def diffusion(levels: int, training: bool, seed: int) -> Model:
    """A U-Net with attention; every block adds the same embedding of a moment and looks at one text."""
    model = Model(seed)
    width, inner = 256, 512
    x = model.add({"b": 64, "p": 1024, "c": width}, kept=True)
    moment = model.add({"b": 64, "m": width}, kept=True)
    text = model.add({"b": 64, "t": 128, "c": width}, kept=True)
    weights: list[int] = []
    trail: list[int] = []
    skips: list[int] = []
    for level in range(2 * levels):
        if level >= levels:
            x = model.pointwise(x, skips.pop())
        shapes: tuple[dict[str, int], ...] = (
            {"c": width, "d": width},
            {"m": width, "d": width},
            {"c": width, "h": inner},
            {"h": inner, "c": width},
        )
        w = [model.add(shape, kept=True) for shape in shapes]
        weights += w
        y = model.product(x, w[0])
        y = model.renamed(model.pointwise(y, model.product(moment, w[1])), {"d": "c"})
        y = model.pointwise(y, model.total(model.total(y, "p"), "b"))
        query, key = model.product(y, w[2]), model.product(text, w[2])
        seen = model.add({"b": 64, "p": 1024, "t": 128}, query, key, summed={"h": inner})
        seen = model.pointwise(seen, model.total(seen, "t"))
        mixed = model.add({"b": 64, "p": 1024, "h": inner}, seen, key, summed={"t": 128})
        x = model.pointwise(model.product(mixed, w[3]), x)
        trail += [y, query, seen, mixed]
        if level < levels:
            skips.append(x)
    return _trained(model, x, weights, trail) if training else model


def _trained(model: Model, x: int, weights: list[int], trail: list[int]) -> Model:
    """The way back: every kept result again, in reverse, then updates in place."""
    gradient = model.pointwise(x)
    for y in reversed(trail):
        again = model.pointwise(y)
        gradient = model.add(model.operations[y].shape, gradient, again)
    for w in weights:
        step = model.add(model.operations[w].shape, w, gradient)
        first, second = model.pointwise(w, step), model.pointwise(w, step)
        moved = model.pointwise(w, first, second)
        model.operations[moved].kept = True
        model.add(model.operations[w].shape, w, bound=True, kept=True)
        model.add(model.operations[w].shape, moved, bound=True, kept=True)
    return model


def problem_of(model: Model, name: str, mesh: tuple[int, ...], room: float = 1.1) -> Body:
    """The problem object of a model on a mesh; `room` times the least peak is the memory limit."""
    layouts = [_layouts(operation, mesh) for operation in model.operations]
    costs, usages = [], []
    for operation, options in zip(model.operations, layouts, strict=True):
        size = 4 * math.prod(operation.shape.values())
        costs.append([_reduction_cost(operation, layout, mesh, size) for layout in options])
        usages.append([_share(operation.shape, layout, mesh, size) for layout in options])
    edge_nodes, edge_costs = [], []
    for v, operation in enumerate(model.operations):
        for u in operation.operands:
            edge_nodes.append([u, v])
            edge_costs.append(_moves(model.operations[u], layouts[u], operation, layouts[v], mesh))
    intervals = _lives(model)
    least = _peak(intervals, [min(row) for row in usages])
    return {
        "name": name,
        "nodes": {"intervals": intervals, "costs": costs, "usages": usages},
        "edges": {"nodes": edge_nodes, "costs": edge_costs},
        "usage_limit": int(room * least),
    }


def _layouts(operation: Operation, mesh: tuple[int, ...]) -> list[Layout]:
    sizes = {**operation.shape, **operation.summed}
    options = []
    for layout in product(("", *sizes), repeat=len(mesh)):
        ways = {d: math.prod(n for n, e in zip(mesh, layout, strict=True) if e == d) for d in sizes}
        if all(sizes[d] % way == 0 for d, way in ways.items()):
            options.append(layout)
    return options


def _share(shape: dict[str, int], layout: Layout, mesh: tuple[int, ...], size: int) -> int:
    return size // math.prod(n for n, d in zip(mesh, layout, strict=True) if d in shape)


def _reduction_cost(operation: Operation, layout: Layout, mesh: tuple[int, ...], size: int) -> int:
    amount = _share(operation.shape, layout, mesh, size)
    rounds = sum((n - 1) / n for n, d in zip(mesh, layout, strict=True) if d in operation.summed)
    # Every axis that splits nothing computes the same thing again.
    idle = math.prod(n for n, d in zip(mesh, layout, strict=True) if not d) - 1
    return int(2 * amount * rounds) + idle * len(operation.summed)


def _moves(
    source: Operation,
    from_layouts: list[Layout],
    target: Operation,
    to_layouts: list[Layout],
    mesh: tuple[int, ...],
) -> list[int]:
    size = 4 * math.prod(source.shape.values())
    taken = {**target.shape, **target.summed}
    moves = []
    for have in from_layouts:
        have_here = tuple(d if d in source.shape else "" for d in have)
        amount = _share(source.shape, have_here, mesh, size)
        for want in to_layouts:
            wanted = tuple(d if d in source.shape and d in taken else "" for d in want)
            if target.bound:
                moves.append(0 if have == want else IMPOSSIBLE)
                continue
            traffic = 0.0
            for n, old, new in zip(mesh, have_here, wanted, strict=True):
                if old and old != new:
                    # gathered, or exchanged for another dimension
                    traffic += amount * (n - 1) if not new else amount * (n - 1) / n
            moves.append(int(traffic))
    return moves


def _lives(model: Model) -> list[list[int]]:
    count = len(model.operations)
    last = list(range(1, count + 1))
    for v, operation in enumerate(model.operations):
        for u in operation.operands:
            last[u] = max(last[u], v + 1)
    return [[0, count] if o.kept else [v, last[v]] for v, o in enumerate(model.operations)]


def _peak(intervals: list[list[int]], amounts: list[int]) -> int:
    change: dict[int, int] = {}
    for (begin, end), amount in zip(intervals, amounts, strict=True):
        if begin < end:
            change[begin] = change.get(begin, 0) + amount
            change[end] = change.get(end, 0) - amount
    live = peak = 0
    for moment in sorted(change):
        live += change[moment]
        peak = max(peak, live)
    return peak


def tighter(body: Body, room: float) -> Body:
    """The same problem with another memory limit: `room` times the least possible peak."""
    nodes = body["nodes"]
    least = _peak(nodes["intervals"], [min(row) for row in nodes["usages"]])
    return {**body, "name": f"{body['name']}-room{room}", "usage_limit": int(room * least)}


def scaled(body: Body, factor: int) -> Body:
    """Every possible cost times a factor."""
    return _with_costs(body, f"x{factor}", lambda cost: cost * factor if cost < IMPOSSIBLE else cost)


def shaken(body: Body, seed: int, most: float = 0.3) -> Body:
    """Every possible cost changed by up to a share, at random."""
    draw = random.Random(seed)
    return _with_costs(
        body,
        f"shaken{seed}",
        lambda cost: int(cost * draw.uniform(1 - most, 1 + most)) if cost < IMPOSSIBLE else cost,
    )


def _with_costs(body: Body, label: str, change: Callable[[int], int]) -> Body:
    nodes, edges = body["nodes"], body["edges"]
    return {
        **body,
        "name": f"{body['name']}-{label}",
        "nodes": {**nodes, "costs": [[change(cost) for cost in row] for row in nodes["costs"]]},
        "edges": {**edges, "costs": [[change(cost) for cost in row] for row in edges["costs"]]},
    }


def joined(bodies: list[Body], at_once: bool) -> Body:
    """Several problems in one: one after the other in time, or all at once with their limits added."""
    intervals: list[list[int]] = []
    costs: list[list[int]] = []
    usages: list[list[int]] = []
    edge_nodes: list[list[int]] = []
    edge_costs: list[list[int]] = []
    shift, limits = 0, []
    for body in bodies:
        nodes, edges, base = body["nodes"], body["edges"], len(costs)
        intervals += [[begin + shift, end + shift] for begin, end in nodes["intervals"]]
        costs += nodes["costs"]
        usages += nodes["usages"]
        edge_nodes += [[base + v for v in ends] for ends in edges["nodes"]]
        edge_costs += edges["costs"]
        limits.append(body["usage_limit"])
        if not at_once:
            shift = 1 + max(end for _, end in intervals)
    return {
        "name": "+".join(body["name"] for body in bodies) + ("-at-once" if at_once else ""),
        "nodes": {"intervals": intervals, "costs": costs, "usages": usages},
        "edges": {"nodes": edge_nodes, "costs": edge_costs},
        "usage_limit": sum(limits) if at_once else max(limits),
    }


def made_up(scale: float, seed: int) -> Iterator[Body]:
    """Models on meshes; `scale` 1 makes some thousand to some ten thousand nodes of each."""

    def size(count: int) -> int:
        return max(1, round(scale * count))

    for name, model, mesh in (
        ("transformer-train-4x8", transformer(size(400), True, seed), (4, 8)),
        ("transformer-run-2x4x4", transformer(size(100), False, seed), (2, 4, 4)),
        ("graph-train-8x16", graph_network(size(2000), True, seed), (8, 16)),
        ("graph-run-4x8", graph_network(size(3000), False, seed), (4, 8)),
        ("unet-train-2x16", u_net(size(300), True, seed), (2, 16)),
        ("unet-train-2x4x4", u_net(size(60), True, seed), (2, 4, 4)),
        ("mixture-train-4x8", mixture(size(400), True, seed), (4, 8)),
        ("mixture-run-2x16", mixture(size(400), False, seed), (2, 16)),
        ("diffusion-train-8x16", diffusion(size(250), True, seed), (8, 16)),
    ):
        yield problem_of(model, name, mesh)


def altered(bodies: Iterable[Body], seed: int) -> Iterator[Body]:
    """Copies of problems, each changed in one way."""
    for body in bodies:
        yield tighter(body, 1.02)
        yield tighter(body, 1.5)
        yield shaken(body, seed)
        yield scaled(body, 1000)
        yield joined([body, shaken(body, seed)], at_once=False)
        yield joined([body, shaken(body, seed)], at_once=True)


def write(body: Body, folder: Path) -> Path:
    """Write a problem file; returns its path."""
    path = folder / f"{body['name']}.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"problem": body}).encode(), 1))
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="public", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bodies = [json.loads(gzip.decompress(path.read_bytes()))["problem"] for path in options.public]
    recipes = altered(bodies, options.seed) if bodies else made_up(options.scale, options.seed)
    for body in recipes:
        strategies = sum(map(len, body["nodes"]["costs"]))
        print(write(body, options.folder), len(body["nodes"]["costs"]), "nodes", strategies, "strategies")


if __name__ == "__main__":
    main()
