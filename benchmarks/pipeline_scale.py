"""How fast pipelines are planned, and how surely, against the number of devices, kinds and layers.

    python benchmarks/pipeline_scale.py [--json] [--time-limit S] [--quick] [--only WORD]

Every case is a cost table computed from round figures of a decoder-only transformer and of
accelerators; the figures are inputs of the benchmark, nothing here is a measurement of a machine.
Beside each answer stand, from the same run, the even split, units in proportion to speed, data
parallelism, the best plan on devices of one kind, and the textbook programme that gives every stage a
slot (with as many seconds as the answer took, at least ten).
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from graphpar.cost import (
    CostTable,
    CutEdge,
    DeviceClass,
    LinkCost,
    Mode,
    ModeCost,
    StageOptions,
    Topology,
    UnitCost,
)
from graphpar.cost_models.modes import with_modes
from graphpar.errors import InfeasibleError
from graphpar.partition.baselines import best_like_subset, data_parallel, even_split, greedy_split
from graphpar.partition.pipeline import partition
from graphpar.partition.types import Partition

sys.path.insert(0, str(Path(__file__).parent))

from slot_programme import slot_programme

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
class Options:
    """What stages may choose: tensor widths, recomputation, ZeRO levels, a second number format."""

    stage: StageOptions = field(default_factory=StageOptions)
    formats: bool = False


ALL_OPTIONS = Options(StageOptions(recompute=True, zero=(1, 2, 3), tensor_widths=(2, 4, 8)), formats=True)


@dataclass(frozen=True)
class Row:
    """One case and what came out; `modes` are the ways to run a unit besides the plain ones."""

    case: str
    devices: int
    kinds: int
    units: int
    batch: int
    modes: int
    baselines_s: dict[str, float | None]
    status: str = ""
    seconds: float = 0.0
    cpu_s: float = 0.0
    gap: float | None = None
    step_s: float | None = None
    bound_s: float | None = None
    physical_bound_s: float | None = None
    stages: int | None = None
    pipelines: int | None = None
    variables: int | None = None
    programs: int | None = None
    truncated_by: tuple[str, ...] = ()
    family: str = ""


def decoder_table(shape: Shape, counts: dict[str, int], batch: int, options: Options) -> CostTable:
    """A decoder under Adam in 16-bit formats with 32-bit optimiser state; all activations are kept.

    With a second format the plain rows are those of 32 bits: half as fast, twice the bytes.
    """
    kinds = [k for k in KINDS if counts.get(k.name)]
    sizes = tuple(sorted({1, 2, 4, batch}))
    cut_bytes = 2.0 * SAMPLE_TOKENS * shape.hidden
    slow = 2.0 if options.formats else 1.0

    def unit(name: str, parameters: float, kept_bytes: float) -> UnitCost:
        flops = 2 * parameters * SAMPLE_TOKENS * slow
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
            unit("layer", shape.layer_parameters, 17 * cut_bytes),
            unit("head", shape.end_parameters, cut_bytes),
        ),
        edges=tuple(CutEdge(i, i + 1, cut_bytes, cut_bytes) for i in range(len(units) - 1)),
        device_classes=tuple(DeviceClass(k.name, devices[k.name], k.memory_bytes, 20e-6) for k in kinds),
        topology=Topology(node_of, inside, NETWORK),
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
    """Named tables: unlike devices, then the decoder over devices, kinds, layers and options."""
    slow, fast = LinkCost(5e-5, 2e8), LinkCost(1e-5, 1e10)
    some = StageOptions(recompute=True, zero=(1, 2, 3))
    yield "8 unlike devices, 50 units, slow network", unlike_table(8, 50, 32, slow)
    yield "8 unlike devices, 50 units, fast network", unlike_table(8, 50, 32, fast)
    unlike = with_modes(unlike_table(8, 50, 32, slow), some)
    yield "8 unlike devices, 50 units, recomputation and ZeRO", unlike
    for total in (256, 1024) if quick else (128, 256, 512, 1024, 4096):
        counts = {k.name: total // 4 for k in KINDS}
        table = decoder_table(LLAMA_405B, counts, 2048, ALL_OPTIONS)
        yield f"405B, {total} devices of 4 kinds, all options", table
    for kinds in () if quick else (1, 2, 3):
        counts = {k.name: 1024 // kinds for k in KINDS[:kinds]}
        table = decoder_table(LLAMA_405B, counts, 2048, ALL_OPTIONS)
        yield f"405B, 1024 devices of {kinds} kinds, all options", table
    counts = {k.name: 256 for k in KINDS}
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


def measure(case: str, table: CostTable, time_limit_s: float, gap: float) -> Row:
    """Plan one table and its baselines."""
    blank = Row(
        case=case,
        devices=sum(len(c.devices) for c in table.device_classes),
        kinds=len(table.device_classes),
        units=table.num_units,
        batch=table.batch,
        modes=len(table.modes),
        baselines_s={},
    )
    began_s, computed_s = time.perf_counter(), time.process_time()
    try:
        found = partition(table, gap=gap, time_limit_s=time_limit_s)
    except InfeasibleError as error:
        spent = time.perf_counter() - began_s
        return replace(blank, status=f"infeasible: {error.limit}", seconds=spent)
    row = replace(
        blank,
        status=found.status,
        seconds=time.perf_counter() - began_s,
        cpu_s=time.process_time() - computed_s,
        gap=found.gap,
        step_s=found.objective_s,
        bound_s=found.bound_s,
        physical_bound_s=found.physical_bound_s,
        stages=sum(len(p.stages) for p in found.pipelines),
        pipelines=len(found.pipelines),
        variables=found.num_variables,
        programs=found.num_programs,
        truncated_by=found.truncated_by,
        family=found.family,
    )
    return replace(row, baselines_s=baselines(table, found, max(10.0, row.seconds)))


def baselines(table: CostTable, found: Partition, time_limit_s: float) -> dict[str, float | None]:
    """Step times of simple plans; None where one does not fit or is not found in time."""
    ways: dict[str, Callable[[], Partition]] = {
        "even split": lambda: even_split(table),
        "in proportion to speed": lambda: greedy_split(table),
        "data parallel": lambda: data_parallel(table),
        # Time enough for each kind; what it finds may still be a search cut short.
        "devices of one kind": lambda: best_like_subset(
            table, time_limit_s=15.0 * len(table.device_classes)
        ),
        "stage-slot programme": lambda: slot_programme(table, found, time_limit_s),
    }
    steps: dict[str, float | None] = {}
    for name, make in ways.items():
        try:
            steps[name] = make().objective_s
        except InfeasibleError:
            steps[name] = None
    return steps


def main() -> None:
    """Run all cases and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="only the main cases")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word in their name")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S")
    parser.add_argument("--gap", type=float, default=0.01)
    arguments = parser.parse_args()
    rows = []
    for case, table in cases(arguments.quick):
        if arguments.only not in case:
            continue
        row = measure(case, table, arguments.time_limit, arguments.gap)
        rows.append(row)
        if not arguments.json:
            print(_line(row), flush=True)
    if arguments.json:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"rows": [asdict(r) for r in rows], "peak_bytes": peak}, indent=1))


def _line(row: Row) -> str:
    if row.step_s is None or row.gap is None:
        return f"{row.case:50} {row.seconds:7.2f} s  {row.status}"
    against = ", ".join(
        f"{name} {value / row.step_s:.2f}x" if value is not None else f"{name} does not fit"
        for name, value in row.baselines_s.items()
    )
    return (
        f"{row.case:50} {row.seconds:7.2f} s ({row.cpu_s:.2f} s of CPU)  gap {100 * row.gap:.2f} %  "
        f"step {row.step_s:.6g} s  {row.stages} stages  {row.variables} variables  {row.modes} modes  "
        f"[{against}]  {', '.join(row.truncated_by)}"
    )


if __name__ == "__main__":
    main()
