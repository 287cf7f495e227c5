"""How fast pipelines are planned, and how surely, against the number of devices, kinds and layers.

    python benchmarks/pipeline_scale.py [--json] [--time-limit S] [--quick] [--only WORD] [--seeds N]
        [--first-seed N] [--devices N ...] [--alone] [--baseline-limit S] [--processor-time]

The cases are those of `pipeline_cases.py`: clusters of 8 unlike devices (drawn ones of as many as
`--devices` says, with models of unlike shapes in `pipeline_shapes.py`), the 405B shape over devices,
kinds, layers and options, and variants of it; and large clusters drawn by seed (`pipeline_draws.py`).
Unlike devices are planned to the optimum, the others to `--gap`.
Beside each answer stand, from the same run, the even split, units in proportion to speed, data
parallelism, the best plan on devices of one kind, and the textbook programme that gives every stage a
slot. Where a table has options, equal stages with every option stand there too (`uniform_plans.py`),
blocks spread evenly and by speed. Each gets as many seconds of processor time as the answer took, at
least `--baseline-limit`, in another process (`simple_plan_runs.py`); where one has no plan the row says
why.
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.pipeline import partition

sys.path.insert(0, str(Path(__file__).parent))

from pipeline_cases import growth_cases, rack_cases, unlike_cases, variant_cases
from pipeline_draws import drawn_cases
from pipeline_shapes import shaped_cases
from simple_plan_runs import SimplePlans


@dataclass(frozen=True)
class Row:
    """One case and what came out; `modes` are the ways to run a unit besides the plain ones.

    `baselines_none` says of the simple plans that are missing in `baselines_s` why.
    """

    case: str
    devices: int
    kinds: int
    units: int
    batch: int
    modes: int
    baselines_s: dict[str, float] = field(default_factory=dict)
    baselines_none: dict[str, str] = field(default_factory=dict)
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


def measure(
    case: str,
    table: CostTable,
    time_limit_s: float,
    gap: float,
    simple: SimplePlans | None,
    least_s: float,
) -> Row:
    """Plan one table and its simple plans, where these are asked for; each for `least_s` at least."""
    blank = Row(
        case=case,
        devices=sum(len(c.devices) for c in table.device_classes),
        kinds=len(table.device_classes),
        units=table.num_units,
        batch=table.batch,
        modes=len(table.modes),
    )
    began_s, computed_s = time.perf_counter(), time.process_time()
    try:
        found = partition(table, gap=gap, time_limit_s=time_limit_s)
    except InfeasibleError as error:
        spent_s, cpu_s = time.perf_counter() - began_s, time.process_time() - computed_s
        return replace(blank, status=f"infeasible: {error.limit}", seconds=spent_s, cpu_s=cpu_s)
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
    if simple is None:
        return row
    steps = simple.steps(table, found, max(least_s, row.cpu_s))
    return replace(
        row,
        baselines_s={name: s.step_s for name, s in steps.items() if s.step_s is not None},
        baselines_none={name: s.why_none for name, s in steps.items() if s.step_s is None},
    )


def main() -> None:
    """Run all cases and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="only the main cases")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word in their name")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S")
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="clusters drawn at random")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="the first of them")
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[8], metavar="N", help="numbers of unlike devices"
    )
    parser.add_argument("--alone", action="store_true", help="without simple plans")
    parser.add_argument(
        "--baseline-limit", type=float, default=10.0, metavar="S", help="for each simple plan"
    )
    parser.add_argument(
        "--processor-time", action="store_true", help="limits count seconds of CPU: for a busy machine"
    )
    arguments = parser.parse_args()
    if arguments.processor_time:
        time.monotonic = time.process_time
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds * (not arguments.quick))
    cases = [*unlike_cases(seeds, arguments.devices), *shaped_cases(seeds, arguments.devices)]
    cases += growth_cases(arguments.quick)
    cases += [] if arguments.quick else [*variant_cases(), *rack_cases(), *drawn_cases(seeds)]
    simple = None if arguments.alone else SimplePlans()
    rows = []
    for case, table in cases:
        if arguments.only not in case:
            continue
        gap = 0.0 if "unlike" in case else arguments.gap
        rows.append(measure(case, table, arguments.time_limit, gap, simple, arguments.baseline_limit))
        if not arguments.json:
            print(_line(rows[-1]), flush=True)
    if simple is not None:
        simple.close()
    if arguments.json:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"rows": [asdict(r) for r in rows], "peak_bytes": peak}, indent=1))


def _line(row: Row) -> str:
    if row.step_s is None or row.gap is None:
        return f"{row.case:50} {row.seconds:7.2f} s ({row.cpu_s:.2f} s of CPU)  {row.status}"
    against = [f"{name} {value / row.step_s:.2f}x" for name, value in row.baselines_s.items()]
    against += [f"{name} {why}" for name, why in row.baselines_none.items()]
    return (
        f"{row.case:50} {row.seconds:7.2f} s ({row.cpu_s:.2f} s of CPU)  gap {100 * row.gap:.2f} %  "
        f"step {row.step_s:.6g} s  {row.stages} stages  {row.variables} variables  {row.modes} modes  "
        f"[{', '.join(against)}]  {', '.join(row.truncated_by)}"
    )


if __name__ == "__main__":
    main()
