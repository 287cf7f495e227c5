"""`graphpar verify MODEL --cluster FILE`."""

from typing import Any, Literal

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
from graphpar.errors import NumbersDifferError
from graphpar.loading import uncollected
from graphpar.partition.settings import ScheduleWish


@click.command(name="verify")
@model_argument
@cluster_option
@plan_option
@steps_option
@input_options
@planning_options
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
    as_json: bool,
    **planning: Any,
) -> None:
    """Compare a parallel run with one device.

    Runs the same steps both ways and reports the largest differences of outputs, losses and
    gradients; the exit code is 6 when they are larger than rounding explains.
    """
    with stdout_kept_clean(as_json):
        cluster, plan = Cluster.load(cluster_file), load_plan(plan_file, train=train)
        with uncollected():
            from graphpar.commands.training import default_training
            from graphpar.model_spec import load_model
            from graphpar.verify import verify
        loaded = load_model(model, batch_size=batch_size, seq_len=seq_len, train=train, weights=True)
        report = verify(
            loaded.model,
            cluster,
            loaded.args,
            loaded.kwargs,
            train=default_training(schedule, zero) if train else None,
            plan=plan,
            steps=steps,
            **planning,
        )
    if as_json:
        print_json(report)
    else:
        click.echo(str(report))
    if not report.equal:
        raise NumbersDifferError(
            "the parallel run differs from one device by more than rounding explains; "
            "the differences are listed above"
        )
