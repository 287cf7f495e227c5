"""`graphpar estimate MODEL`."""

from collections.abc import Sequence

import click

from graphpar.commands.options import input_options, model_argument
from graphpar.commands.output import json_option, print_json, stdout_kept_clean
from graphpar.errors import CaptureError
from graphpar.loading import uncollected


@click.command(name="estimate")
@model_argument
@click.option("--kind", multiple=True, help="Only these device kinds of the catalogue.")
@input_options
@json_option
def command(
    model: str, kind: Sequence[str], batch_size: int, seq_len: int, train: bool, as_json: bool
) -> None:
    """Tell what memory a model needs, and on what it fits.

    Memory by part for each number format with and without recomputation, and how many devices of
    each kind of the catalogue are needed at least.
    """
    with uncollected():
        from graphpar.commands.training import default_training
        from graphpar.model_spec import load_model
        from graphpar.preparation import prepare
        from graphpar.scenarios.estimate import (
            accelerators,
            as_plain,
            estimate,
            format_estimates,
            in_bfloat16,
        )
    with stdout_kept_clean():
        kinds = accelerators(kind)
        loaded = load_model(model, batch_size=batch_size, seq_len=seq_len, train=train, weights=False)
        training = default_training() if train else None
        prepared = prepare(loaded.model, loaded.args, loaded.kwargs, training)
        half, lacking = None, ""
        try:
            half = in_bfloat16(loaded.model, loaded.args, loaded.kwargs, training)
        except CaptureError as error:
            lacking = f"bfloat16 is left out: the model does not run in it: {error}"
        found = estimate(prepared, training, kinds, half)
    whole = prepared.batch_reason or prepared.in_step_reason
    if as_json:
        print_json(
            {
                "model": prepared.graph.name,
                "estimates": as_plain(found),
                "notes": [note for note in (whole, lacking) if note],
            }
        )
        return
    mode = "training with AdamW" if train else "inference"
    click.echo(format_estimates(prepared.graph.name, mode, found, whole))
    if lacking:
        click.echo(lacking)
