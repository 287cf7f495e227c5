"""Cost tables to plan for: decoders over thousands of devices, and small clusters drawn at random.

All figures are round figures of decoder-only transformers and of accelerators; they are inputs, nothing
here is a measurement of a machine.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from graphpar.cost import (
    CostTable,
    CutEdge,
    DeviceClass,
    LinkCost,
    Mode,
    ModeCost,
    Topology,
    UnitCost,
)
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions

SAMPLE_TOKENS = 8192
DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class Kind:
    """A kind of device: sustained FLOP/s and bytes of memory, in round figures."""

    name: str
    flops_per_s: float
    memory_bytes: float
    inside: LinkCost


KINDS = (
    Kind("h", 450e12, 80e9, LinkCost(5e-6, 400e9)),
    Kind("a", 150e12, 80e9, LinkCost(5e-6, 250e9)),
    Kind("m", 300e12, 192e9, LinkCost(5e-6, 350e9)),
    Kind("l", 90e12, 48e9, LinkCost(8e-6, 25e9)),
    Kind("b", 900e12, 180e9, LinkCost(5e-6, 800e9)),
    Kind("v", 60e12, 32e9, LinkCost(8e-6, 120e9)),
)
FOUR = KINDS[:4]
NETWORK = LinkCost(10e-6, 50e9)


@dataclass(frozen=True)
class Shape:
    """A decoder: layers, hidden size, parameters per layer and in either end.

    `active` is the share of a layer's parameters that a token meets: less than one with experts.
    """

    layers: int
    hidden: int
    layer_parameters: float
    end_parameters: float
    active: float = 1.0


LLAMA_405B = Shape(126, 16384, 3.19e9, 2.1e9)
LLAMA_70B = Shape(80, 8192, 0.856e9, 1.05e9)
EXPERTS_671B = Shape(61, 7168, 10.9e9, 0.93e9, active=0.052)


@dataclass(frozen=True)
class Options:
    """What stages may choose: tensor widths, recomputation, ZeRO levels, a second number format."""

    stage: StageOptions = field(default_factory=StageOptions)
    formats: bool = False


ALL_OPTIONS = Options(StageOptions(recompute=True, zero=(1, 2, 3), tensor_widths=(2, 4, 8)), formats=True)


def decoder_table(
    shape: Shape, counts: dict[str, int], batch: int, options: Options, network: LinkCost = NETWORK
) -> CostTable:
    """A decoder under Adam in 16-bit formats with 32-bit optimiser state; all activations are kept.

    With a second format the plain rows are those of 32 bits: half as fast, twice the bytes.
    """
    kinds = [k for k in KINDS if counts.get(k.name)]
    sizes = tuple(sorted({1, 2, 4, batch}))
    cut_bytes = 2.0 * SAMPLE_TOKENS * shape.hidden
    slow = 2.0 if options.formats else 1.0

    def unit(name: str, parameters: float, kept_bytes: float, active: float = 1.0) -> UnitCost:
        flops = 2 * parameters * active * SAMPLE_TOKENS * slow
        return UnitCost(
            name=name,
            forward_s=tuple(tuple(flops * s / k.flops_per_s for s in sizes) for k in kinds),
            backward_s=tuple(tuple(2 * flops * s / k.flops_per_s for s in sizes) for k in kinds),
            optimizer_s=tuple(parameters * 16 / 1.5e12 for _ in kinds),
            weight_bytes=2 * slow * parameters,
            gradient_bytes=2 * slow * parameters,
            optimizer_bytes=(12 if slow == 1 else 8) * parameters,
            saved_bytes=tuple(slow * kept_bytes * s for s in sizes),
            working_bytes=tuple(4 * slow * cut_bytes * s for s in sizes),
        )

    devices = {
        k.name: tuple(
            f"{k.name}{i // DEVICES_PER_NODE}/{i % DEVICES_PER_NODE}" for i in range(counts[k.name])
        )
        for k in kinds
    }
    node_of = {d: d.split("/")[0] for names in devices.values() for d in names}
    inside = {d.split("/")[0]: k.inside for k in kinds for d in devices[k.name]}
    units = (0, *(1,) * shape.layers, 2)
    table = CostTable(
        batch=batch,
        training=True,
        sizes=sizes,
        units=units,
        unit_names=("embedding", *(f"layer {i}" for i in range(shape.layers)), "head"),
        costs=(
            unit("embedding", shape.end_parameters, cut_bytes),
            unit("layer", shape.layer_parameters, 17 * cut_bytes, shape.active),
            unit("head", shape.end_parameters, cut_bytes),
        ),
        edges=tuple(CutEdge(i, i + 1, cut_bytes, cut_bytes) for i in range(len(units) - 1)),
        device_classes=tuple(DeviceClass(k.name, devices[k.name], k.memory_bytes, 20e-6) for k in kinds),
        topology=Topology(node_of, inside, network),
        max_microbatches=batch,
        max_replicas=batch,
        reserved_bytes=1e9,
    )
    if options.formats:
        table = replace(table, modes=tuple(_halved(m) for m in table.every_mode))
    return with_modes(table, options.stage)


def _halved(mode: Mode) -> Mode:
    """The same mode in 16 bits: twice as fast; optimiser state keeps a 32-bit copy of the weights."""

    def half(row: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(v / 2 for v in row)

    costs = tuple(
        ModeCost(
            forward_s=half(c.forward_s),
            backward_s=half(c.backward_s),
            optimizer_s=c.optimizer_s,
            weight_bytes=half(c.weight_bytes),
            gradient_bytes=half(c.gradient_bytes),
            optimizer_bytes=tuple(v + w for v, w in zip(c.optimizer_bytes, c.weight_bytes, strict=True)),
            saved_bytes=tuple(map(half, c.saved_bytes)),
            working_bytes=tuple(map(half, c.working_bytes)),
        )
        for c in mode.costs
    )
    return replace(mode, costs=costs, precision="bfloat16")


def unlike_table(num_devices: int, num_units: int, batch: int, network: LinkCost) -> CostTable:
    """Unequal units over devices every one of which is its own kind, on one network."""
    speeds = [1 + 0.35 * i for i in range(num_devices)]
    weights = [1e-3 * (1 + 0.5 * ((7 * i) % 5) / 4) for i in range(num_units)]
    names = [f"d{i}" for i in range(num_devices)]
    topology = Topology({n: n for n in names}, dict.fromkeys(names, network), network)
    seconds = [[w * v for v in speeds] for w in weights]
    return _small_table(seconds, (4e6,) * num_units, (1e10,) * num_devices, topology, batch)


def drawn_table(seed: int, num_devices: int = 8) -> CostTable:
    """A cluster and a model drawn at random: speeds, links, nodes, memory, units, batch.

    Every device is a kind of its own, faster at some units than at others. Memory has room for the
    model between 1.2 and 8 times. Recomputation and ZeRO are allowed.
    """
    draw = random.Random(seed)
    names = [f"d{i}" for i in range(num_devices)]
    slowness = [8 ** draw.random() for _ in names]
    taste = [draw.uniform(0.7, 1.4) for _ in names]
    num_units = draw.choice((16, 26, 34, 50))
    blocks = draw.random() < 0.5
    kinds = [0] + [1 + (i % 2) for i in range(num_units - 2)] + [3]
    weights = [1e-3 * draw.uniform(0.2, 2.0) for _ in range(4)]
    own = [weights[k] if blocks else 1e-3 * draw.uniform(0.3, 1.7) for k in kinds]
    seconds = [
        [w * v * (t if k % 2 else 1.0) for v, t in zip(slowness, taste, strict=True)]
        for w, k in zip(own, kinds, strict=True)
    ]
    weight_bytes = [draw.uniform(5e6, 2e7)] * num_units if blocks else []
    weight_bytes = weight_bytes or [draw.uniform(2e6, 2e7) for _ in own]
    held = 4 * sum(weight_bytes) * draw.choice((1.2, 2.0, 8.0))
    parts = [draw.uniform(0.3, 1.0) for _ in names]
    memory = [held * p / sum(parts) for p in parts]
    network = LinkCost(10 ** draw.uniform(-6, -4), 10 ** draw.uniform(7.5, 10))
    inside = LinkCost(5e-6, network.bytes_per_s * draw.choice((1, 4, 20)))
    per_node = draw.choice((1, 2, 4))
    node_of = {n: f"n{i // per_node}" for i, n in enumerate(names)}
    topology = Topology(node_of, dict.fromkeys(node_of.values(), inside), network)
    batch = draw.choice((8, 16, 32, 64))
    table = _small_table(seconds, weight_bytes, memory, topology, batch)
    return with_modes(table, StageOptions(recompute=True, zero=(1, 2, 3)))


def _small_table(
    seconds: Sequence[Sequence[float]],
    weight_bytes: Sequence[float],
    memory_bytes: Sequence[float],
    topology: Topology,
    batch: int,
) -> CostTable:
    """Units by seconds of a sample's forward [unit][device] over devices each of its own kind."""
    sizes = tuple(sorted({1, 2, 4, batch}))
    costs = tuple(
        UnitCost(
            name=f"unit {i}",
            forward_s=tuple(tuple((0.2 + s) * v for s in sizes) for v in row),
            backward_s=tuple(tuple(2 * (0.2 + s) * v for s in sizes) for v in row),
            optimizer_s=tuple(0.05 * v for v in row),
            weight_bytes=held,
            gradient_bytes=held,
            optimizer_bytes=2 * held,
            saved_bytes=tuple(1e6 * s for s in sizes),
            working_bytes=tuple(1e6 * s for s in sizes),
        )
        for i, (row, held) in enumerate(zip(seconds, weight_bytes, strict=True))
    )
    names = list(topology.node_of)
    return CostTable(
        batch=batch,
        training=True,
        sizes=sizes,
        units=tuple(range(len(costs))),
        unit_names=tuple(c.name for c in costs),
        costs=costs,
        edges=tuple(CutEdge(i, i + 1, 1e5, 1e5) for i in range(len(costs) - 1)),
        device_classes=tuple(
            DeviceClass(f"kind {i}", (n,), m, 2e-5)
            for i, (n, m) in enumerate(zip(names, memory_bytes, strict=True))
        ),
        topology=topology,
        max_microbatches=batch,
        max_replicas=batch,
    )


def unlike_cases(seeds: Iterable[int], devices: Iterable[int] = (8,)) -> Iterator[tuple[str, CostTable]]:
    """8 unlike devices: regular tables; of any numbers of devices tables drawn with some seeds."""
    slow, fast = LinkCost(5e-5, 2e8), LinkCost(1e-5, 1e10)
    some = StageOptions(recompute=True, zero=(1, 2, 3))
    yield "8 unlike devices, 50 units, slow network", unlike_table(8, 50, 32, slow)
    yield "8 unlike devices, 50 units, fast network", unlike_table(8, 50, 32, fast)
    unlike = with_modes(unlike_table(8, 50, 32, slow), some)
    yield "8 unlike devices, 50 units, recomputation and ZeRO", unlike
    for number, seed in product(devices, seeds):
        yield f"{number} unlike devices, drawn {seed}", drawn_table(seed, number)


def growth_cases(quick: bool) -> Iterator[tuple[str, CostTable]]:
    """The 405B shape over devices, kinds, layers and options."""
    for total in (256, 1024) if quick else (128, 256, 512, 1024, 2048, 4096):
        counts = {k.name: total // 4 for k in FOUR}
        table = decoder_table(LLAMA_405B, counts, 2048, ALL_OPTIONS)
        yield f"405B, {total} devices of 4 kinds, all options", table
    for kinds in () if quick else (1, 2, 3, 5, 6):
        counts = {k.name: 1024 // kinds for k in KINDS[:kinds]}
        table = decoder_table(LLAMA_405B, counts, 2048, ALL_OPTIONS)
        yield f"405B, 1024 devices of {kinds} kinds, all options", table
    counts = {k.name: 256 for k in FOUR}
    for layers in () if quick else (32, 64, 256):
        shape = Shape(layers, 16384, 3.19e9 * 126 / layers, 2.1e9)
        table = decoder_table(shape, counts, 2048, ALL_OPTIONS)
        yield f"405B in {layers} layers, 1024 devices, all options", table
    widths = (2, 4, 8)
    ladder = {
        "tensor groups": Options(StageOptions(tensor_widths=widths)),
        "tensor groups, recomputation": Options(StageOptions(recompute=True, tensor_widths=widths)),
        "tensor groups, ZeRO": Options(StageOptions(zero=(1, 2, 3), tensor_widths=widths)),
        "tensor groups, recomputation, ZeRO": replace(ALL_OPTIONS, formats=False),
    }
    for name, options in () if quick else ladder.items():
        yield f"405B, 1024 devices, {name}", decoder_table(LLAMA_405B, counts, 2048, options)


def rack_cases() -> Iterator[tuple[str, CostTable]]:
    """64 devices in two racks with a tenth of the bandwidth between them; names do not tell the racks."""
    small = Shape(32, 4096, 0.2e9, 0.13e9)
    state = Options(StageOptions(recompute=True, zero=(1,)))
    groups = Options(StageOptions(recompute=True, zero=(1, 2, 3), tensor_widths=(2, 4, 8)))
    for name, shape, kind, options in (
        ("70B on 64 h, tensor groups", LLAMA_70B, "h", groups),
        ("7B on 64 a, tensor groups", small, "a", groups),
        ("7B on 64 v", small, "v", state),
    ):
        yield f"two racks: {name}", _in_racks(decoder_table(shape, {kind: 64}, 256, options), 4)


def _in_racks(table: CostTable, nodes_per_rack: int) -> CostTable:
    nodes = sorted(table.topology.inside)
    random.Random(1).shuffle(nodes)
    rack = {node: i // nodes_per_rack for i, node in enumerate(nodes)}
    pairs = [(a, b) for a in nodes for b in nodes if a < b and rack[a] == rack[b]]
    between = dict.fromkeys(pairs, LinkCost(1e-5, 50e9))
    slow = LinkCost(3e-5, 5e9)
    return replace(table, topology=replace(table.topology, network=slow, between=between))


def variant_cases() -> Iterator[tuple[str, CostTable]]:
    """Other mixes of kinds, batches, models and networks than the growth cases have."""
    mixes: dict[str, dict[str, int]] = {
        "512 h, 256 a, 128 m, 128 l": {"h": 512, "a": 256, "m": 128, "l": 128},
        "16 h, 240 a, 512 l, 256 v": {"h": 16, "a": 240, "l": 512, "v": 256},
        "72 b, 200 h, 752 a": {"b": 72, "h": 200, "a": 752},
    }
    for name, counts in mixes.items():
        yield f"variant: 405B on {name}", decoder_table(LLAMA_405B, counts, 2048, ALL_OPTIONS)
    even = {k.name: 256 for k in FOUR}
    for batch in (256, 1000, 4096):
        yield f"variant: 405B, batch {batch}", decoder_table(LLAMA_405B, even, batch, ALL_OPTIONS)
    slow = LinkCost(3e-5, 5e9)
    yield (
        "variant: 405B, slow network",
        decoder_table(LLAMA_405B, even, 2048, ALL_OPTIONS, slow),
    )
    yield "variant: 70B, 1024 devices", decoder_table(LLAMA_70B, even, 1024, ALL_OPTIONS)
    few = {k.name: 64 for k in FOUR}
    yield "variant: 70B, 256 devices", decoder_table(LLAMA_70B, few, 512, ALL_OPTIONS)
    yield "variant: 671B with experts, 1024 devices", decoder_table(EXPERTS_671B, even, 2048, ALL_OPTIONS)
    six = {k.name: 682 for k in KINDS}
    yield (
        "variant: 671B with experts, 4092 devices of 6 kinds",
        decoder_table(EXPERTS_671B, six, 4096, ALL_OPTIONS),
    )
