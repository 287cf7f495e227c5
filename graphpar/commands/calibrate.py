"""`graphpar calibrate`."""

import json

import click

from graphpar.calibration import cache_path, fingerprint
from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.files import check_writable
from graphpar.loading import uncollected


@click.command(name="calibrate")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    help="Write the calibration here instead of into the cache.",
)
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Threads a worker computes with.",
)
@json_option
def command(output: str | None, threads: int, as_json: bool) -> None:
    """Measure this machine for better predictions.

    Measures matrix products, memory bandwidth, the local link and what a worker takes for itself, and
    keeps them under this machine's fingerprint for later plans.
    """
    try:
        check_writable(output or cache_path(fingerprint(threads)))
    except ValueError as error:
        kept = "" if output else "; plans look there, unless XDG_CACHE_HOME names another folder"
        raise click.ClickException(f"{error}{kept}") from error
    with uncollected():
        from graphpar.local.measure import measure
    with stdout_kept_clean(as_json):
        calibration = measure(threads, show_progress=True)
        path = calibration.save(output)
    if as_json:
        print_json({"path": str(path), "calibration": json.loads(path.read_bytes())})
    else:
        click.echo(str(calibration))
        click.echo(f"written to {path}")
