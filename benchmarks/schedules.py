"""Steps under 1F1B, zero bubble and interleaved 1F1B on a local cluster, measured side by side.

    python benchmarks/schedules.py --json

Like devices are emulated on this machine: every worker computes real numbers and sleeps until a device
`--slowdown` times slower would be done, so that few cores carry many devices. All jobs train the same
model on the same stages (interleaved: the same devices with two stages each) and take turns step by step;
ratios are those of steps of one round, and their median is told, beside what the simulator predicts for
the same lists. Losses must agree to rounding. `late op` is what a product on a tape of its own takes
besides.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import nn

import graphpar
from graphpar.calibration import Calibration
from graphpar.choice.orders import interleaved
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.planner import plan_of, price
from graphpar.plans.plan import Plan
from graphpar.preparation import Prepared, prepare
from graphpar.runtime.deferral import Deferral, Late
from graphpar.runtime.job import CompiledModel
from graphpar.schedule.simulated import simulated

WARM_UP = 2


class Stack(nn.Module):
    """Equal blocks of two products, and a loss."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Mean squared error."""
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.mse_loss(x, wanted)


@dataclass(frozen=True)
class Row:
    """One schedule: median seconds of a step, and over 1F1B's of the same round."""

    name: str
    step_s: float
    ratio: float
    ratio_range: tuple[float, float]
    predicted_s: float
    predicted_ratio: float
    bubble_share: float
    loss: float


def sgd(parameters: object) -> torch.optim.Optimizer:
    """The optimiser of all jobs."""
    return torch.optim.SGD(parameters, lr=0.01)  # type: ignore[arg-type]


def plans(
    prepared: Prepared,
    cluster: graphpar.Cluster,
    training: graphpar.Training,
    microbatches: int,
    calibration: Calibration | None,
) -> Iterator[tuple[str, Plan]]:
    """The same even stages under every schedule."""
    table = price(prepared, cluster, train=training, calibration=calibration)
    units, names = table.num_units, [device.name for device in cluster.devices]
    cuts = [round(i * units / len(names)) for i in range(len(names) + 1)]
    stages = tuple(
        StageChoice(cuts[i], cuts[i + 1], (Replica(name, microbatches),)) for i, name in enumerate(names)
    )
    plain = PipelineChoice(table.batch, microbatches, stages)
    chunked = interleaved(table, plain, 2)
    ways: tuple[tuple[str, ScheduleName, PipelineChoice], ...] = (
        ("1f1b", "1f1b", plain),
        ("zero-bubble", "zero-bubble", plain),
        ("interleaved, 2 stages each", "interleaved", chunked),
        ("zero-bubble, 2 stages each", "zero-bubble", chunked),
    )
    for name, schedule, pipeline in ways:
        found = simulated(table, (pipeline,), schedule).partition
        yield name, plan_of(prepared, cluster, table, found, calibration=calibration)


def measure(
    jobs: dict[str, CompiledModel], batch: tuple[torch.Tensor, torch.Tensor], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each job's steps, taken in turns, and its last loss."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    losses = {}
    for number in range(WARM_UP + rounds):
        for name, job in jobs.items():
            losses[name] = float(job.step(*batch))
            assert job.last_step is not None
            if number >= WARM_UP:
                seconds[name].append(job.last_step.seconds)
    return seconds, losses


@contextmanager
def running(
    model: nn.Module,
    cluster: graphpar.Cluster,
    batch: tuple[torch.Tensor, torch.Tensor],
    training: graphpar.Training,
    made: dict[str, Plan],
) -> Iterator[dict[str, CompiledModel]]:
    """A job for each plan."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(graphpar.compile(model, cluster, batch, train=training, plan=plan))
            for name, plan in made.items()
        }


def late_op_s() -> float:
    """What a small product takes besides when its weights' gradients come later; processor time."""
    width, times = 16, 2000
    weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((width, width), (width,)))
    deferral = Deferral()
    late = Late(nn.functional.linear, (1, 2), deferral)

    def once(split: bool) -> None:
        x = torch.ones(4, width, requires_grad=True)
        with deferral.noting(0):
            (late if split else nn.functional.linear)(x, weight, bias).sum().backward()
        deferral.settle(0)

    taken = []
    for split in (False, True, False, True):
        began = time.thread_time()
        for _ in range(times):
            once(split)
        taken.append((time.thread_time() - began) / times)
    return min(taken[1::2]) - min(taken[::2])


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--slowdown", type=float, default=4.0)
    parser.add_argument("--microbatches", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=256, help="per microbatch")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Stack(asked.width, asked.layers)
    samples = asked.samples * asked.microbatches
    batch = torch.randn(samples, asked.width), torch.randn(samples, asked.width)
    cluster = graphpar.Cluster.local(slowdowns=(asked.slowdown,) * asked.devices)
    training = graphpar.Training(optimizer=sgd)
    prepared = prepare(model, batch, {}, training)
    calibration = graphpar.calibrate()
    made = dict(plans(prepared, cluster, training, asked.microbatches, calibration))
    with running(model, cluster, batch, training, made) as jobs:
        seconds, losses = measure(jobs, batch, asked.rounds)
    rows = []
    for name, plan in made.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["1f1b"], strict=True)]
        predicted = plan.predicted_step_s / made["1f1b"].predicted_step_s
        rows.append(
            Row(name, median(seconds[name]), median(ratios), (min(ratios), max(ratios)),
                plan.predicted_step_s, predicted, plan.bubble_share, losses[name])
        )  # fmt: skip
    found = {"settings": vars(asked), "late_op_s": late_op_s(), "rows": [asdict(row) for row in rows]}
    if asked.json:
        print(json.dumps(found))
        return
    head = f"{'schedule':<28} {'step':>9} {'over 1f1b':>10} {'range':>13} {'predicted':>10}"
    print(f"{head} {'over 1f1b':>10} loss")
    for row in rows:
        low, high = row.ratio_range
        print(
            f"{row.name:<28} {1e3 * row.step_s:>6.1f} ms {row.ratio:>10.3f} {low:>6.3f}-{high:<6.3f} "
            f"{1e3 * row.predicted_s:>7.1f} ms {row.predicted_ratio:>10.3f} {row.loss:.7f}"
        )
    print(f"late op: {1e6 * found['late_op_s']:.0f} µs")  # type: ignore[operator]


if __name__ == "__main__":
    main()
