"""The demo: a small GPT over unlike local workers, compared with one device and with an even split."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from graphpar.cluster import Cluster
from graphpar.compiler import compile as compile_model
from graphpar.examples.gpt import GPT
from graphpar.examples.text import batches, standard_library_text
from graphpar.local.measure import calibrate
from graphpar.local.timing import Example
from graphpar.partition.baselines import even_split
from graphpar.planner import plan_of, plan_prepared, price
from graphpar.preparation import prepare
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.numbers import FLOAT32_ROUNDING
from graphpar.runtime.reference import EagerModel
from graphpar.training import Training
from graphpar.units import format_percent, format_seconds
from graphpar.view.api import visualize

SLOWDOWNS = (1.5, 2.0, 4.5)
"""Emulated speeds, the last worker three times slower than the first. They keep 1.4 cores busy, so
that on a machine of two cores they do not wait for each other."""
BATCH, LENGTH = 24, 64
EVEN_STEPS = 6
"""Steps of the even split: enough for a median, it is slow."""
WARM_UP = 2
"""First steps of each job that no median counts: buffers are allocated, modules are built."""

Batch = tuple[torch.Tensor, torch.Tensor]


class DemoReport(msgspec.Struct, frozen=True):
    """What the demo found.

    Attributes:
        steps: Training steps, the same on the workers and on one device.
        parameters: Parameters of the model.
        devices: Devices the plan uses.
        losses: First and last loss of the parallel job.
        loss_difference: Largest difference of any step's loss from one device's, relative.
        same_numbers: Whether that is within float32 rounding.
        measured_step_s: Median measured step of the planned job.
        predicted_step_s: What the plan predicted.
        prediction_error: (predicted - measured) / measured.
        even_step_s: Median measured step of the even split over the same devices.
        speed_up: Even split's step over the planned job's.
        one_device_step_s: Median step of one device without emulation.
        status: The solver's word on the plan.
        bound_s: Its proven lower bound on the step time.
        gap: How far the plan may be from the best of its family.
        plan_file: Where the plan was written.
        report_file: Where this report was written.
        picture_file: Where the plan and its last step were drawn.
    """

    steps: int
    parameters: int
    devices: tuple[str, ...]
    losses: tuple[float, float]
    loss_difference: float
    same_numbers: bool
    measured_step_s: float
    predicted_step_s: float
    prediction_error: float
    even_step_s: float
    speed_up: float
    one_device_step_s: float
    status: str
    bound_s: float
    gap: float
    plan_file: str
    report_file: str
    picture_file: str

    def __str__(self) -> str:
        rows = [f"{name:<24}{value}" for name, value in self.rows()]
        files = f"see {self.picture_file} (in a browser), {self.report_file}, {self.plan_file}"
        return "\n".join([*rows, files])

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of each line of the report."""
        same = "within float32 rounding" if self.same_numbers else "MORE THAN ROUNDING"
        yield "loss", f"{self.losses[0]:.4f} -> {self.losses[1]:.4f} in {self.steps} steps"
        yield "largest loss difference", f"{self.loss_difference:.1e} from one device ({same})"
        yield "measured step", format_seconds(self.measured_step_s)
        yield (
            "predicted step",
            f"{format_seconds(self.predicted_step_s)} ({100 * self.prediction_error:+.1f} %)",
        )
        yield "even split, measured", format_seconds(self.even_step_s)
        yield "speed-up over even", f"{self.speed_up:.2f} x"
        yield "one device, full speed", format_seconds(self.one_device_step_s)
        yield (
            "plan",
            f"{self.status}, bound {format_seconds(self.bound_s)}, gap {format_percent(self.gap)}",
        )


def run_demo(steps: int, out: Path) -> DemoReport:
    """Plan, train, train again on one device, compare; writes plan.json and reports to `out`.

    Args:
        steps: Training steps.
        out: Folder for the results; made if it is missing.
    """
    console = Console(stderr=True)
    console.print("Measuring this machine's processor, half a minute")
    calibration = calibrate(refresh=True, show_progress=console.is_terminal)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT(length=LENGTH)
    data = _take(steps)
    training = Training(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), max_grad_norm=1.0)
    cluster = Cluster.local(slowdowns=SLOWDOWNS)
    prepared = prepare(model, data[0], {}, training)
    table = price(prepared, cluster, train=training, precision="float32", calibration=calibration)
    plan = plan_prepared(
        prepared, cluster, train=training, precision="float32", calibration=calibration,
        time_limit_s=20.0, gap=0.01, example=Example(model, data[0], {}),
    )  # fmt: skip
    even = plan_of(prepared, cluster, table, even_split(table))
    console.print(str(plan), highlight=False, markup=False)

    with ExitStack() as stack:
        bar = stack.enter_context(_progress(console))
        planned_job = stack.enter_context(
            compile_model(model, cluster, data[0], train=training, plan=plan)
        )
        losses, planned_s = _train(planned_job, data, bar, "planned split")
        picture = visualize(planned_job, out / "report.html")
    with ExitStack() as stack:
        bar = stack.enter_context(_progress(console))
        even_job = stack.enter_context(compile_model(model, cluster, data[0], train=training, plan=even))
        _, even_s = _train(even_job, data[:EVEN_STEPS], bar, "even split")
        one_losses, one_s = _train_alone(model, training, data, bar)

    plan_file = plan.save(out / "plan.json")
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, one_losses, strict=True))
    measured = median(planned_s[WARM_UP:] or planned_s)
    even_measured = median(even_s[WARM_UP:] or even_s)
    report = DemoReport(
        steps=steps,
        parameters=sum(p.numel() for p in model.parameters()),
        devices=plan.partition.used_devices,
        losses=(losses[0], losses[-1]),
        loss_difference=difference,
        same_numbers=difference <= FLOAT32_ROUNDING,
        measured_step_s=measured,
        predicted_step_s=plan.predicted_step_s,
        prediction_error=plan.predicted_step_s / measured - 1,
        even_step_s=even_measured,
        speed_up=even_measured / measured,
        one_device_step_s=median(one_s[WARM_UP:] or one_s),
        status=plan.status,
        bound_s=plan.bound_s,
        gap=plan.gap,
        plan_file=str(plan_file),
        report_file=str(out / "report.md"),
        picture_file=str(picture),
    )
    (out / "report.md").write_text(_markdown(report, str(plan)), encoding="utf-8")
    return report


def _take(steps: int) -> list[Batch]:
    endless = batches(standard_library_text(), BATCH, LENGTH)
    return [next(endless) for _ in range(steps)]


def _train(
    job: CompiledModel, data: list[Batch], bar: Progress, name: str
) -> tuple[list[float], list[float]]:
    """Losses and seconds of each step of a parallel job."""
    losses, seconds = [], []
    for batch in bar.track(data, description=name):
        losses.append(float(job.step(*batch)))
        assert job.last_step is not None
        seconds.append(job.last_step.seconds)
    return losses, seconds


def _train_alone(
    model: GPT, training: Training, data: list[Batch], bar: Progress
) -> tuple[list[float], list[float]]:
    """Losses and seconds of the same steps in plain PyTorch on one device."""
    alone = EagerModel(model, training)
    optimizer = training.optimizer(alone.parameters)
    assert training.max_grad_norm is not None
    losses, seconds = [], []
    for batch in bar.track(data, description="one device"):
        begin = time.perf_counter()
        (loss,) = alone.forward(batch, {})
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(alone.parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss.detach()))
    return losses, seconds


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _markdown(report: DemoReport, page: str) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in report.rows())
    return (
        "# graphpar demo\n\n"
        f"A byte-level GPT of {report.parameters:,} parameters on the standard library's documentation "
        f"and sources, over local CPU workers slowed down {', '.join(map(str, SLOWDOWNS))} times.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n## Plan\n\n```\n{page}\n```\n"
    )
