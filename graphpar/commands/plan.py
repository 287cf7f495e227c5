"""`graphpar plan MODEL --cluster FILE`."""

import json
from typing import Any, Literal

import click

from graphpar.cluster import Cluster
from graphpar.commands.options import (
    cluster_option,
    input_options,
    model_argument,
    planning_options,
)
from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.files import check_writable
from graphpar.loading import uncollected
from graphpar.partition.settings import ScheduleWish
from graphpar.view.api import check_suffix, visualize


@click.command(name="plan")
@model_argument
@cluster_option
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the plan to this JSON file.")
@click.option(
    "--view",
    "picture",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Draw the plan, too; in an .html page blocks open down to their operations.",
)
@input_options
@planning_options
@json_option
def command(
    model: str,
    cluster_file: str,
    output: str | None,
    picture: str | None,
    batch_size: int,
    seq_len: int,
    train: bool,
    schedule: ScheduleWish,
    zero: Literal[0, 1, 2],
    as_json: bool,
    **planning: Any,
) -> None:
    """Plan a model on a cluster.

    MODEL is package.module:factory, hf:NAME (built from its configuration, no download) or a .pt2
    file. No accelerator is needed, and hf: models need no weights.
    """
    if output is not None:
        check_writable(output)
    if picture is not None:
        check_suffix(picture)
        check_writable(picture)
    with stdout_kept_clean():
        cluster = Cluster.load(cluster_file)
        with uncollected():
            from graphpar.commands.training import default_training
            from graphpar.model_spec import load_model
            from graphpar.planner import EXPLAIN_S, plan_prepared
            from graphpar.preparation import prepare
        loaded = load_model(model, batch_size=batch_size, seq_len=seq_len, train=train, weights=False)
        training = default_training(schedule, zero) if train else None
        prepared = prepare(loaded.model, loaded.args, loaded.kwargs, training)
        plan = plan_prepared(
            prepared,
            cluster,
            train=training,
            calibration=None,
            **planning,
            explain_s=EXPLAIN_S,
        )
        if output is not None:
            plan.save(output)
            click.echo(f"plan written to {output}", err=True)
        if picture is not None:
            page = picture.lower().endswith(".html")
            target = visualize(plan, picture, graph=prepared.graph if page else None)
            click.echo(f"view written to {target}", err=True)
    if as_json:
        print_json(json.loads(plan.to_json()))
    else:
        click.echo(str(plan))
