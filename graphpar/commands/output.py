"""How commands write: one JSON value or a page on stdout, everything else on stderr."""

import contextlib
import os
import sys
from collections.abc import Iterator

import click
import msgspec

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON value and nothing else."
)


@contextlib.contextmanager
def stdout_kept_clean(wanted: bool = True) -> Iterator[None]:
    """Send all that anything prints meanwhile to stderr, file descriptor 1 of C libraries included.

    Some solvers print a banner on stdout whatever they are told.
    """
    if not wanted:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def print_json(value: object) -> None:
    """Print one JSON value; NaN and infinity, which JSON has not, become null."""
    click.echo(msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2))
