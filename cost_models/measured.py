"""A cost model that corrects the roofline by timing the model's own units on this machine.

Each distinct unit is run at a few microbatch sizes; the ratio of measured to predicted time carries
over to the other sizes. Timings are kept by the unit's structural hash in one file per fingerprint.
"""

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from graphpar.calibration import Fingerprint, cache_path
from graphpar.cluster import Cluster
from graphpar.cost import CostTable, PricingOptions, UnitCost
from graphpar.cost_models.roofline import Roofline
from graphpar.ir.chain import Chain, structural_hash
from graphpar.ir.graph import Graph

RunUnit = Callable[[int, int], tuple[float, float]]
"""Runs a unit of the chain (by index) at a microbatch size; returns forward and backward seconds."""


class UnitTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured seconds of one distinct unit at increasing microbatch sizes."""

    sizes: tuple[int, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]

    def points(self) -> dict[int, tuple[float, float]]:
        """Forward and backward seconds by size."""
        both = zip(self.forward_s, self.backward_s, strict=True)
        return dict(zip(self.sizes, both, strict=True))


@dataclass(frozen=True)
class Measured:
    """Prices with measured unit times on devices of kind `cpu`, with the roofline elsewhere.

    Attributes:
        base: Prices what was not measured, and everything but compute time.
        timings: Measured units by structural hash (see `unit_hash`).
    """

    base: Roofline
    timings: Mapping[str, UnitTiming] = field(default_factory=dict)

    def price(self, graph: Graph, chain: Chain, cluster: Cluster, options: PricingOptions) -> CostTable:
        """Fill the table of seconds and bytes; see `Roofline.price`."""
        table = self.base.price(graph, chain, cluster, options)
        local = [cluster.device(c.devices[0]).is_local_cpu for c in table.device_classes]
        slowdowns = [cluster.device(c.devices[0]).slowdown for c in table.device_classes]
        first = {kind: index for index, kind in reversed(list(enumerate(table.units)))}
        costs = []
        for kind, cost in enumerate(table.costs):
            timing = self.timings.get(unit_hash(graph, chain, first[kind]))
            if timing is not None:
                cost = _corrected(cost, timing, table.sizes, local, slowdowns)
            costs.append(cost)
        return replace(table, costs=tuple(costs))


def unit_hash(graph: Graph, chain: Chain, index: int) -> str:
    """What a unit computes, blind to names and weights."""
    return structural_hash(graph, [graph[name] for name in chain.units[index].ops])


def measure_units(
    graph: Graph,
    chain: Chain,
    run: RunUnit,
    sizes: Iterable[int],
    known: Mapping[str, UnitTiming] | None = None,
) -> dict[str, UnitTiming]:
    """Time each distinct unit that is not known at these sizes.

    Args:
        graph: A captured graph.
        chain: Its units.
        run: Runs one unit; the caller warms up and takes medians.
        sizes: Microbatch sizes to run at.
        known: Timings from before; a unit is measured again only for sizes it lacks.
    """
    wanted = sorted(set(sizes))
    found = dict(known or {})
    seen: set[int] = set()
    for index, unit in enumerate(chain.units):
        if unit.kind in seen:
            continue
        seen.add(unit.kind)
        key = unit_hash(graph, chain, index)
        points = found[key].points() if key in found else {}
        points |= {size: run(index, size) for size in wanted if size not in points}
        ordered = sorted(points.items())
        found[key] = UnitTiming(
            tuple(size for size, _ in ordered),
            tuple(forward for _, (forward, _) in ordered),
            tuple(backward for _, (_, backward) in ordered),
        )
    return found


def load_timings(mine: Fingerprint) -> dict[str, UnitTiming]:
    """Timings kept for this machine; none where there is no readable file."""
    try:
        return msgspec.json.decode(_path(mine).read_bytes(), type=dict[str, UnitTiming])
    except (OSError, msgspec.DecodeError):
        return {}


def save_timings(mine: Fingerprint, timings: Mapping[str, UnitTiming]) -> Path:
    """Keep timings for this machine; the file is replaced in one step."""
    target = _path(mine)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    partial.write_bytes(msgspec.json.encode(dict(sorted(timings.items()))))
    partial.replace(target)
    return target


def _path(mine: Fingerprint) -> Path:
    calibration = cache_path(mine)
    return calibration.with_name(calibration.name.replace("calibration", "units"))


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

    return replace(
        cost,
        forward_s=rows(cost.forward_s, timing.forward_s),
        backward_s=rows(cost.backward_s, timing.backward_s),
    )


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
