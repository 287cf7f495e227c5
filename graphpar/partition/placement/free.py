"""Where to put operators that the contiguity rule leaves free: one colour class at a time."""

import math
from collections.abc import Callable, Mapping, Sequence

from graphpar.partition.placement.check import check_placement
from graphpar.partition.problems import NodeId, PlacementProblem


def value_of(problem: PlacementProblem, placement: Mapping[NodeId, int]) -> float:
    """Load of the busiest device, infinite where a rule is broken."""
    verdict = check_placement(problem, placement, "throughput")
    return verdict.value if verdict.feasible and verdict.value is not None else math.inf


def improve_free(
    problem: PlacementProblem,
    placement: dict[NodeId, int],
    free: Sequence[int],
    should_stop: Callable[[], bool],
) -> dict[NodeId, int]:
    """Move free colour classes to better devices until no single move helps.

    A class counts as free if all its operators are among `free`.
    """
    classes: dict[str, list[NodeId]] = {}
    for v in free:
        classes.setdefault(problem.operators[v].colour, []).append(problem.operators[v].node_id)
    best, value = dict(placement), value_of(problem, placement)
    improved = True
    while improved and not should_stop():
        improved = False
        for members in classes.values():
            for device in range(problem.num_accelerators + 1):
                moved = best | dict.fromkeys(members, device)
                if (found := value_of(problem, moved)) < value:
                    best, value, improved = moved, found, True
    return best
