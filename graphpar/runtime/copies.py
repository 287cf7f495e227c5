"""Which ranks hold which part of a trained parameter, and how its gradient is summed over them.

A replica holds a parameter whole, on one device or on every member of a tensor group, or in slices.
Gradients of replicas add up; within a group they do only where each member has a part of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graphpar.runtime.program import Slice


@dataclass(frozen=True)
class Holding:
    """What one rank holds of one parameter.

    Attributes:
        rank: The rank.
        slice: The slice it holds; None for all of it.
        partial: Whether its gradient is a part, to be added to those of others that hold the same.
        alike: Which of those it is whose gradients are the same; only the first one's counts.
    """

    rank: int
    slice: Slice | None = None
    partial: bool = False
    alike: int = 0


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
    silent = frozenset(h.rank for copy in copies for h in copy if h.alike)
    if len(copies) == 1:
        # Members with the same gradients sum theirs beside one another.
        return _grouped(label, copies, lambda h: (h.slice, h.alike), frozenset())
    if len({tuple(h.slice for h in copy) for copy in copies}) == 1 or not any(
        h.slice for copy in copies for h in copy
    ):
        return _grouped(label, copies, lambda h: h.slice, silent)
    return [Reduction(label, everyone, silent, True)]


def _grouped(
    label: str,
    copies: Sequence[Sequence[Holding]],
    key: Callable[[Holding], object],
    silent: frozenset[int],
) -> list[Reduction]:
    """Sums over those with equal keys, where there are several."""
    groups: dict[object, list[int]] = {}
    for copy in copies:
        for holding in copy:
            groups.setdefault(key(holding), []).append(holding.rank)
    return [
        Reduction(label, tuple(ranks), silent.intersection(ranks), False)
        for ranks in groups.values()
        if len(ranks) > 1
    ]


def owners(copies: Sequence[Sequence[Holding]]) -> tuple[Holding, ...]:
    """Who together holds a tensor once: in the first replica the first with each slice, or with all."""
    found: dict[Slice | None, Holding] = {}
    for holding in copies[0]:
        found.setdefault(holding.slice, holding)
    return tuple(found.values())


def ranks_of(reduced: Mapping[str, Sequence[Reduction]]) -> set[tuple[int, ...]]:
    """All groups that sum."""
    return {r.group for found in reduced.values() for r in found}
