"""Time the model's own units on this machine's processor, a moment before they are planned with.

The captured model runs on the example batch in a worker, forward and backward, at a few microbatch
sizes: as a whole, which gives the level, and unit by unit, which tells how it divides. So every unit is
timed where it stands in the model, behind and before the units that it will share caches and memory
with.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from graphpar.cluster_build import num_cores
from graphpar.cost import CostTable
from graphpar.cost_models.measured import (
    Halves,
    ModelTiming,
    Pause,
    UnitTiming,
    unit_hash,
)
from graphpar.errors import GraphparError
from graphpar.local.kept import TOO_LONG, NotTimedError, kept_or_fresh
from graphpar.local.trial_worker import MOST_TWINS, TrialModel, TrialWorker
from graphpar.neighbours import reference_s, slowing_by, up_to
from graphpar.plans.plan import hash_of
from graphpar.preparation import Prepared
from graphpar.runtime.passes import Spent

_log = logging.getLogger("graphpar.schedule.timing")

ROUNDS = 3
"""Passes that are counted, after one that warms up."""


def timed(
    model: TrialModel,
    model_hash: str,
    table: CostTable,
    budget_s: float,
    slowdowns: Sequence[float],
    at_once: bool = False,
) -> ModelTiming:
    """What is kept of this model, as long as the machine is as fast as it was then; else timed anew.

    Raises:
        NotTimedError: It could not be timed.
    """
    key = hash_of([*model.key(model_hash), table.sizes, list(slowdowns), budget_s, at_once, _VERSION])
    return kept_or_fresh(
        model.threads, key, ModelTiming, lambda: time_model(model, table, budget_s, slowdowns, at_once)
    )


_VERSION = 8
"""Of what is timed and how; what was kept of another one is timed anew."""


def time_model(
    model: TrialModel,
    table: CostTable,
    budget_s: float,
    slowdowns: Sequence[float],
    at_once: bool = False,
) -> ModelTiming:
    """Seconds of every distinct unit at a few microbatch sizes, and what cores at work cost them.

    Args:
        model: Runs the model.
        table: Predicted seconds on this machine's processor, which say what fits into the budget.
        budget_s: What may be spent; a model of which one sample takes too long is not timed.
        slowdowns: By what the workers on this machine would be slowed down, in increasing order.
        at_once: Whether every backward of a plan will follow on its own forward, and whole, as on one
            device.

    Raises:
        NotTimedError: It fails, or one sample takes too long.
    """
    sizes = _affordable(table, budget_s)
    try:
        with model.worker() as worker:
            speed_s = reference_s()
            sampled = {size: _at_size(worker, size) for size in sizes}
            stage_s = sampled[sizes[0]].stage_s
            middle = sizes[len(sizes) // 2]
            return ModelTiming(
                units=_by_hash(model.prepared, {n: s.without(stage_s) for n, s in sampled.items()}),
                stage_s=stage_s,
                slowing=_slowing(model, worker, middle, slowdowns),
                reference_s=speed_s,
                optimizer_s=_update_s(worker, sizes[0], budget_s) if table.training else 0.0,
                pauses=_pauses(
                    model, worker, table, [s for s in sizes if s <= middle], slowdowns, budget_s
                ),
                apart=_apart(worker, middle, slowdowns[0]) if table.training and not at_once else 1.0,
                halves=_halves(worker, sizes) if table.training and not at_once else None,
            )
    except GraphparError as error:
        _log.warning("The model's units could not be timed, so that curves stand for them: %s", error)
        raise NotTimedError("timing them failed") from error


def time_gpu(model: TrialModel, table: CostTable, budget_s: float) -> ModelTiming:
    """Seconds of every distinct unit on a GPU that nobody else uses, in the model's number format.

    Args:
        model: Runs the model, on a GPU.
        table: What the cost model says of this GPU.
        budget_s: What may be spent.

    Raises:
        NotTimedError: It fails, or one sample takes too long.
    """
    sizes = _affordable(table, budget_s)
    try:
        with model.worker() as worker:
            worker.whole(sizes[-1])  # libraries choose and load their kernels when first called
            sampled = {size: _at_size(worker, size) for size in sizes}
            stage_s = sampled[sizes[0]].stage_s
            return ModelTiming(
                units=_by_hash(model.prepared, {n: s.without(stage_s) for n, s in sampled.items()}),
                stage_s=stage_s,
                slowing=(),
                reference_s=0.0,
                optimizer_s=_update_s(worker, sizes[0], budget_s) if table.training else 0.0,
                halves=_halves(worker, sizes) if table.training else None,
                precision=model.precision,
            )
    except GraphparError as error:
        _log.warning(
            "The model could not be timed on %s, so that curves stand for it: %s", model.device, error
        )
        raise NotTimedError("timing them failed") from error


def _affordable(table: CostTable, budget_s: float) -> list[int]:
    """Microbatch sizes far apart, from the largest that half of the budget is enough for.

    Each is passed through `PASSES` times; smaller ones get what is left.

    Raises:
        NotTimedError: Not even the smallest size takes so little.
    """
    found: list[int] = []
    left_s = budget_s
    for size in reversed(table.sizes):
        cost_s = PASSES * _predicted_s(table, size)
        apart = not found or size * _APART <= found[-1] or size == table.sizes[0]
        if apart and cost_s <= (left_s if found else budget_s / 2):
            found.append(size)
            left_s -= cost_s
    if not found:
        raise NotTimedError(TOO_LONG.format(budget_s))
    return sorted(found)


PASSES = 4 + 2 * ROUNDS
"""Passes at a size: two to warm up, and as many again on average to find what neighbours cost."""
_APART = 3


def _predicted_s(table: CostTable, size: int) -> float:
    local = min(range(len(table.device_classes)), key=lambda k: table.costs[0].forward_s[k][0])
    units = range(table.num_units)
    return sum(table.forward_s(u, local, size) + table.backward_s(u, local, size) for u in units)


@dataclass(frozen=True)
class _Sampled:
    """Seconds forward and backward at one size, of the model as one stage and of units as stages."""

    wholes_s: tuple[float, float]
    units_s: Spent

    @property
    def stage_s(self) -> float:
        """What a stage costs beside its ops, in one direction: units as stages pay it every time."""
        more_s = sum(map(sum, self.units_s)) - sum(self.wholes_s)
        directions = sum(1 for whole_s in self.wholes_s if whole_s > 0)
        return max(more_s, 0.0) / (directions * (len(self.units_s) - 1)) if len(self.units_s) > 1 else 0.0

    def without(self, stage_s: float) -> Spent:
        """Every unit's share of what the whole model takes but for what its one stage costs."""
        columns = []
        for whole_s, each_s in zip(self.wholes_s, zip(*self.units_s, strict=True), strict=True):
            total_s = sum(each_s)
            level_s = max(whole_s - stage_s, whole_s / 2)
            columns.append([t * level_s / total_s if total_s > 0 else 0.0 for t in each_s])
        return list(zip(*columns, strict=True))


def _at_size(worker: TrialWorker, size: int) -> _Sampled:
    """The model as a whole and unit by unit, in turn."""
    worker.whole(size), worker.by_unit(size)
    wholes, passes = [], []
    for _ in range(ROUNDS):
        wholes.append(worker.whole(size))
        passes.append(worker.by_unit(size))
    forward_s, backward_s = (mean(column) for column in zip(*wholes, strict=True))
    units_s: Spent = [
        (median(p[unit][0] for p in passes), median(p[unit][1] for p in passes))
        for unit in range(len(passes[0]))
    ]
    return _Sampled((forward_s, backward_s), units_s)


def _by_hash(prepared: Prepared, rows: Mapping[int, Spent]) -> dict[str, UnitTiming]:
    """Timings of distinct units: of each kind the median over all that are alike."""
    graph, chain = prepared.graph, prepared.chain
    kinds: dict[str, list[int]] = {}
    for unit in range(len(chain.units)):
        kinds.setdefault(unit_hash(graph, chain, unit), []).append(unit)

    def times(alike: Sequence[int], direction: int) -> tuple[float, ...]:
        return tuple(median(row[unit][direction] for unit in alike) for row in rows.values())

    return {key: UnitTiming(tuple(rows), times(k, 0), times(k, 1)) for key, k in kinds.items()}


def _halves(worker: TrialWorker, sizes: Sequence[int]) -> Halves:
    """Whole backwards and those in halves at the middle one of some sizes and the largest."""
    some = sorted({sizes[len(sizes) // 2], sizes[-1]})
    shares, more_s = zip(*(_halves_at(worker, size) for size in some), strict=True)
    return Halves(tuple(some), shares, more_s)


def _halves_at(worker: TrialWorker, size: int) -> tuple[float, float]:
    """The second half's share of a whole backward, and what both take more, forwards included.

    Both are taken in turn, each with two microbatches in flight: schedules leave gradients of weights for
    when the microbatches behind are through, so that what they read has left the caches.
    """
    worker.in_halves(size, 2)
    shares, more_s = [], []
    for _ in range(ROUNDS):
        forward_s, backward_s = worker.whole(size, in_flight=2)
        ahead_s, inputs_s, weights_s = worker.in_halves(size, 2)
        shares.append(weights_s / max(backward_s, 1e-9))
        more_s.append(ahead_s + inputs_s + weights_s - forward_s - backward_s)
    return median(shares), max(median(more_s), 0.0)


def _apart(worker: TrialWorker, size: int, slowdown: float) -> float:
    """How many times longer backwards take when other forwards came between; in turn with those at once.

    What a forward has saved has left the caches then.
    """
    ratios = [
        worker.whole(size, slowdown, IN_FLIGHT)[1] / max(worker.whole(size, slowdown)[1], 1e-9)
        for _ in range(ROUNDS)
    ]
    return max(median(ratios), 1.0)


IN_FLIGHT = 3


def _update_s(worker: TrialWorker, size: int, budget_s: float) -> float:
    """Mean seconds of the optimiser, and what the pass after it takes longer, its caches swept.

    The first step, which makes the optimiser's state, counts if alone.
    """
    times: list[float] = []
    after: list[float] = []
    while len(times) <= ROUNDS and sum(times) < budget_s:
        before_s = sum(worker.whole(size))
        times.append(worker.update())
        after.append(sum(worker.whole(size)) - before_s)
    return mean(times[1:] or times) + max(median(after[1:] or after), 0.0)


def _pauses(
    model: TrialModel,
    worker: TrialWorker,
    table: CostTable,
    sizes: Sequence[int],
    slowdowns: Sequence[float],
    budget_s: float,
) -> tuple[Pause, ...]:
    """What waiting costs, from passes with pauses after every unit and after the whole model.

    The largest size is taken that the budget is enough for; without one nothing is said.
    """
    distinct = [s for s in dict.fromkeys(slowdowns) if s > 1]
    passes = 2 * ROUNDS * (1 + sum(distinct))
    fitting = [size for size in sizes if passes * _predicted_s(table, size) <= budget_s]
    if not distinct or not fitting or model.threads > 1:
        return ()
    times: dict[tuple[float, bool], list[float]] = {}
    for _ in range(ROUNDS):
        for slowdown in (1.0, *distinct):
            whole_s = sum(worker.whole(fitting[-1], slowdown))
            units_s = sum(map(sum, worker.by_unit(fitting[-1], slowdown)))
            times.setdefault((slowdown, True), []).append(whole_s)
            times.setdefault((slowdown, False), []).append(units_s)
    typical = {key: median(values) for key, values in times.items()}
    directions = 2 if table.training else 1
    return tuple(_pause(typical, slowdown, directions, table.num_units) for slowdown in distinct)


def _pause(
    times: Mapping[tuple[float, bool], float], slowdown: float, directions: int, units: int
) -> Pause:
    """Waits after many actions and after few tell what each costs and what all work loses."""
    few_s, many_s = (times[slowdown, whole] - times[1.0, whole] for whole in (True, False))
    action_s = max(many_s - few_s, 0.0) / (directions * max(units - 1, 1))
    lost_s = max(few_s - directions * action_s, 0.0)
    return Pause(slowdown, action_s, 1.0 + lost_s / times[1.0, True])


def _slowing(
    model: TrialModel, worker: TrialWorker, size: int, slowdowns: Sequence[float]
) -> tuple[float, ...]:
    """What others that run the same model cost the fastest worker; empty where it would be alone."""
    cores = num_cores()
    own, *beside = slowdowns[: 1 + MOST_TWINS]
    load = min(sum(1 / slowdown for slowdown in beside), cores - 1)
    if load <= 0 or model.threads > 1:
        return ()
    with model.twins(beside, size) as pids:
        factor = slowing_by(pids, lambda: sum(worker.whole(size, own)))
    return up_to(cores, 1.0 + (factor - 1.0) * (cores - 1) / load)
