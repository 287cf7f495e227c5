"""`graphpar explain PLAN [BLOCK]`."""

import click
import msgspec

from graphpar.commands.output import json_option, print_json
from graphpar.explanation.page import format_explanation
from graphpar.plans.plan import Plan


@click.command(name="explain")
@click.argument("plan", type=click.Path(dir_okay=False))
@click.argument("block", required=False)
@json_option
def command(plan: str, block: str | None, as_json: bool) -> None:
    """Tell why a plan is as it is.

    Without BLOCK: what keeps the plan from being faster, what each choice costs against the next best,
    what more of a resource would be worth. With BLOCK, the name of a unit, a part of it or its number:
    the choices that concern it.
    """
    loaded = Plan.load(plan)
    page = format_explanation(loaded, block)
    if as_json:
        found = msgspec.to_builtins(loaded.explanation)
        print_json({**found, "error_budget": msgspec.to_builtins(loaded.error_budget)})
    else:
        click.echo(page)
