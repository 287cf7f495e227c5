"""Do predictions follow changes of rows as they must? `benchmarks/published_sense.py FILE.yaml --json`.

Every row that can be predicted is changed in one thing at a time: more work, more or other devices,
another network, format or recomputation, and each field of it left out. Printed are the ratios of
predicted time and memory with the change and without, and how many rows leave the limits that sense sets;
of fields left out, how many rows are refused and how many predictions move by more than a tenth, and how
many of these without a remark about it.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from published import score
from published_clean import cleaned, rows_of
from published_rows import run_of

from graphpar.cost_models.training import step_time
from graphpar.cost_models.training_memory import memory_bytes
from graphpar.cost_models.training_run import Run, parameters

MOVED = 0.1


@dataclass(frozen=True)
class Change:
    """A change of a run, and the least and most that time and memory may be multiplied by.

    `apply` gives nothing where the change means nothing for that run.
    """

    name: str
    apply: Callable[[Run], Run | None]
    time: tuple[float, float]
    memory: tuple[float, float]


def longer(run: Run) -> Run:
    """Sequences twice as long."""
    return replace(run, shape=replace(run.shape, seq_len=2 * run.shape.seq_len))


def deeper(run: Run) -> Run:
    """Twice the layers."""
    return replace(run, shape=replace(run.shape, layers=2 * run.shape.layers))


def wider(run: Run) -> Run:
    """Everything that layers are wide by, twice, heads of the same size."""
    shape, moe = run.shape, run.shape.moe
    experts = replace(moe, ffn=2 * moe.ffn) if moe else None
    sizes = {name: 2 * getattr(shape, name) for name in ("hidden", "heads", "kv_heads", "ffn")}
    return replace(run, shape=replace(shape, moe=experts, **sizes))


def weak(run: Run) -> Run | None:
    """Twice the replicas with twice the samples; one device says nothing of the node that it is of."""
    if run.devices == 1:
        return None
    return replace(run, data=2 * run.data, devices=2 * run.devices, batch=2 * run.batch)


def strong(run: Run) -> Run | None:
    """Twice the replicas with the same samples, where each has more than one microbatch."""
    few = run.batch < 2 * run.data * run.microbatch
    return None if few else replace(run, data=2 * run.data, devices=2 * run.devices)


def slow_network(run: Run) -> Run | None:
    """A tenth of the network."""
    slow = replace(run.network, node_bytes_per_s=run.network.node_bytes_per_s / 10)
    return replace(run, network=slow) if run.devices > run.per_node else None


def recomputed(run: Run) -> Run | None:
    """All layers run again."""
    return replace(run, recompute="full") if run.recompute == "none" else None


def in_float32(run: Run) -> Run | None:
    """Everything in float32."""
    return None if run.dtype == "float32" else replace(run, dtype="float32")


def odd_experts(run: Run) -> Run | None:
    """A quarter more experts of the same size: each gets fewer tokens, of no round number."""
    moe = run.shape.moe
    if moe is None:
        return None
    return replace(run, shape=replace(run.shape, moe=replace(moe, experts=moe.experts * 5 // 4)))


NEXT = {
    "v100-sxm2-16gb": "v100-sxm2-32gb", "v100-sxm2-32gb": "a100-sxm-40gb",
    "a100-sxm-40gb": "a100-sxm-80gb", "a100-sxm-80gb": "h100-sxm-80gb", "h100-sxm-80gb": "h200-sxm-141gb",
    "h200-sxm-141gb": "b200-sxm", "b200-sxm": "b300-sxm", "gb200": "gb300", "rtx-4080": "rtx-4090",
    "a100-pcie-40gb": "a100-sxm-40gb", "a100-pcie-80gb": "a100-sxm-80gb",
    "h100-pcie-80gb": "h100-sxm-80gb",
}  # fmt: skip
"""Devices, and others that are no worse in anything."""


def better_device(run: Run) -> Run | None:
    """A device that is no worse in anything."""
    following = NEXT.get(run.device)
    return replace(run, device=following) if following else None


ANY = float("inf")
CHANGES = (
    Change("sequences x 2", longer, (1.0, 4.5), (1.0, 4.2)),
    Change("layers x 2", deeper, (1.0, 2.2), (1.0, 2.1)),
    # Kernels that need heads times samples to divide by four find them so: fewer are issued.
    Change("width x 2", wider, (0.85, 4.5), (1.0, 4.2)),
    Change("replicas and samples x 2", weak, (0.98, 1.3), (0.4, 1.2)),
    Change("replicas x 2", strong, (0.45, 1.05), (0.4, 1.2)),
    Change("network / 10", slow_network, (1.0, ANY), (1.0, 1.0)),
    Change("recomputed", recomputed, (1.0, 1.6), (0.0, 1.0)),
    Change("float32", in_float32, (1.0, ANY), (0.6, 2.0)),
    Change("experts x 1.25", odd_experts, (0.95, 1.4), (1.0, 1.3)),
    Change("better device", better_device, (0.0, 1.0), (1.0, 1.0)),
)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = sense(rows_of(options.file))
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{'change':<26}{'n':>5}  time: least, median, most   memory: the same      outside")
    for line in report["changes"]:
        cells = "".join(f"{value:8.2f}" for value in (*line["time"], *line["memory"]))
        print(f"{line['change']:<26}{line['n']:>5}{cells}{len(line['outside']):>9}")
    print(f"\n{'field left out':<34}{'n':>5}{'refused':>9}{'moved':>7}{'unsaid':>8}")
    for line in report["fields"]:
        cells = f"{line['n']:>5}{line['refused']:>9}{line['moved']:>7}{line['unsaid']:>8}"
        print(f"{line['field']:<34}{cells}")


def sense(rows: list[Any]) -> dict[str, Any]:
    """What all changes and all fields left out do to rows that can be predicted."""
    known = [row for row in rows if isinstance(score(row), dict)]
    runs = [(str(row.get("id")), run_of(cleaned(row)[0])) for row in known]
    predicted = [(name, run, *costs(run)) for name, run in runs if isinstance(run, Run)]
    changes = (changed(change, predicted) for change in CHANGES)
    groups = ("model", "hardware", "parallel", "batch")
    fields = dict.fromkeys((g, key) for row in known for g in groups for key in row[g])
    return {
        "changes": [line for line in changes if line["n"]],
        "fields": [left_out(group, key, known) for group, key in fields],
    }


def costs(run: Run) -> tuple[float, float]:
    """Predicted seconds of a step and bytes of the fullest device."""
    return step_time(run, parameters()).total_s, memory_bytes(run)


def changed(change: Change, runs: list[tuple[str, Run, float, float]]) -> dict[str, Any]:
    """Ratios of time and memory under one change, and the rows that leave its limits."""
    times, sizes, outside = [], [], []
    for name, run, seconds, size in runs:
        if (other := change.apply(run)) is None:
            continue
        found = costs(other)
        ratios = (found[0] / seconds, found[1] / size)
        times.append(ratios[0])
        sizes.append(ratios[1])
        limits = (change.time, change.memory)
        if not all(a - 1e-9 <= r <= b + 1e-9 for r, (a, b) in zip(ratios, limits, strict=True)):
            outside.append(name)
    return {
        "change": change.name,
        "n": len(times),
        "time": spread(times),
        "memory": spread(sizes),
        "outside": outside,
    }


def spread(values: list[float]) -> list[float]:
    """The least, the median and the most; nothing of nothing."""
    return [min(values), median(values), max(values)] if values else []


def left_out(group: str, key: str, rows: list[Any]) -> dict[str, Any]:
    """What becomes of the rows that state a field when it is left out."""
    stated = [row for row in rows if row[group].get(key) is not None]
    found = {"n": len(stated), "refused": 0, "moved": 0, "unsaid": 0}
    for row in stated:
        less = copy.deepcopy(row)
        del less[group][key]
        before, after = score(row), score(less)
        assert isinstance(before, dict)
        if isinstance(after, str):
            found["refused"] += 1
            continue
        moved = abs(after["predicted_s"] / before["predicted_s"] - 1) > MOVED
        found["moved"] += moved
        found["unsaid"] += moved and not set(after["remarks"]) - set(before["remarks"])
    return {"field": f"{group}.{key}", **found}


if __name__ == "__main__":
    main()
