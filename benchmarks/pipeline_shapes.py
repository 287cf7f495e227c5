"""Small clusters of unlike devices for models of unlike shapes, drawn by seed: the harder kind.

Beside `pipeline_cases.drawn_table`: up to 80 units, inference, decoders with and without experts, units
that widen and narrow, no options or some, memory down to half of what is needed, transfers of up to
twice the time of a unit, and in some clusters a link of its own between every pair of nodes.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product

from graphpar.cost import CostTable, CutEdge, DeviceClass, LinkCost, Topology, UnitCost
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions

OPTIONS = (
    None,
    StageOptions(recompute=True),
    StageOptions(recompute=True, zero=(1, 2)),
    StageOptions(recompute=True, zero=(1, 2, 3)),
    StageOptions(zero=(1,)),
)


@dataclass(frozen=True)
class Layers:
    """By unit: parameters, FLOPs of a sample's forward, bytes it keeps, and bytes it sends on."""

    parameters: list[float]
    flops: list[float]
    kept_bytes: list[float]
    sent_bytes: list[float]


def shaped_table(seed: int, num_devices: int = 8) -> CostTable:
    """A cluster and a model drawn at random; every device is a kind of its own."""
    draw = random.Random(f"shape {seed}")
    shape = draw.choice(("decoder", "experts", "unet", "random", "conv"))
    layers = _layers(draw, shape, draw.choice((12, 24, 40, 50, 66, 80)), draw.choice((128, 512, 2048)))
    training = draw.random() < 0.7
    batch = draw.choice((8, 12, 16, 24, 32, 48, 64, 96, 128) if training else (4, 8, 16, 32))
    spread = draw.choice((1.5, 4, 12))
    speeds = [1e12 * spread ** draw.random() for _ in range(num_devices)]
    costs = _costs(layers, speeds, training, tuple(sorted({1, 2, 4, batch})))
    state = sum(layers.parameters) * (16 if training else 2) * draw.choice((0.55, 0.8, 1.1, 1.6, 4.0))
    state += sum(layers.kept_bytes) * batch * draw.choice((0.02, 0.1, 0.3))
    parts = [draw.uniform(0.25, 1.0) for _ in range(num_devices)]
    table = CostTable(
        batch=batch,
        training=training,
        sizes=tuple(sorted({1, 2, 4, batch})),
        units=tuple(range(len(costs))),
        unit_names=tuple(c.name for c in costs),
        costs=costs,
        edges=tuple(CutEdge(i, i + 1, b, b * training) for i, b in enumerate(layers.sent_bytes)),
        device_classes=tuple(
            DeviceClass(f"kind {i}", (f"d{i}",), state * p / sum(parts), 2e-5)
            for i, p in enumerate(parts)
        ),
        topology=_topology(draw, layers, num_devices),
        max_microbatches=batch,
        max_replicas=batch,
    )
    options = draw.choice(OPTIONS)
    return with_modes(table, options) if training and options else table


def shaped_cases(seeds: Iterable[int], devices: Iterable[int]) -> Iterator[tuple[str, CostTable]]:
    """Of every number of devices a table for each seed."""
    for number, seed in product(devices, seeds):
        yield f"{number} unlike devices, shape {seed}", shaped_table(seed, number)


def _layers(draw: random.Random, shape: str, number: int, tokens: int) -> Layers:
    if shape in ("decoder", "experts"):
        hidden, vocabulary = draw.choice((1024, 2048, 4096)), draw.choice((32000, 128000))
        size = (vocabulary * hidden, 4 * hidden**2, 8 * hidden**2, vocabulary * hidden)
        kept = tuple(tokens * n for n in (2 * hidden, 14 * hidden, 20 * hidden, 2 * vocabulary))
        kinds = [0, *(1 + i % 2 for i in range(number - 2)), 3]
        held = [1.0 * size[k] * (8 if shape == "experts" and k == 2 else 1) for k in kinds]
        flops = [2.0 * tokens * (size[k] if k else hidden) for k in kinds]
        sent = [2.0 * tokens * hidden] * (number - 1)
        return Layers(held, flops, [float(kept[k]) for k in kinds], sent)
    found, width = Layers([], [], [], []), draw.choice((64, 256, 1024))
    for i in range(number):
        place = i / (number - 1)
        deep = {"unet": 1 - abs(2 * place - 1), "conv": place}.get(shape, draw.random())
        channels, points = width * (1 + 5 * deep), tokens * 6 / (1 + 5 * deep) ** 1.7
        found.parameters.append(9 * channels**2)
        found.flops.append(18 * channels**2 * points * draw.uniform(0.8, 1.2))
        found.kept_bytes.append(channels * points * draw.uniform(4, 12))
        if i + 1 < number:
            found.sent_bytes.append(2 * channels * points)
    return found


def _costs(
    layers: Layers, speeds: list[float], training: bool, sizes: tuple[int, ...]
) -> tuple[UnitCost, ...]:
    def seconds(flops: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(2e-6 + flops * (0.15 + s) / v for s in sizes) for v in speeds)

    every = zip(layers.parameters, layers.flops, layers.kept_bytes, strict=True)
    return tuple(
        UnitCost(
            name=f"unit {i}",
            forward_s=seconds(flops),
            backward_s=seconds(2 * flops) if training else ((0.0,) * len(sizes),) * len(speeds),
            optimizer_s=tuple(parameters * 16 / 5e11 * training for _ in speeds),
            weight_bytes=(4 if training else 2) * parameters,
            gradient_bytes=4 * parameters * training,
            optimizer_bytes=8 * parameters * training,
            saved_bytes=tuple(kept * s * training for s in sizes),
            working_bytes=tuple(0.3 * kept * s for s in sizes),
        )
        for i, (parameters, flops, kept) in enumerate(every)
    )


def _topology(draw: random.Random, layers: Layers, num_devices: int) -> Topology:
    """Nodes of one to eight devices; a transfer takes up to twice as long as a unit on a slow device."""
    per_node = draw.choice((1, 2, 4, 8))
    node_of = {f"d{i}": f"n{i // per_node}" for i in range(num_devices)}
    nodes = sorted(set(node_of.values()))
    unit_s = sum(layers.flops) / len(layers.flops) / 1e12 * draw.choice((0.01, 0.1, 0.5, 2.0))
    rate = sum(layers.sent_bytes) / len(layers.sent_bytes) / unit_s
    inside = LinkCost(5e-6, rate * draw.choice((1, 4, 20)))
    network, between = LinkCost(10 ** draw.uniform(-6, -4), rate), {}
    if draw.random() < 0.3:
        between = {
            pair: LinkCost(10 ** draw.uniform(-6, -4), rate * draw.uniform(0.3, 3))
            for pair in combinations(nodes, 2)
        }
    return Topology(node_of, dict.fromkeys(nodes, inside), network, between)
