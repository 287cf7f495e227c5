"""Fold repeated units: 32 alike blocks become one block with a count."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from graphpar.view.model import ViewBlock

_NUMBER = re.compile(r"\d+")


def fold_units(units: Sequence[str], first: int, last: int) -> tuple[ViewBlock, ...]:
    """Blocks of units `first` to `last - 1`; neighbouring blocks of one pattern become one.

    A block is a run of units whose names are equal up to their first number (`h.3 1/2`, `h.3 2/2`).

    >>> [(b.label, b.count) for b in fold_units(["embed", "h.0", "h.1", "h.2", "head"], 0, 5)]
    [('embed', 1), ('h.0 .. h.2', 3), ('head', 1)]
    """
    runs = [list(run) for _, run in groupby(range(first, last), key=lambda u: _block_name(units[u]))]
    return tuple(_fold(units, runs))


def _fold(units: Sequence[str], runs: Sequence[Sequence[int]]) -> Iterator[ViewBlock]:
    for _, group in groupby(runs, key=lambda run: tuple(_pattern(units[u]) for u in run)):
        alike = list(group)
        names = _block_name(units[alike[0][0]]), _block_name(units[alike[-1][0]])
        label = names[0] if len(alike) == 1 else f"{names[0]} .. {names[1]}"
        yield ViewBlock(label, len(alike), alike[0][0], alike[-1][-1] + 1)


def _block_name(unit: str) -> str:
    """`h.3 1/2` and `h.3.mlp` belong to block `h.3`."""
    number = _NUMBER.search(unit)
    return unit[: number.end()] if number else unit


def _pattern(unit: str) -> str:
    """The name without the block's number: units of equal pattern are drawn as one."""
    return _NUMBER.sub("#", unit, count=1)
