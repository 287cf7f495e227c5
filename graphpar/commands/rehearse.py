"""`graphpar rehearse PLAN`."""

from dataclasses import asdict

import click

from graphpar.commands.options import Number
from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.loading import uncollected
from graphpar.plans.plan import Plan


@click.command(name="rehearse")
@click.argument("plan", type=click.Path(dir_okay=False))
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Steps to play.")
@click.option(
    "--seconds",
    # A shorter one is over before its messages are: it would tell of those alone.
    type=Number(min=0.01, max=3600),
    default=2.0,
    show_default=True,
    help="What a step is to take here; all times are stretched alike.",
)
@json_option
def command(plan: str, steps: int, seconds: float, as_json: bool) -> None:
    """Play a plan's steps here, without computing.

    All ranks are started as processes of this machine, whatever the devices are. They wait as long as
    their work was predicted to take, and exchange messages over links that are as slow as described.
    """
    loaded = Plan.load(plan)
    with uncollected():
        from graphpar.runtime.rehearsal import rehearse
    with stdout_kept_clean(as_json):
        found = rehearse(loaded, steps, seconds)
    if as_json:
        print_json({**asdict(found), "error": found.error})
    else:
        click.echo(str(found))
