"""How long sweeps of a hundred scenarios take, what they find, and how much their gaps leave open.

    python benchmarks/what_if.py --json
    python benchmarks/what_if.py batch-count links --processes 2

Each sweep is a study of its own with an empty cache, the capture of the model included. With one process
(the default) all limits count processor time, so that other work on the machine changes nothing;
`cores_2_s` is then what two idle cores would take: searches shared by two processes, all else in one.
With more processes limits count wall-clock time, which is what is printed.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from graphpar.cluster import Cluster
from graphpar.commands.training import default_training
from graphpar.model_spec import load_model
from graphpar.scenarios import solve, workers
from graphpar.scenarios.api import Study, what_if
from graphpar.scenarios.task import Task
from graphpar.scenarios.types import Answer

MODEL, BATCH, LENGTH = "hf:llama-8b", 64, 2048

A100S = {"kind": "a100-sxm-80gb", "count": 8}
TWO = {
    "nodes": [{"name": name, "devices": A100S, "link": "nvlink3"} for name in "ab"],
    "network": {"bytes_per_s": 25e9, "latency_s": 5e-6},
}
MANY = {**TWO, "nodes": [{"name": f"n{i}", "devices": A100S, "link": "nvlink3"} for i in range(16)]}
MIXED = {
    "nodes": [
        {"name": "a", "devices": A100S},
        {"name": "b", "devices": {"kind": "rtx-4090", "count": 4}},
        {"name": "c", "devices": {"kind": "v100-sxm2-32gb", "count": 4}},
    ],
    "network": {"bytes_per_s": 12.5e9, "latency_s": 5e-6},
}

BATCHES = (16, 24, 32, 48, 64, 80, 96, 112, 128, 256)
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
BANDWIDTHS = (1e9, 2e9, 4e9, 6e9, 8e9, 12e9, 16e9, 25e9, 50e9, 100e9)
LATENCIES = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
LENGTHS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
MEMORIES = (24e9, 32e9, 40e9, 48e9, 56e9, 64e9, 72e9, 80e9, 96e9, 141e9)
SLOWDOWNS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0)
SCHEDULES = ("auto", "1f1b", "gpipe", "interleaved", "zero-bubble")
TYPES = ("p3.8xlarge", "g5.12xlarge", "g6.12xlarge", "p4d.24xlarge", "g5.48xlarge", "g4dn.12xlarge")


@dataclass(frozen=True)
class Sweep:
    """A cluster and what is swept over on it, or a budget."""

    cluster: Mapping[str, Any]
    over: Mapping[str, Sequence[object]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


SWEEPS = {
    "links": Sweep(TWO, {"network.bytes_per_s": BANDWIDTHS, "network.latency_s": LATENCIES}),
    "batch-count": Sweep(TWO, {"batch": BATCHES, "a.count": COUNTS}),
    "batch-length": Sweep(TWO, {"batch": BATCHES, "seq_len": LENGTHS}),
    "count-precision": Sweep(
        TWO, {"a.count": range(1, 35), "precision": ("float32", "bfloat16", "float16")}
    ),
    "batch-schedule": Sweep(TWO, {"batch": range(8, 161, 8), "schedule": SCHEDULES}),
    "links-batch": Sweep(TWO, {"network.bytes_per_s": BANDWIDTHS, "batch": BATCHES}),
    "memory-slowdown": Sweep(TWO, {"a.memory_bytes": MEMORIES, "a.slowdown": SLOWDOWNS}),
    "batch-recompute": Sweep(TWO, {"batch": range(8, 265, 8), "recompute": ("on", "off", "auto")}),
    "optimizer-batch": Sweep(
        TWO, {"optimizer": ("sgd", "momentum", "adam", "adamw"), "batch": range(8, 201, 8)}
    ),
    "tp-pp": Sweep(MANY, {"tp": (1, 2, 4, 8), "pp": range(1, 26)}),
    "tp-dp": Sweep(MANY, {"tp": (1, 2, 4, 8), "dp": range(1, 26)}),
    "tensor-auto": Sweep(TWO, {"batch": BATCHES, "a.count": COUNTS}, {"tensor": "auto"}),
    "tensor-length": Sweep(TWO, {"batch": BATCHES, "seq_len": LENGTHS}, {"tensor": "auto"}),
    "tensor-links": Sweep(
        TWO, {"a.link.bytes_per_s": BANDWIDTHS, "network.bytes_per_s": BANDWIDTHS}, {"tensor": "auto"}
    ),
    "mixed-tensor": Sweep(MIXED, {"batch": BATCHES, "a.count": COUNTS}, {"tensor": "auto"}),
    "mixed-batch-count": Sweep(MIXED, {"batch": BATCHES, "a.count": COUNTS}),
    "mixed-links": Sweep(MIXED, {"network.bytes_per_s": BANDWIDTHS, "network.latency_s": LATENCIES}),
    "budget": Sweep(TWO, options={"budget_usd_per_h": 60.0, "instances": TYPES}),
}


@dataclass(frozen=True)
class Row:
    """What a sweep took and found; gaps are of answers that were searched for."""

    sweep: str
    scenarios: int
    processor_s: float
    searches_s: float
    cores_2_s: float
    wall_s: float
    statuses: dict[str, int]
    mean_step_s: float
    median_gap: float
    largest_gap: float
    budget: dict[str, Any] | None


def run(name: str, processes: int) -> tuple[Row, Study]:
    """One study from nothing."""
    sweep = SWEEPS[name]
    how = {"train": True, "weights": False}
    loaded = load_model(MODEL, batch_size=BATCH, seq_len=LENGTH, **how)

    def inputs(batch: int, length: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
        other = load_model(MODEL, batch_size=batch, seq_len=length, **how)
        return other.args, other.kwargs

    # As long as each scenario of a hundred has on two cores.
    limit_s = 0.4 if processes == 1 and sweep.over else None
    began_s, wall_s = time.process_time(), time.perf_counter()
    # Other processes take the real function, and their time is not this one's.
    with _searches_timed() if processes == 1 else nullcontext([0.0]) as searches:
        study = what_if(
            loaded.model, Cluster.from_dict(sweep.cluster), (), loaded.args, loaded.kwargs,
            train=default_training(), inputs=inputs, sweep=sweep.over, precision="bfloat16",
            cache=False, processes=processes, time_limit_s=limit_s, **sweep.options,
        )  # fmt: skip
    took_s, wall_s = time.process_time() - began_s, time.perf_counter() - wall_s
    return _row(name, study, took_s, sum(searches), wall_s), study


def _row(name: str, study: Study, took_s: float, searches_s: float, wall_s: float) -> Row:
    answers = study.answers or (study.baseline,)
    steps = [a.step_s for a in answers if a.status == "ok" and a.step_s]
    gaps = [a.gap for a in answers if a.status == "ok" and a.gap is not None] or [0.0]
    return Row(
        sweep=name,
        scenarios=len(answers),
        processor_s=took_s,
        searches_s=searches_s,
        cores_2_s=took_s - searches_s / 2,
        wall_s=wall_s,
        statuses=dict(Counter(a.status for a in answers)),
        mean_step_s=math.exp(statistics.fmean(map(math.log, steps))),
        median_gap=statistics.median(gaps),
        largest_gap=max(gaps),
        budget=_budget(study),
    )


def _budget(study: Study) -> dict[str, Any] | None:
    found = study.budget
    if found is None or found.best is None:
        return None
    answer: Answer = found.best
    return {
        "best": answer.title,
        "step_s": answer.step_s,
        "gap": found.gap,
        "mixes": found.considered,
        "planned": found.solved,
        "ruled_out": found.ruled_out,
        "unplanned": found.unplanned,
    }


@contextmanager
def _searches_timed() -> Iterator[list[float]]:
    """Processor seconds of what other processes would do, where this one does it."""
    real, spent = solve.solve_together, list[float]()

    def timed(tasks: Sequence[Task]) -> list[Answer]:
        began_s = time.process_time()
        found = real(tasks)
        spent.append(time.process_time() - began_s)
        return found

    workers.solve_together = timed  # type: ignore[attr-defined]
    try:
        yield spent
    finally:
        workers.solve_together = real  # type: ignore[attr-defined]


def main() -> None:
    """Run sweeps and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", help="write the step and gap of every scenario into this file")
    options = parser.parse_args()
    if unknown := set(options.sweeps) - set(SWEEPS):
        parser.error(f"no sweep is named {', '.join(sorted(unknown))}; there are {', '.join(SWEEPS)}")
    warnings.simplefilter("ignore")
    if options.processes == 1:
        time.monotonic = time.process_time
    rows, steps = [], {}
    for name in options.sweeps or SWEEPS:
        row, study = run(name, options.processes)
        rows.append(row)
        steps[name] = {a.title: (a.step_s, a.gap) for a in study.answers if a.status == "ok"}
        if not options.json:
            print(_told(row), flush=True)
    if options.steps:
        with open(options.steps, "w") as file:
            json.dump(steps, file)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))


def _told(row: Row) -> str:
    took = f"{row.processor_s:6.1f} s processor, {row.cores_2_s:5.1f} s on two cores"
    found = (
        f"mean step {row.mean_step_s:.4f} s, gap {row.median_gap:.1%} median {row.largest_gap:.1%} most"
    )
    return (
        f"{row.sweep:18} {row.scenarios:4} {took}, {row.wall_s:5.1f} s wall; {found} {row.budget or ''}"
    )


if __name__ == "__main__":
    main()
