"""One device, data parallel, pipeline, and the planned mix on unlike devices: predicted and measured.

    OMP_NUM_THREADS=1 python benchmarks/mixed_plan.py --json

Emulated devices on this machine, in nodes: slowed-down workers sleep for the rest of their time, so that
few cores are enough for many, and the network between nodes is slowed to `--network` bytes per second.
Every strategy is the best of its kind by graphpar's own prices: data parallel over any subset of the
devices, replicas taking microbatches by speed; one pipeline over any of them, cut anywhere; tensor
parallel in any group of a node. All train the same model on the same batch, one strategy after another;
measured times are medians of the steps after the first.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from statistics import median
from typing import Any

import torch

import graphpar
from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, StageOptions
from graphpar.cost_models.modes import with_modes
from graphpar.errors import InfeasibleError
from graphpar.examples.gpt import GPT
from graphpar.measure import calibrate
from graphpar.partition.baselines import data_parallel, one_device
from graphpar.partition.handmade import evaluate
from graphpar.partition.pipeline import partition
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, plan_prepared, price
from graphpar.plans import Plan
from graphpar.preparation import Prepared, prepare
from graphpar.tensor_groups import candidate_groups, with_group_modes
from graphpar.training import Training

WARM_UP = 1
NODES = [(2, 12.0), (2, 12.0), (2, 16.0)]
Finder = Callable[[CostTable], Partition]


def node_of(text: str) -> tuple[int, float]:
    """Devices of a node and their slowdown, from `2x5`."""
    count, _, slowdown = text.partition("x")
    return int(count), float(slowdown)


def cluster_of(nodes: Sequence[tuple[int, float]], network: float, memory: float) -> Cluster:
    """Nodes of so many workers with a slowdown."""
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
                for number, (count, slowdown) in enumerate(nodes)
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
    model: torch.nn.Module,
    cluster: Cluster,
    batch: Any,
    training: Training,
    plans: dict[str, Plan],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of steps by strategy."""
    seconds: dict[str, list[float]] = {}
    for name, plan in plans.items():
        with graphpar.compile(model, cluster, batch, train=training, plan=plan) as job:
            seconds[name] = []
            for number in range(rounds + WARM_UP):
                job.step(*batch)
                assert job.last_step is not None
                if number >= WARM_UP:
                    seconds[name].append(job.last_step.seconds)
    return seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=node_of, nargs="+", default=NODES, help="COUNTxSLOWDOWN of each")
    parser.add_argument("--network", type=float, default=1.25e7, help="bytes per second")
    parser.add_argument("--memory", type=float, default=4e9, help="bytes of each device")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--cached", action="store_true", help="use this machine's cached calibration")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(given.width, given.layers, given.width // 32, given.length)
    ids = torch.randint(0, 256, (given.batch, given.length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    cluster = cluster_of(given.nodes, given.network, given.memory)
    training = Training(optimizer=partial(torch.optim.SGD, lr=0.01))
    calibration = (Calibration.cached() if given.predict or given.cached else None) or calibrate(
        show_progress=False
    )
    found = plans_of(prepare(model, batch, {}, training), cluster, training, calibration)
    plans = {name: plan for name, plan in found.items() if plan is not None}
    times = {} if given.predict else measured(model, cluster, batch, training, plans, given.rounds)
    result = report(given, found, times)
    if given.json:
        print(json.dumps(result, indent=2))
        return
    for name, row in result["strategies"].items():
        print(f"{name:<16} {row}")
    print(f"mix over the best single strategy: {result['speed_up']}")


def report(given: Any, found: dict[str, Plan | None], times: dict[str, list[float]]) -> dict[str, Any]:
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
            "shape": shape_of(plan),
        }
    key = "measured_s" if times else "predicted_s"
    others = [row[key] for name, row in rows.items() if row and name != "planned mix"]
    return {
        "setting": {k: v for k, v in vars(given).items() if k not in ("json", "predict")},
        "strategies": rows,
        "speed_up": min(others) / rows["planned mix"][key] if others else None,
    }


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
