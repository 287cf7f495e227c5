"""`graphpar demo`."""

from pathlib import Path

import click

from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.errors import NumbersDifferError
from graphpar.loading import uncollected


@click.command(name="demo")
@click.option(
    "--steps",
    default=30,
    show_default=True,
    type=click.IntRange(min=2),
    help="Training steps, run in parallel and again on one device.",
)
@click.option(
    "-o",
    "--out",
    default="graphpar-out",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for plan.json and report.md.",
)
@json_option
def command(steps: int, out: Path, as_json: bool) -> None:
    """Train a small GPT on unlike local workers.

    Plans the model over workers of unlike speed, trains it, trains it again on one device, and
    compares losses and times with the prediction and with an even split. Uses no network.
    """
    with uncollected():
        from graphpar.demo import run_demo
    with stdout_kept_clean(as_json):
        report = run_demo(steps, out)
    if as_json:
        print_json(report)
    else:
        click.echo(str(report))
    if not report.same_numbers:
        raise NumbersDifferError(
            "the parallel losses differ from one device's by more than rounding explains; "
            "`graphpar verify` shows which numbers"
        )
