"""How fast pipelines are planned, and how surely, against the number of devices, kinds and layers.

    python benchmarks/pipeline_scale.py [--json] [--time-limit S] [--quick]

Every case is a cost table computed from round figures of a decoder-only transformer and of
accelerators; the figures are inputs of the benchmark, nothing here is a measurement of a machine.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from graphpar.cost import CostTable, CutEdge, DeviceClass, LinkCost, Topology, UnitCost
from graphpar.errors import InfeasibleError
from graphpar.partition.baselines import data_parallel, even_split, greedy_split
from graphpar.partition.pipeline import partition

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
)
NETWORK = LinkCost(10e-6, 50e9)


@dataclass(frozen=True)
class Shape:
    """A decoder: layers, hidden size, parameters per layer and in either end."""

    layers: int
    hidden: int
    layer_parameters: float
    end_parameters: float


LLAMA_405B = Shape(126, 16384, 3.19e9, 2.1e9)


@dataclass(frozen=True)
class Row:
    """One case and what came out."""

    case: str
    devices: int
    kinds: int
    units: int
    batch: int
    baselines_s: dict[str, float | None]
    status: str = ""
    seconds: float = 0.0
    gap: float | None = None
    step_s: float | None = None
    bound_s: float | None = None
    physical_bound_s: float | None = None
    stages: int | None = None
    truncated_by: tuple[str, ...] = ()


def decoder_table(shape: Shape, counts: dict[str, int], batch: int) -> CostTable:
    """A decoder with activations recomputed (only layer inputs are kept) under mixed-precision Adam."""
    kinds = [k for k in KINDS if counts.get(k.name)]
    sizes = tuple(sorted({1, 2, 4, batch}))
    cut_bytes = 2.0 * SAMPLE_TOKENS * shape.hidden

    def unit(name: str, parameters: float, kept_bytes: float) -> UnitCost:
        flops = 2 * parameters * SAMPLE_TOKENS
        return UnitCost(
            name=name,
            forward_s=tuple(tuple(flops * s / k.flops_per_s for s in sizes) for k in kinds),
            backward_s=tuple(tuple(3 * flops * s / k.flops_per_s for s in sizes) for k in kinds),
            optimizer_s=tuple(parameters * 16 / 1.5e12 for _ in kinds),
            weight_bytes=2 * parameters,
            gradient_bytes=2 * parameters,
            optimizer_bytes=12 * parameters / 16,  # optimiser state sharded 16 ways elsewhere
            saved_bytes=tuple(kept_bytes * s for s in sizes),
            working_bytes=tuple(4 * cut_bytes * s for s in sizes),
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
    return CostTable(
        batch=batch,
        training=True,
        sizes=sizes,
        units=units,
        unit_names=("embedding", *(f"layer {i}" for i in range(shape.layers)), "head"),
        costs=(
            unit("embedding", shape.end_parameters, 0.0),
            unit("layer", shape.layer_parameters, cut_bytes),
            unit("head", shape.end_parameters, cut_bytes),
        ),
        edges=tuple(CutEdge(i, i + 1, cut_bytes, cut_bytes) for i in range(len(units) - 1)),
        device_classes=tuple(DeviceClass(k.name, devices[k.name], k.memory_bytes, 20e-6) for k in kinds),
        topology=Topology(node_of, inside, NETWORK),
        max_microbatches=batch,
        max_replicas=batch,
        reserved_bytes=1e9,
    )


def unlike_table(num_devices: int, num_units: int, batch: int, network: LinkCost) -> CostTable:
    """Unequal units over devices every one of which is its own kind, on one network."""
    speeds = [1 + 0.35 * i for i in range(num_devices)]
    sizes = tuple(sorted({1, 2, 4, batch}))
    costs = []
    for i in range(num_units):
        weight = 1e-3 * (1 + 0.5 * ((7 * i) % 5) / 4)
        costs.append(
            UnitCost(
                name=f"unit {i}",
                forward_s=tuple(tuple(weight * (0.2 + s) * v for s in sizes) for v in speeds),
                backward_s=tuple(tuple(2 * weight * (0.2 + s) * v for s in sizes) for v in speeds),
                optimizer_s=tuple(1e-4 * v for v in speeds),
                weight_bytes=4e6,
                gradient_bytes=4e6,
                optimizer_bytes=8e6,
                saved_bytes=tuple(1e6 * s for s in sizes),
                working_bytes=tuple(1e6 * s for s in sizes),
            )
        )
    names = [f"d{i}" for i in range(num_devices)]
    return CostTable(
        batch=batch,
        training=True,
        sizes=sizes,
        units=tuple(range(num_units)),
        unit_names=tuple(c.name for c in costs),
        costs=tuple(costs),
        edges=tuple(CutEdge(i, i + 1, 1e5, 1e5) for i in range(num_units - 1)),
        device_classes=tuple(DeviceClass(f"kind {i}", (n,), 1e10, 2e-5) for i, n in enumerate(names)),
        topology=Topology({n: n for n in names}, dict.fromkeys(names, network), network),
        max_microbatches=batch,
        max_replicas=batch,
    )


def cases(quick: bool) -> Iterator[tuple[str, CostTable]]:
    """Named tables: unlike devices, then the decoder over devices, kinds and layers."""
    slow, fast = LinkCost(5e-5, 2e8), LinkCost(1e-5, 1e10)
    yield "8 unlike devices, 50 units, slow network", unlike_table(8, 50, 32, slow)
    yield "8 unlike devices, 50 units, fast network", unlike_table(8, 50, 32, fast)
    for total in (256, 1024) if quick else (128, 256, 512, 1024, 4096):
        counts = {k.name: total // 4 for k in KINDS}
        yield f"405B, {total} devices of 4 kinds", decoder_table(LLAMA_405B, counts, 2048)
    for kinds in () if quick else (1, 2, 3):
        counts = {k.name: 1024 // kinds for k in KINDS[:kinds]}
        yield f"405B, 1024 devices of {kinds} kinds", decoder_table(LLAMA_405B, counts, 2048)
    for layers in () if quick else (32, 64, 256):
        shape = Shape(layers, 16384, 3.19e9 * 126 / layers, 2.1e9)
        counts = {k.name: 256 for k in KINDS}
        yield f"405B in {layers} layers, 1024 devices", decoder_table(shape, counts, 2048)


def measure(case: str, table: CostTable, time_limit_s: float, gap: float) -> Row:
    """Plan one table and its baselines."""
    baselines: dict[str, float | None] = {}
    for name, make in (("even", even_split), ("greedy", greedy_split), ("data", data_parallel)):
        try:
            baselines[name] = make(table).objective_s
        except InfeasibleError:
            baselines[name] = None
    blank = Row(
        case=case,
        devices=sum(len(c.devices) for c in table.device_classes),
        kinds=len(table.device_classes),
        units=table.num_units,
        batch=table.batch,
        baselines_s=baselines,
    )
    began_s = time.perf_counter()
    try:
        found = partition(table, gap=gap, time_limit_s=time_limit_s)
    except InfeasibleError as error:
        spent = time.perf_counter() - began_s
        return replace(blank, status=f"infeasible: {error.limit}", seconds=spent)
    return replace(
        blank,
        status=found.status,
        seconds=time.perf_counter() - began_s,
        gap=found.gap,
        step_s=found.objective_s,
        bound_s=found.bound_s,
        physical_bound_s=found.physical_bound_s,
        stages=sum(len(p.stages) for p in found.pipelines),
        truncated_by=found.truncated_by,
    )


def main() -> None:
    """Run all cases and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="only the main cases")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S")
    parser.add_argument("--gap", type=float, default=0.01)
    arguments = parser.parse_args()
    rows = []
    for case, table in cases(arguments.quick):
        row = measure(case, table, arguments.time_limit, arguments.gap)
        rows.append(row)
        if not arguments.json:
            print(_line(row), flush=True)
    if arguments.json:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"rows": [asdict(r) for r in rows], "peak_bytes": peak}, indent=1))


def _line(row: Row) -> str:
    if row.step_s is None or row.gap is None:
        return f"{row.case:45} {row.seconds:7.2f} s  {row.status}"
    others = [v for v in row.baselines_s.values() if v is not None]
    against = f"{min(others) / row.step_s:.2f}x" if others else "no baseline fits"
    return (
        f"{row.case:45} {row.seconds:7.2f} s  gap {100 * row.gap:.3f} %  step {row.step_s:.6g} s  "
        f"{row.stages} stages  best baseline {against}  {', '.join(row.truncated_by)}"
    )


if __name__ == "__main__":
    main()
