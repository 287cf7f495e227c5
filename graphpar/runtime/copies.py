"""Which ranks hold which part of a trained parameter, and how its gradient is summed over them.

A replica holds a parameter whole, on one device or on every member of a tensor group, or in slices.
Gradients of replicas add up; within a group they do only where each member has a part of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphpar.runtime.program import Slice


@dataclass(frozen=True)
class Holding:
    """What one rank holds of one parameter: all of it, or a slice; and whether its gradient is a part."""

    rank: int
    slice: Slice | None = None
    partial: bool = False


@dataclass(frozen=True)
class Reduction:
    """One parameter summed over a group of ranks.

    Attributes:
        label: The parameter.
        group: The ranks that sum.
        silent: Those whose gradient is the same as another's: they add zeros.
        spread: Whether the ranks hold unlike slices, so that whole tensors are summed.
    """

    label: str
    group: tuple[int, ...]
    silent: frozenset[int]
    spread: bool


def reductions(label: str, copies: Sequence[Sequence[Holding]]) -> list[Reduction]:
    """How a parameter's gradient is summed.

    Args:
        label: The parameter.
        copies: For each replica that holds it what its members hold.

    >>> one = [Holding(0)], [Holding(1)]
    >>> reductions("w", one)
    [Reduction(label='w', group=(0, 1), silent=frozenset(), spread=False)]
    """
    everyone = tuple(h.rank for copy in copies for h in copy)
    if len(everyone) < 2:
        return []
    silent = frozenset(
        h.rank
        for copy in copies
        for h in copy[1:]
        if h.slice is None and not (h.partial and copy[0].partial)
    )
    if len(copies) == 1:
        parts = copies[0][0].slice is None and copies[0][0].partial
        return [Reduction(label, everyone, frozenset(), False)] if parts else []
    if all(h.slice is None for copy in copies for h in copy):
        return [Reduction(label, everyone, silent, False)]
    if len({_kind(copy) for copy in copies}) == 1:
        return [
            Reduction(label, tuple(h.rank for h in alike), frozenset(), False)
            for alike in zip(*copies, strict=True)
        ]
    return [Reduction(label, everyone, silent, True)]


def _kind(copy: Sequence[Holding]) -> tuple[object, ...]:
    """Equal for replicas whose members in equal places hold equal slices."""
    return tuple((h.slice.dim, h.slice.counts, h.slice.inner) if h.slice else None for h in copy)


def owners(copies: Sequence[Sequence[Holding]]) -> tuple[Holding, ...]:
    """Who together holds a tensor once: the first replica, of whole copies its first member."""
    first = copies[0]
    return tuple(first) if first[0].slice is not None else (first[0],)


def ranks_of(reduced: Mapping[str, Sequence[Reduction]]) -> set[tuple[int, ...]]:
    """All groups that sum."""
    return {r.group for found in reduced.values() for r in found}
