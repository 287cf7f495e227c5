"""`graphpar diff A B`."""

import click

from graphpar.commands.output import json_option, print_json
from graphpar.plans.diff import diff_plans
from graphpar.plans.plan import Plan


@click.command(name="diff")
@click.argument("before", type=click.Path(dir_okay=False))
@click.argument("after", type=click.Path(dir_okay=False))
@json_option
def command(before: str, after: str, as_json: bool) -> None:
    """Tell what differs between two plans."""
    diff = diff_plans(Plan.load(before), Plan.load(after))
    if as_json:
        print_json(diff)
    else:
        click.echo(str(diff))
