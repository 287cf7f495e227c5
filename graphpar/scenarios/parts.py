"""Which scenarios of a study are solved together, by which process, and how long each may take."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from graphpar.cluster_build import num_cores
from graphpar.scenarios.pricing import priced_by
from graphpar.scenarios.types import Setting

STUDY_S = 20.0
"""Wall-clock time that the searches of one study may take together where nobody says otherwise."""


LEAST_TOGETHER = 12
"""Settings that differ in their links alone help each other; so many of them at least stay together."""

_Item = TypeVar("_Item")


def alike(missing: Mapping[str, Setting]) -> list[list[tuple[str, Setting]]]:
    """Settings that differ in their links alone, together; every other by itself."""
    groups: dict[str, list[tuple[str, Setting]]] = {}
    for key, setting in missing.items():
        own = (setting.schedule, setting.microbatches, setting.recompute, setting.layout, setting.tensor)
        nodes = [node.name for node in setting.cluster.nodes]
        if setting.tensor != 1:
            # What groups take depends on the links inside nodes.
            nodes += [str(node.link.cost) for node in setting.cluster.nodes]
        alike = f"{priced_by(setting)} {own} {nodes}" if setting.layout is None else key
        groups.setdefault(alike, []).append((key, setting))
    return list(groups.values())


def next_batches(settings: Mapping[str, Setting]) -> dict[str, list[str]]:
    """Of every setting those with the next larger and the next smaller batch, all else being equal."""
    like: dict[str, list[tuple[int, str]]] = {}
    for key, setting in settings.items():
        if setting.layout is None:
            like.setdefault(repr(replace(setting, batch=0)), []).append((setting.batch, key))
    found: dict[str, list[str]] = {}
    for rows in like.values():
        for (small, left), (large, right) in pairwise(sorted(rows)):
            if small != large:
                found.setdefault(left, []).append(right)
                found.setdefault(right, []).append(left)
    return found


def shared_out(groups: Sequence[list[_Item]], processes: int) -> list[list[_Item]]:
    """Groups of many settings cut into one part per process, each with fast links and slow ones.

    >>> shared_out([list(range(5)), ["a"]], 2)
    [[0, 1, 2, 3, 4], ['a']]
    >>> [len(part) for part in shared_out([list(range(100))], 2)]
    [50, 50]
    """
    parts = [min(processes, len(group) // LEAST_TOGETHER) or 1 for group in groups]
    return [group[i::n] for group, n in zip(groups, parts, strict=True) for i in range(n)]


def fair_limit_s(scenarios: int, processes: int | None) -> float:
    """Seconds for each of so many scenarios.

    >>> fair_limit_s(3, 2), fair_limit_s(40, 2), fair_limit_s(1000, 2)
    (10.0, 1.0, 0.3)
    """
    together_s = STUDY_S * (processes if processes is not None else num_cores())
    return min(max(together_s / scenarios, 0.3), 10.0)
