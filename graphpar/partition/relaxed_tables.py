"""The same table with one thing relaxed: options that stages lack, the batch, what the update takes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from graphpar.cost import CostTable, Mode, ModeCost, UnitCost

CostT = TypeVar("CostT", UnitCost, ModeCost)

_BY_SIZE = (
    "forward_s", "backward_s", "saved_bytes", "working_bytes", "weight_s", "split_s", "deferred_bytes",
    "growing_bytes", "saved_by_class", "working_by_class", "deferred_by_class",
)  # fmt: skip
"""Fields of costs that are indexed by microbatch size; the last four of units alone."""


def with_options(table: CostTable, *, recompute: bool, zero: int) -> CostTable:
    """The table with recomputation, a ZeRO level, or both together, besides what every mode has."""
    entering, _ = crossing_bytes(table)
    known, found = {mode.key for mode in table.every_mode}, []
    for mode in table.every_mode:
        changed = recomputed(table, mode, entering) if recompute and not mode.recompute else mode
        changed = divided(table, changed, zero) if zero > changed.zero else changed
        if changed.key not in known:
            known.add(changed.key)
            found.append(changed)
    return replace(table, modes=(*table.modes, *found))


def divided(table: CostTable, way: Mode, level: int) -> Mode:
    """A mode at a ZeRO level.

    From level 2 on gradients of weights that several units read are there whole, beside those of the unit
    that backward is in. What has too few rows to be divided counts to the weights.
    """
    nothing = (0.0,) * len(way.costs)
    passing = (table.passing_gradient_bytes if level > 1 else ()) or nothing
    whole = table.few_row_bytes or nothing
    if not any(passing) and not any(whole):
        return replace(way, zero=level)
    costs = map(_divided_cost, way.costs, passing, whole, (level,) * len(way.costs))
    return replace(way, zero=level, costs=tuple(costs))


def _divided_cost(cost: ModeCost, passing: float, whole: float, level: int) -> ModeCost:
    """A unit's cost with gradients that pass through it, and what stays whole put to the weights."""
    working = tuple(tuple(w + passing for w in row) for row in cost.working_bytes)
    weights, gradients, state = [], [], []
    for held, summed, kept in zip(
        cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, strict=True
    ):
        share = min(1.0, whole / summed) if summed else 0.0
        divided = 1.0 - share
        weights.append(held + share * (kept + (summed if level > 1 else 0.0)))
        gradients.append(summed * (divided if level > 1 else 1.0))
        state.append(kept * divided)
    return replace(
        cost,
        working_bytes=working,
        weight_bytes=tuple(weights),
        gradient_bytes=tuple(gradients),
        optimizer_bytes=tuple(state),
    )


def with_small_updates(table: CostTable) -> CostTable:
    """The table for an optimiser whose update takes nothing besides what it updates."""
    classes = tuple(replace(c, update_share=0.0) for c in table.device_classes)
    return replace(table, device_classes=classes)


def with_batch(table: CostTable, batch: int) -> CostTable:
    """The table for a smaller batch, its rows interpolated at the new size."""
    sizes = (*(s for s in table.sizes if s < batch), batch)
    if table.max_microbatches == 1:
        sizes = (batch,)

    def resized(values: Any) -> Any:
        """A row by size, or rows of them, at the new sizes."""
        if values and isinstance(values[0], tuple):
            return tuple(map(resized, values))
        return tuple(table.at_size(values, s) for s in sizes) if values else values

    def at_sizes(cost: CostT) -> CostT:
        return replace(cost, **{n: resized(getattr(cost, n)) for n in _BY_SIZE if hasattr(cost, n)})

    costs = tuple(map(at_sizes, table.costs))
    modes = tuple(replace(m, costs=tuple(map(at_sizes, m.costs))) for m in table.modes)
    return replace(
        table,
        batch=batch,
        sizes=sizes,
        costs=costs,
        modes=modes,
        max_microbatches=min(table.max_microbatches, batch),
        max_replicas=min(table.max_replicas, batch),
    )


def crossing_bytes(table: CostTable) -> tuple[list[list[float]], list[list[float]]]:
    """[distinct unit][size]: the most bytes that enter one of its kind, and that leave one."""
    entering = [[0.0] * len(table.sizes) for _ in table.costs]
    leaving = [[0.0] * len(table.sizes) for _ in table.costs]
    for position, size in enumerate(table.sizes):
        cuts = [table.cut_bytes(b, size)[0] for b in range(table.num_units + 1)]
        for unit, kind in enumerate(table.units):
            entering[kind][position] = max(entering[kind][position], cuts[unit])
            leaving[kind][position] = max(leaving[kind][position], cuts[unit + 1])
    return entering, leaving


def recomputed(table: CostTable, mode: Mode, entering: Sequence[Sequence[float]]) -> Mode:
    """The same mode keeping only what enters a unit; `entering` as `crossing_bytes` says it."""
    return replace(
        mode,
        recompute=True,
        costs=tuple(_recomputed_cost(c, e) for c, e in zip(mode.costs, entering, strict=True)),
    )


def _recomputed_cost(cost: ModeCost, entering: Sequence[float]) -> ModeCost:
    kept = tuple(tuple(map(min, row, entering)) for row in cost.saved_bytes)
    working = tuple(
        tuple(w + s - k for w, s, k in zip(*rows, strict=True))
        for rows in zip(cost.working_bytes, cost.saved_bytes, kept, strict=True)
    )
    again = cost.again_s or cost.forward_s
    backward = tuple(a + b for a, b in zip(again, cost.backward_s, strict=True))
    sent = cost.collective_s
    if cost.collective_again_s:
        sent = tuple(a + b for a, b in zip(sent, cost.collective_again_s, strict=True))
    # What is computed again lives inside one backward: no gradients of it come later.
    return replace(
        cost,
        backward_s=backward,
        saved_bytes=kept,
        working_bytes=working,
        weight_s=(),
        deferred_bytes=(),
        split_s=(),
        again_s=(),
        collective_s=sent,
        collective_again_s=(),
    )
