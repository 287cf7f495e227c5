"""`graphpar view PLAN -o FILE`."""

from pathlib import Path

import click

from graphpar.plans.plan import Plan
from graphpar.view.api import visualize


@click.command(name="view")
@click.argument("plan", type=click.Path(dir_okay=False))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False),
    help="Where to write; the suffix says what: .html (page), .svg, .png, .json (trace), .md, "
    ".dot, .graphml.",
)
@click.option(
    "--compare",
    metavar="OTHER",
    type=click.Path(dir_okay=False),
    help="Another plan to set beside the first; for .html.",
)
def command(plan: str, output: str, compare: str | None) -> None:
    """Draw a plan into one file."""
    if any(Path(source).resolve() == Path(output).resolve() for source in (plan, compare) if source):
        raise ValueError(f"{output} is a plan that is to be drawn; give another name to write to")
    target = visualize(Plan.load(plan), output, compare=Plan.load(compare) if compare else None)
    click.echo(f"view written to {target}", err=True)
