"""`graphpar run MODEL --cluster FILE`."""

from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from graphpar.cluster import Cluster
from graphpar.commands.options import (
    cluster_option,
    input_options,
    load_plan,
    model_argument,
    plan_option,
    planning_options,
    steps_option,
)
from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.files import check_writable
from graphpar.loading import uncollected
from graphpar.partition.settings import ScheduleWish
from graphpar.units import format_percent, format_seconds
from graphpar.view.api import check_suffix, visualize

if TYPE_CHECKING:
    from graphpar.model_spec import LoadedModel
    from graphpar.runtime.job import CompiledModel


@click.command(name="run")
@model_argument
@cluster_option
@plan_option
@steps_option
@input_options
@planning_options
@click.option(
    "--view",
    "picture",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Draw the plan with the last step as it ran; also when the run fails.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Run the last step under torch.profiler; a .json --view then shows its operations.",
)
@json_option
def command(
    model: str,
    cluster_file: str,
    plan_file: str | None,
    steps: int,
    batch_size: int,
    seq_len: int,
    train: bool,
    schedule: ScheduleWish,
    zero: Literal[0, 1, 2],
    picture: str | None,
    profile: bool,
    as_json: bool,
    **planning: Any,
) -> None:
    """Run a model on a cluster for some steps.

    MODEL is package.module:factory, hf:NAME (freshly initialised) or a .pt2 file. Every step runs
    on the same example inputs. Meanwhile each step's loss, speed, and what was predicted are shown,
    on a terminal also how busy each device is and its memory.
    """
    if picture is not None:
        check_suffix(picture)
        check_writable(picture)
    if profile and not (picture or "").lower().endswith(".json"):
        raise ValueError("--profile adds operations to a trace; say where with --view FILE.json")
    with stdout_kept_clean(as_json):
        cluster = Cluster.load(cluster_file)
        plan = load_plan(plan_file, train=train)
        with uncollected():
            from graphpar.commands.training import default_training
            from graphpar.compiler import compile as compile_model
            from graphpar.model_spec import load_model
        loaded = load_model(model, batch_size=batch_size, seq_len=seq_len, train=train, weights=True)
        with compile_model(
            loaded.model,
            cluster,
            loaded.args,
            loaded.kwargs,
            train=default_training(schedule, zero) if train else None,
            plan=plan,
            **planning,
        ) as job:
            try:
                result = _run_steps(job, loaded, steps, batch_size, train, profile)
            finally:
                if picture is not None:
                    click.echo(f"view written to {visualize(job, picture)}", err=True)
    if as_json:
        print_json(result)
    else:
        _print_summary(result)


def _run_steps(
    job: "CompiledModel", loaded: "LoadedModel", steps: int, samples: int, train: bool, profile: bool
) -> dict[str, Any]:
    """Run the steps; where there are several, the first warms up and is not part of the mean."""
    from rich.console import Console

    from graphpar.commands.live import Progress

    losses: list[float] = []
    seconds: list[float] = []
    with Progress(job.plan, steps, Console(stderr=True)) as progress:
        for number in range(1, steps + 1):
            with job.profiling() if profile and number == steps else nullcontext():
                if train:
                    losses.append(float(job.step(*loaded.args, **loaded.kwargs)))
                else:
                    job(*loaded.args, **loaded.kwargs)
            assert job.last_step is not None
            seconds.append(job.last_step.seconds)
            progress.show(number, samples, job.last_step, losses[-1] if train else None)
    measured = seconds[1:] or seconds
    return {
        "losses": losses,
        "step_s": seconds,
        "measured_step_s": sum(measured) / len(measured),
        "predicted_step_s": None if job.last_step is None else job.last_step.predicted_s,
        "devices": [asdict(d) for d in job.comparison.devices] if job.comparison else [],
        "likely_reasons": list(job.comparison.reasons) if job.comparison else [],
        "true_error": asdict(job.true_error) if job.true_error is not None else None,
        "true_error_told": str(job.true_error) if job.true_error is not None else None,
    }


def _print_summary(result: dict[str, Any]) -> None:
    measured, predicted = result["measured_step_s"], result["predicted_step_s"]
    if predicted is None:
        told = "no prediction, for the plan is for another batch size"
    else:
        side = "high" if predicted > measured else "low"
        off = format_percent(abs(predicted / measured - 1))
        told = f"predicted {format_seconds(predicted)}, {off} too {side}"
    click.echo(f"measured step {format_seconds(measured)}, {told}")
    for reason in result["likely_reasons"]:
        click.echo(f"likely: {reason}")
    if result["true_error_told"]:
        click.echo(result["true_error_told"])
    if result["losses"]:
        click.echo(f"loss {result['losses'][0]:.6f} -> {result['losses'][-1]:.6f}")
