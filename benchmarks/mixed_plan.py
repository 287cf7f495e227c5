"""One device, data parallel, pipeline, and the planned mix on unlike devices: predicted and measured.

    OMP_NUM_THREADS=1 python benchmarks/mixed_plan.py --json

Emulated devices on this machine, in nodes: slowed-down workers sleep for the rest of their time, so that
few cores are enough for many, and the network between nodes is slowed to `--network` bytes per second.
Every strategy is the best of its kind by graphpar's own prices: data parallel over any subset of the
devices, replicas taking microbatches by speed; one pipeline over any of them, cut anywhere; tensor
parallel in any group of a node. All train the same model on the same batch. Strategies take turns in
every round, each in a job of its own whose second step counts; the gain is the median over rounds of the
fastest single strategy's time over the mix's.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from statistics import median
from typing import Any

import torch

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.compiler import subject_of
from graphpar.cost import CostTable
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.errors import InfeasibleError
from graphpar.examples.gpt import GPT
from graphpar.groups.candidates import candidate_groups
from graphpar.groups.modes import with_group_modes
from graphpar.local.measure import calibrate
from graphpar.partition.baselines import data_parallel, one_device
from graphpar.partition.handmade import evaluate
from graphpar.partition.pipeline import partition
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, plan_prepared, price
from graphpar.plans.plan import Plan
from graphpar.preparation import Prepared, prepare
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.subject import Subject
from graphpar.training import Training

WARM_UP = 1
NODES = [(1, 24.0, 4e9)] * 2 + [(1, 24.0, 3.5e8)] * 2 + [(1, 36.0, 3.5e8)] * 4
"""Eight machines of one device each: two hold the model, the others, alike or slower, half of it."""
Finder = Callable[[CostTable], Partition]


def node_of(text: str) -> tuple[int, float, float]:
    """Devices of a node, their slowdown and their memory, from `2x5` (4 GB each) or `2x5@3.5e8`."""
    count, _, rest = text.partition("x")
    slowdown, _, memory = rest.partition("@")
    return int(count), float(slowdown), float(memory or 4e9)


def cluster_of(nodes: Sequence[tuple[int, float, float]], network: float) -> Cluster:
    """Nodes of so many workers with a slowdown and a memory."""
    return Cluster.from_dict(
        {
            "nodes": [
                {
                    "name": "abcdefgh"[number],
                    "devices": {
                        "kind": "cpu",
                        "count": count,
                        "threads": 1,
                        "slowdown": slowdown,
                        "memory_bytes": memory,
                    },
                }
                for number, (count, slowdown, memory) in enumerate(nodes)
            ],
            "network": {"bytes_per_s": network, "latency_s": 2e-4},
        }
    )


def best(found: Iterator[Partition]) -> Partition:
    """The fastest of those that fit."""
    return min(found, key=lambda p: p.objective_s)


def subsets(table: CostTable, find: Finder, least: int) -> Iterator[Partition]:
    """What is found for every subset of the devices."""
    names = list(table.class_of)
    for count in range(least, len(names) + 1):
        for some in combinations(names, count):
            classes = tuple(
                replace(c, devices=tuple(d for d in c.devices if d in some)) for c in table.device_classes
            )
            try:
                yield find(replace(table, device_classes=classes))
            except InfeasibleError:
                continue


def one_pipeline(table: CostTable) -> Partition:
    """The best single pipeline of single devices."""
    found = partition(replace(table, max_replicas=1), gap=0.0, time_limit_s=30.0)
    assert len(found.pipelines) == 1
    return found


def tensor_alone(table: CostTable, cluster: Cluster) -> Iterator[Partition]:
    """Every tensor group of a node, alone."""
    for group in candidate_groups(cluster, 8):
        count = 1
        while count <= table.batch:
            stage = StageChoice(0, table.num_units, (replace(group, microbatches=count),))
            found = evaluate(table, (PipelineChoice(table.batch, count, (stage,)),), "gpipe")
            room = {d: table.device_classes[table.class_of[d]].memory_bytes for d in found.peak_bytes}
            if all(peak <= room[d] for d, peak in found.peak_bytes.items()):
                yield found
            count *= 2


def plans_of(
    prepared: Prepared, cluster: Cluster, training: Training, calibration: Calibration
) -> dict[str, Plan | None]:
    """The best plan of every kind; None where nothing of the kind fits."""
    table = price(prepared, cluster, train=training, calibration=calibration)
    table = with_modes(table, StageOptions(recompute=True))
    grouped = with_group_modes(
        table, prepared.graph, cluster, candidate_groups(cluster, 8), calibration, training
    )
    kinds: dict[str, Callable[[], Partition]] = {
        "one device": lambda: one_device(table),
        "data parallel": lambda: best(subsets(table, data_parallel, 2)),
        "pipeline": lambda: one_pipeline(table),
        "tensor parallel": lambda: best(tensor_alone(grouped, cluster)),
    }
    plans: dict[str, Plan | None] = {}
    for kind, find in kinds.items():
        try:
            found = find()
        except (InfeasibleError, ValueError):
            plans[kind] = None
            continue
        plans[kind] = plan_of(prepared, cluster, grouped, found, calibration=calibration, train=training)
    plans["planned mix"] = plan_prepared(
        prepared, cluster, train=training, precision="float32", calibration=calibration,
        time_limit_s=60.0, gap=0.0, tensor="auto",
    )  # fmt: skip
    return plans


def measured(
    subject: Subject, batch: Any, plans: dict[str, Plan], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a step, and its loss, by strategy and round; in each round strategies take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    losses: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(rounds):
        for name, plan in plans.items():
            with CompiledModel.start(subject, partial(_itself, plan)) as job:
                for _ in range(WARM_UP + 1):
                    loss = float(job.step(*batch))
                assert job.last_step is not None
                seconds[name].append(job.last_step.seconds)
                losses[name].append(loss)
            print(f"{name:<16} {seconds[name][-1]:.3f} s, loss {loss:.6f}", file=sys.stderr, flush=True)
    return seconds, losses


def _itself(plan: Plan) -> Plan:
    return plan


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--nodes", type=node_of, nargs="+", default=NODES, help="COUNTxSLOWDOWN[@BYTES] of each"
    )
    parser.add_argument("--network", type=float, default=1.25e7, help="bytes per second")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--cached", action="store_true", help="use this machine's cached calibration")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(given.width, given.layers, given.width // 32, given.length)
    ids = torch.randint(0, 256, (given.batch, given.length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    cluster = cluster_of(given.nodes, given.network)
    training = Training(optimizer=partial(torch.optim.AdamW, lr=1e-3))
    calibration = (Calibration.cached() if given.predict or given.cached else None) or calibrate(
        show_progress=False
    )
    prepared = prepare(model, batch, {}, training)
    found = plans_of(prepared, cluster, training, calibration)
    plans = {name: plan for name, plan in found.items() if plan is not None}
    times: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    if not given.predict:
        subject = subject_of(model, prepared, cluster, training)
        times, losses = measured(subject, batch, plans, given.rounds)
    result = report(given, found, times, losses)
    if given.json:
        print(json.dumps(result, indent=2))
        return
    for name, row in result["strategies"].items():
        print(f"{name:<16} {row}")
    print(
        f"mix over the best single strategy: {result['speed_up']} (by round "
        f"{result['speed_up_by_round']}, predicted {result['predicted_speed_up']})"
    )


def report(
    given: Any,
    found: dict[str, Plan | None],
    times: dict[str, list[float]],
    losses: dict[str, list[float]],
) -> dict[str, Any]:
    """Everything as plain data."""
    rows: dict[str, Any] = {}
    for name, plan in found.items():
        if plan is None:
            rows[name] = None
            continue
        rows[name] = {
            "predicted_s": plan.predicted_step_s,
            "objective_s": plan.partition.objective_s,
            "bound_s": plan.partition.bound_s,
            "truncated_by": plan.partition.truncated_by,
            "measured_s": median(times[name]) if name in times else None,
            "steps_s": times.get(name, []),
            "losses": losses.get(name, []),
            "over_the_mix": _over_the_mix(name, times),
            "shape": shape_of(plan),
        }
    singles = {name: row for name, row in rows.items() if row and name != "planned mix"}
    predicted = [row["predicted_s"] for row in singles.values()]
    by_round = [
        min(times[name][n] for name in singles) / mix
        for n, mix in enumerate(times.get("planned mix", []))
    ]
    return {
        "setting": {k: v for k, v in vars(given).items() if k not in ("json", "predict")},
        "strategies": rows,
        "predicted_speed_up": min(predicted) / rows["planned mix"]["predicted_s"] if predicted else None,
        "speed_up_by_round": by_round,
        "speed_up": median(by_round) if by_round else None,
    }


def _over_the_mix(name: str, times: dict[str, list[float]]) -> float | None:
    """A strategy's time over the mix's, the median over rounds."""
    if name not in times:
        return None
    pairs = zip(times[name], times["planned mix"], strict=True)
    return median(own / mix for own, mix in pairs)


def shape_of(plan: Plan) -> str:
    """Who runs what, in a line: `|` between pipelines, `>` between stages, `,` between replicas."""

    def group(replica: Replica) -> str:
        return f"{'+'.join(replica.devices)} x{replica.microbatches}"

    return " | ".join(
        f"{p.samples}: "
        + " > ".join(f"{s.last - s.first} units on {', '.join(map(group, s.replicas))}" for s in p.stages)
        for p in plan.partition.pipelines
    )


if __name__ == "__main__":
    main()
