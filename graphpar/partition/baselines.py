"""Simple plans to compare with: what people do without a planner."""

from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.handmade import data_parallel, even_split, greedy_split, one_device
from graphpar.partition.pipeline import partition
from graphpar.partition.types import Partition

__all__ = ["best_like_subset", "data_parallel", "even_split", "greedy_split", "one_device"]


def best_like_subset(table: CostTable, *, gap: float = 0.01, time_limit_s: float = 60.0) -> Partition:
    """The best plan that uses devices of one class only.

    Raises:
        InfeasibleError: No class can do it alone.
    """
    found = []
    used = [i for i, c in enumerate(table.device_classes) if c.devices]
    for index in used:
        classes = tuple(
            c if i == index else replace(c, devices=()) for i, c in enumerate(table.device_classes)
        )
        try:
            found.append(
                partition(
                    replace(table, device_classes=classes),
                    gap=gap,
                    time_limit_s=time_limit_s / len(used),
                    explain_s=0.0,
                )
            )
        except InfeasibleError:
            continue
    if not found:
        raise InfeasibleError("no device class can hold the model alone", limit="memory")
    return min(found, key=lambda p: p.objective_s)
