"""The roofline corrected by timing the model's own units on this machine.

Each distinct unit is run at a few microbatch sizes; the ratio of measured to predicted time carries
over to the other sizes. Timings (`graphpar.local.unit_timing` takes them) are kept by the unit's
structural hash, in one file per machine and model; those of a plan's stages
(`graphpar.local.stage_timing`), one per plan.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import structs

from graphpar.calibration import Fingerprint, cache_path
from graphpar.cluster import Cluster
from graphpar.cores import SharedCores
from graphpar.cost import CostTable, UnitCost
from graphpar.device import LOCAL_KIND
from graphpar.ir.chain import Chain, structural_hash
from graphpar.ir.graph import Graph
from graphpar.kept_files import read_kept, write_kept

Kept = TypeVar("Kept", bound=msgspec.Struct)
"""What may be kept of a timing: of a model's units, or of a plan's stages."""


class UnitTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured seconds of one distinct unit at increasing microbatch sizes."""

    sizes: tuple[int, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]


class Pause(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What waiting costs the work after it: a core that slept, or served others, has lost its caches.

    Attributes:
        slowdown: How many times slower the worker is, by waiting after every action.
        action_s: What each action takes more whatever its work.
        longer: How many times longer its work takes besides.
    """

    slowdown: float
    action_s: float
    longer: float


class Halves(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A backward in two halves beside a whole one.

    Attributes:
        sizes: Microbatch sizes that were timed, increasing. Shares differ: gradients of weights are as
            large whatever the microbatch.
        weights_share: By size, seconds of the second half over those of the whole backward.
        more_s: By size, what forward and both halves take more than forward and backward, for the whole
            model.
    """

    sizes: tuple[int, ...]
    weights_share: tuple[float, ...]
    more_s: tuple[float, ...]


class ModelTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Units of one model as they were timed at a moment.

    Attributes:
        units: By structural hash.
        slowing: How many times longer they took with 1, 2, ... cores at work; empty where not measured.
        reference_s: What the reference took at that moment: the machine's speed.
        optimizer_s: What the optimiser took for all parameters; 0 where nothing is trained.
        halves: What backwards in two halves took; None where nothing is trained.
        pauses: What waiting costs workers that are slowed down, by their slowdown.
        stage_s: What a stage costs beside its ops, per microbatch and direction.
        apart: How many times longer a backward takes that does not follow on its own forward.
        precision: The number format that the units computed in.
    """

    units: dict[str, UnitTiming]
    slowing: tuple[float, ...]
    reference_s: float
    optimizer_s: float = 0.0
    halves: Halves | None = None
    pauses: tuple[Pause, ...] = ()
    stage_s: float = 0.0
    apart: float = 1.0
    precision: str = "float32"


class StageSeconds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one microbatch costs a stage on a device: processor seconds, pauses not counted.

    Attributes:
        stage: Its number among the stages of all pipelines.
        slowdown: By what the device is slowed down, so that it waits after every action.
        size: Samples of the microbatch.
        forward_s: Seconds of the forward.
        backward_s: Seconds of the backward; 0 where nothing is trained.
    """

    stage: int
    slowdown: float
    size: int
    forward_s: float
    backward_s: float


class StageTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The stages of one plan as they were timed at a moment.

    Attributes:
        rows: One for every stage and slowdown that could be tried.
        update: How many times longer the optimiser takes after a wait, beside others', than at once.
        reference_s: What the reference took at that moment: the machine's speed.
        threads: Of the worker that was timed.
        beside: Cores that others kept at work while stages were timed.
        update_beside: Cores that others kept at work while updates were timed.
        left_out: Why some pipelines were not passed through; empty where all were.
    """

    rows: tuple[StageSeconds, ...]
    update: float
    reference_s: float
    threads: int = 1
    beside: float = 0.0
    update_beside: float = 0.0
    left_out: str = ""

    def of(self, stage: int, slowdown: float) -> StageSeconds | None:
        """What was measured of a stage on such a device; None where it was not tried."""
        return next((r for r in self.rows if r.stage == stage and r.slowdown == slowdown), None)

    def as_alone(self, shared: SharedCores | None) -> "StageTiming":
        """What would have been measured without others, by what cores at work cost each other.

        The simulator adds what others cost each action, from seconds of workers that have the cores to
        themselves; it must not be counted twice.
        """
        if shared is None:
            return self
        longer = shared.longer_beside(self.beside, self.threads)
        rows = tuple(
            structs.replace(row, forward_s=row.forward_s / longer, backward_s=row.backward_s / longer)
            for row in self.rows
        )
        update = self.update / shared.longer_beside(self.update_beside, self.threads)
        return structs.replace(self, rows=rows, update=max(update, 1.0), beside=0.0, update_beside=0.0)


def with_timing(
    table: CostTable,
    graph: Graph,
    chain: Chain,
    cluster: Cluster,
    timing: ModelTiming,
    kind: str = LOCAL_KIND,
) -> CostTable:
    """The table with measured times on one kind of device; others keep theirs.

    Args:
        table: Priced by `Roofline`, for the graph in the formats that were timed.
        graph: The captured graph.
        chain: Its units.
        cluster: The devices.
        timing: What was measured of units of this model.
        kind: The kind of the devices; those of this machine's processor share its cores.
    """
    local = [cluster.device(c.devices[0]).kind == kind for c in table.device_classes]
    slowdowns = [cluster.device(c.devices[0]).slowdown for c in table.device_classes]
    first = {number: index for index, number in reversed(list(enumerate(table.units)))}
    costs = []
    pauses = [_pause(timing, slowdown) for slowdown in slowdowns]
    longer = [slowdown * pause.longer for slowdown, pause in zip(slowdowns, pauses, strict=True)]
    for number, cost in enumerate(table.costs):
        unit = timing.units.get(unit_hash(graph, chain, first[number]))
        costs.append(_corrected(cost, unit, table.sizes, local, longer) if unit is not None else cost)
    costs = _divided(table, costs, "optimizer_s", timing.optimizer_s, local, slowdowns)
    if timing.halves is not None:
        costs = _in_halves(table, costs, timing.halves, local, slowdowns)
    shared = table.shared
    if shared is not None and kind == LOCAL_KIND:
        slowing = timing.slowing or shared.slowing
        shared = replace(shared, slowing=slowing, reference_s=timing.reference_s, apart=timing.apart)
    classes = tuple(
        replace(
            c,
            stage_overhead_s=max(c.stage_overhead_s, timing.stage_s * pause.slowdown)
            + pause.action_s * pause.slowdown,
        )
        if here
        else c
        for c, here, pause in zip(table.device_classes, local, pauses, strict=True)
    )
    return replace(table, costs=tuple(costs), shared=shared, device_classes=classes)


def _pause(timing: ModelTiming, slowdown: float) -> Pause:
    """What waiting costs at a slowdown; nothing where it was not measured."""
    return next((p for p in timing.pauses if p.slowdown == slowdown), Pause(slowdown, 0.0, 1.0))


def unit_hash(graph: Graph, chain: Chain, index: int) -> str:
    """What a unit computes, blind to names and weights."""
    return structural_hash(graph, [graph[name] for name in chain.units[index].ops])


def load_timing(mine: Fingerprint, key: str, kind: type[Kept]) -> Kept | None:
    """What is kept under a hash for this machine; None where there is no readable file."""
    found = read_kept(_path(mine, key))
    try:
        return None if found is None else msgspec.json.decode(found, type=kind)
    except msgspec.DecodeError:
        return None


def save_timing(mine: Fingerprint, key: str, timing: msgspec.Struct) -> Path:
    """Keep a timing for this machine, and of all timings those that were used last."""
    target = _path(mine, key)
    write_kept(target, msgspec.json.encode(timing, order="sorted"), _KIND)
    return target


_KIND = r"units-[0-9a-f]{16}-[0-9a-f]{24}\.json"


def _path(mine: Fingerprint, key: str) -> Path:
    return cache_path(mine).with_name(f"units-{mine.key}-{key[:24]}.json")


def _corrected(
    cost: UnitCost,
    timing: UnitTiming,
    sizes: Sequence[int],
    local: Sequence[bool],
    slowdowns: Sequence[float],
) -> UnitCost:
    def rows(
        predicted: tuple[tuple[float, ...], ...], measured: tuple[float, ...]
    ) -> tuple[tuple[float, ...], ...]:
        return tuple(
            _row(row, timing.sizes, measured, sizes, slowdown) if is_local else row
            for row, is_local, slowdown in zip(predicted, local, slowdowns, strict=True)
        )

    backward_s = rows(cost.backward_s, timing.backward_s)
    forward_s = rows(cost.forward_s, timing.forward_s)
    return replace(
        cost,
        forward_s=forward_s,
        backward_s=backward_s,
        weight_s=_same_part(cost.weight_s, cost.backward_s, backward_s),
        again_s=_same_part(cost.again_s, cost.forward_s, forward_s),
    )


def _same_part(
    part: tuple[tuple[float, ...], ...],
    predicted: tuple[tuple[float, ...], ...],
    measured: tuple[tuple[float, ...], ...],
) -> tuple[tuple[float, ...], ...]:
    """What may be made later, or again, stays the same part of what was measured."""
    return tuple(
        tuple(p * new / old if old > 0 else p for p, old, new in zip(*rows, strict=True))
        for rows in zip(part, predicted, measured, strict=False)
    )


def _divided(
    table: CostTable,
    costs: Sequence[UnitCost],
    name: str,
    measured_s: float,
    local: Sequence[bool],
    slowdowns: Sequence[float],
) -> list[UnitCost]:
    """Each unit's predicted share of what was measured for all of them."""
    found = list(costs)
    for k, (is_local, slowdown) in enumerate(zip(local, slowdowns, strict=True)):
        rows = [getattr(cost, name) for cost in costs]
        predicted_s = sum(rows[kind][k] for kind in table.units if rows[kind])
        if not is_local or not measured_s or not predicted_s:
            continue
        ratio = measured_s * slowdown / predicted_s
        for kind, cost in enumerate(found):
            row: tuple[float, ...] = getattr(cost, name)
            more: dict[str, Any] = {name: (*row[:k], row[k] * ratio, *row[k + 1 :])} if row else {}
            found[kind] = replace(cost, **more)
    return found


def _in_halves(
    table: CostTable,
    costs: Sequence[UnitCost],
    halves: Halves,
    local: Sequence[bool],
    slowdowns: Sequence[float],
) -> list[UnitCost]:
    """Second halves, and what both take more, as measured at sizes; divided among units as predicted."""
    found = list(costs)
    for k in (k for k, is_local in enumerate(local) if is_local):
        backward_s, weight_s, split_s = (
            [
                sum(row[k][at] for kind in table.units if (row := getattr(costs[kind], name)))
                for at, _ in enumerate(table.sizes)
            ]
            for name in ("backward_s", "weight_s", "split_s")
        )
        if min(weight_s) <= 0:
            continue
        later = [
            _interpolated(halves.sizes, halves.weights_share, size) * whole / part
            for size, whole, part in zip(table.sizes, backward_s, weight_s, strict=True)
        ]
        more = [
            slowdowns[k] * _more_s(halves, size) / part if part else 0.0
            for size, part in zip(table.sizes, split_s, strict=True)
        ]
        for kind, cost in enumerate(found):
            if cost.weight_s:
                # Not more than the backward has: what is left of it makes gradients of inputs.
                times = zip(cost.weight_s[k], later, cost.backward_s[k], strict=True)
                own = tuple(min(w * ratio, b) for w, ratio, b in times)
                split = tuple(s * ratio for s, ratio in zip(cost.split_s[k], more, strict=True))
                found[kind] = replace(
                    cost,
                    weight_s=(*cost.weight_s[:k], own, *cost.weight_s[k + 1 :]),
                    split_s=(*cost.split_s[:k], split, *cost.split_s[k + 1 :]),
                )
    return found


def _more_s(halves: Halves, size: int) -> float:
    """What halving takes at a size: flat below those timed, where calls are what it costs."""
    last = halves.sizes[-1]
    if size > last:
        return halves.more_s[-1] * size / last
    return float(np.interp(size, halves.sizes, halves.more_s))


def _row(
    predicted: Sequence[float],
    at: Sequence[int],
    measured: Sequence[float],
    sizes: Sequence[int],
    slowdown: float,
) -> tuple[float, ...]:
    """A row of predictions times the ratio that was measured, interpolated between sizes."""
    if not any(measured):
        return tuple(predicted)
    ratios = [
        m * slowdown / max(_interpolated(sizes, predicted, size), 1e-12)
        for size, m in zip(at, measured, strict=True)
    ]
    return tuple(p * _interpolated(at, ratios, s) for p, s in zip(predicted, sizes, strict=True))


def _interpolated(points: Sequence[int], values: Sequence[float], size: float) -> float:
    """Linear in the logarithm of the size, flat outside."""
    if size <= points[0]:
        return values[0]
    if size >= points[-1]:
        return values[-1]
    right = bisect_left(points, size)
    low, high = points[right - 1], points[right]
    share = math.log(size / low) / math.log(high / low)
    return values[right - 1] * (1 - share) + values[right] * share
