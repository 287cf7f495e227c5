"""`graphpar show PLAN`."""

import json

import click

from graphpar.commands.output import json_option, print_json
from graphpar.plans.plan import Plan, plan_schema


def _print_schema(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        print_json(plan_schema())
        context.exit()


@click.command(name="show")
@click.argument("plan", type=click.Path(dir_okay=False))
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of plan files instead.",
)
@json_option
def command(plan: str, as_json: bool) -> None:
    """Print a plan."""
    loaded = Plan.load(plan)
    if as_json:
        print_json(json.loads(loaded.to_json()))
    else:
        click.echo(str(loaded))
