"""Time the model's own units on this machine's processor, a moment before they are planned with.

The captured model runs on the example batch in a worker, forward and backward, at a few microbatch
sizes: as a whole, which gives the level, and unit by unit, which tells how it divides. So every unit is
timed where it stands in the model, behind and before the units that it will share caches and memory
with.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from statistics import mean, median

from graphpar.calibration import fingerprint
from graphpar.cluster_build import num_cores
from graphpar.cost import CostTable
from graphpar.cost_models.measured import (
    ModelTiming,
    UnitTiming,
    load_timing,
    save_timing,
    unit_hash,
)
from graphpar.errors import GraphparError
from graphpar.neighbours import reference_s, slowing_by, up_to
from graphpar.plans import hash_of
from graphpar.preparation import Prepared
from graphpar.runtime.passes import Spent
from graphpar.trial_worker import TrialModel, TrialWorker

_log = logging.getLogger("graphpar.timing")

ROUNDS = 3
"""Passes that are counted, after one that warms up."""


def timed(
    model: TrialModel, model_hash: str, table: CostTable, budget_s: float, others: Sequence[float]
) -> ModelTiming | None:
    """What is kept of this model, as long as the machine is as fast as it was then; else timed anew."""
    mine = fingerprint(model.threads)
    key = hash_of([model_hash, table.sizes, table.training, list(others)])
    kept = load_timing(mine, key)
    if kept is not None and abs(reference_s() / kept.reference_s - 1) <= _STEADY:
        return kept
    fresh = time_model(model, table, budget_s, others)
    if fresh is not None:
        with contextlib.suppress(OSError):  # what cannot be kept is measured again
            save_timing(mine, key, fresh)
    return fresh


_STEADY = 0.03
"""Timings are used again while a reference kernel takes what it took beside them, within this share."""


def time_model(
    model: TrialModel, table: CostTable, budget_s: float, others: Sequence[float]
) -> ModelTiming | None:
    """Seconds of every distinct unit at a few microbatch sizes, and what cores at work cost them.

    Args:
        model: Runs the model.
        table: Predicted seconds on this machine's processor, which say what fits into the budget.
        budget_s: What may be spent; a model of which one sample takes too long is not timed.
        others: By what the other workers on this machine would be slowed down.
    """
    sizes = _affordable(table, budget_s)
    if not sizes:
        return None
    try:
        with model.worker() as worker:
            speed_s = reference_s()
            rows = {size: _at_size(worker, size) for size in sizes}
            return ModelTiming(
                units=_by_hash(model.prepared, rows),
                slowing=_slowing(model, worker, sizes[len(sizes) // 2], others),
                reference_s=speed_s,
                optimizer_s=_update_s(worker, sizes[0], budget_s) if table.training else 0.0,
                split_s=_split_s(worker, sizes[len(sizes) // 2]) if table.training else 0.0,
            )
    except GraphparError as error:
        _log.warning("The model's units could not be timed, so that curves stand for them: %s", error)
        return None


def _affordable(table: CostTable, budget_s: float) -> list[int]:
    """Microbatch sizes far apart, from the largest that half of the budget is enough for.

    Each is passed through `PASSES` times; smaller ones get what is left.
    """
    found: list[int] = []
    left_s = budget_s
    for size in reversed(table.sizes):
        cost_s = PASSES * _predicted_s(table, size)
        apart = not found or size * _APART <= found[-1] or size == table.sizes[0]
        if apart and cost_s <= (left_s if found else budget_s / 2):
            found.append(size)
            left_s -= cost_s
    return sorted(found)


PASSES = 4 + 2 * ROUNDS
"""Passes at a size: two to warm up, and as many again on average to find what neighbours cost."""
_APART = 3


def _predicted_s(table: CostTable, size: int) -> float:
    local = min(range(len(table.device_classes)), key=lambda k: table.costs[0].forward_s[k][0])
    units = range(table.num_units)
    return sum(table.forward_s(u, local, size) + table.backward_s(u, local, size) for u in units)


def _at_size(worker: TrialWorker, size: int) -> Spent:
    """Every unit's share of what the whole model takes."""
    worker.whole(size), worker.by_unit(size)
    wholes, passes = [], []
    for _ in range(ROUNDS):
        wholes.append(worker.whole(size))
        passes.append(worker.by_unit(size))
    columns: list[list[float]] = []
    for direction in (0, 1):
        level_s = mean(whole[direction] for whole in wholes)
        each_s = [median(p[unit][direction] for p in passes) for unit in range(len(passes[0]))]
        total_s = sum(each_s)
        columns.append([t * level_s / total_s if total_s > 0 else 0.0 for t in each_s])
    return list(zip(*columns, strict=True))


def _by_hash(prepared: Prepared, rows: Mapping[int, Spent]) -> dict[str, UnitTiming]:
    """Timings of distinct units: of each kind the median over all that are alike."""
    graph, chain = prepared.graph, prepared.chain
    kinds: dict[str, list[int]] = {}
    for unit in range(len(chain.units)):
        kinds.setdefault(unit_hash(graph, chain, unit), []).append(unit)

    def times(alike: Sequence[int], direction: int) -> tuple[float, ...]:
        return tuple(median(row[unit][direction] for unit in alike) for row in rows.values())

    return {key: UnitTiming(tuple(rows), times(k, 0), times(k, 1)) for key, k in kinds.items()}


def _split_s(worker: TrialWorker, size: int) -> float:
    """What halves take more than whole backwards; taken in turn with those."""
    worker.in_halves(size)
    more = [worker.in_halves(size) - sum(worker.whole(size)) for _ in range(ROUNDS)]
    return max(mean(more), 0.0)


def _update_s(worker: TrialWorker, size: int, budget_s: float) -> float:
    """Mean seconds of the optimiser; its first step, which makes its state, counts if alone."""
    times: list[float] = []
    while len(times) <= ROUNDS and sum(times) < budget_s:
        worker.whole(size)
        times.append(worker.update())
    return mean(times[1:] or times)


def _slowing(
    model: TrialModel, worker: TrialWorker, size: int, others: Sequence[float]
) -> tuple[float, ...]:
    """What others that run the same model cost it; empty where it would be alone."""
    cores = num_cores()
    beside = sorted(others)[:MOST_TWINS]
    load = min(sum(1 / slowdown for slowdown in beside), cores - 1)
    if load <= 0 or model.threads > 1:
        return ()
    with model.twins(beside, size) as pids:
        factor = slowing_by(pids, lambda: sum(worker.whole(size)))
    return up_to(cores, 1.0 + (factor - 1.0) * (cores - 1) / load)


MOST_TWINS = 3
"""More neighbours than this are not started to find what they cost."""
