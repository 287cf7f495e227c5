"""What dividing optimiser state and gradients among replicas (ZeRO) saves and costs, as predicted or not.

    python benchmarks/zero.py --json

Two or more replicas of a stack of square products train with Adam, once with everything whole on each
(level 0), once with the optimiser's state divided (1) and once with the sums of gradients too (2); the
jobs take turns step by step. Peaks are those of the processes. Memory that is freed is given back to the
system at once (`MALLOC_MMAP_THRESHOLD_`), so that a peak is what a process held, not how its C library
keeps what it has freed; with `--own-heap` it does as it likes.
"""

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from torch import nn

import graphpar
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.partition.handmade import evaluate
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, price
from graphpar.preparation import prepare

WARM_UP = 2
LEVELS = (0, 1, 2)


class Stack(nn.Module):
    """Square products, and a loss."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def forward(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Mean squared error."""
        return nn.functional.mse_loss(self.layers(x), wanted)


@dataclass(frozen=True)
class Row:
    """One level: the largest peak of a process, measured and predicted, and the median step."""

    zero: int
    peak_bytes: int
    predicted_peak_bytes: float
    step_s: float
    ratio: float
    predicted_s: float
    loss: float


def adam(parameters: object) -> torch.optim.Optimizer:
    """The optimiser of both jobs."""
    return torch.optim.Adam(parameters, lr=1e-4)  # type: ignore[arg-type]


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="per microbatch")
    parser.add_argument("--microbatches", type=int, default=2, help="per replica")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-heap", action="store_true")
    asked = parser.parse_args()
    if not asked.own_heap:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**20)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Stack(asked.width, asked.layers)
    microbatches = asked.microbatches * asked.replicas
    samples = asked.samples * microbatches
    batch = torch.randn(samples, asked.width), torch.randn(samples, asked.width)
    cluster = graphpar.Cluster.local(slowdowns=(1.0,) * asked.replicas)
    training = graphpar.Training(optimizer=adam)
    prepared = prepare(model, batch, {}, training)
    calibration = graphpar.calibrate()
    table = price(prepared, cluster, train=training, calibration=calibration)
    table = with_modes(table, StageOptions(zero=LEVELS[1:]))
    replicas = tuple(Replica(device.name, asked.microbatches) for device in cluster.devices)
    stage = StageChoice(0, table.num_units, replicas)
    plans = {}
    for level in LEVELS:
        pipeline = PipelineChoice(samples, microbatches, (replace(stage, zero=level),))
        plans[level] = plan_of(
            prepared, cluster, table, evaluate(table, (pipeline,)), calibration=calibration
        )
    seconds: dict[int, list[float]] = {level: [] for level in plans}
    losses, peaks = {}, {}
    with ExitStack() as stack:
        jobs = {
            level: stack.enter_context(graphpar.compile(model, cluster, batch, train=training, plan=plan))
            for level, plan in plans.items()
        }
        for number in range(WARM_UP + asked.rounds):
            for level, job in jobs.items():
                losses[level] = float(job.step(*batch))
                assert job.last_step is not None
                peaks[level] = max(report.peak_bytes for report in job.last_step.reports)
                if number >= WARM_UP:
                    seconds[level].append(job.last_step.seconds)
    rows = [
        Row(
            zero=level,
            peak_bytes=peaks[level],
            predicted_peak_bytes=max(plan.predicted_peak_bytes.values()),
            step_s=median(seconds[level]),
            ratio=median(a / b for a, b in zip(seconds[level], seconds[0], strict=True)),
            predicted_s=plan.predicted_step_s,
            loss=losses[level],
        )
        for level, plan in plans.items()
    ]
    if asked.json:
        print(json.dumps({"settings": vars(asked), "rows": [asdict(row) for row in rows]}))
        return
    print(f"{'zero':>4} {'peak':>10} {'predicted':>10} {'step':>9} {'over 0':>7} {'predicted':>10} loss")
    for row in rows:
        peak, predicted = (f"{n / 2**20:>6.0f} MiB" for n in (row.peak_bytes, row.predicted_peak_bytes))
        took = f"{1e3 * row.step_s:>6.1f} ms {row.ratio:>7.3f} {1e3 * row.predicted_s:>7.1f} ms"
        print(f"{row.zero:>4} {peak} {predicted} {took} {row.loss:.7f}")


if __name__ == "__main__":
    main()
