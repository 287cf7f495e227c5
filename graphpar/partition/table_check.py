"""Refuse a cost table that makes no sense, before it makes a plan that makes no sense."""

import math
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np

from graphpar.cost import CostTable, LinkCost, ModeCost, UnitCost
from graphpar.partition.settings import Microbatches


def check_arguments(
    table: CostTable,
    gap: float,
    time_limit_s: float,
    schedule: str,
    microbatches: Microbatches,
) -> None:
    """Refuse what cannot be searched; see `pipeline.partition`.

    Raises:
        ValueError: An argument or the table makes no sense.
    """
    check_table(table)
    if not 0 <= gap < 1:
        raise ValueError(f"gap must be in [0, 1), got {gap}")
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
    if schedule not in ("auto", "gpipe", "1f1b"):
        raise ValueError(f"schedule must be auto, gpipe or 1f1b, got {schedule!r}")
    if microbatches == "auto":
        return
    most = min(table.batch, table.max_microbatches)
    if not isinstance(microbatches, int) or not 1 <= microbatches <= most:
        reason = f" ({table.batch_reason})" if table.batch_reason else ""
        raise ValueError(
            f"microbatches must be 'auto' or between 1 and {most}{reason}, got {microbatches!r}"
        )


def check_table(table: CostTable) -> None:
    """Raise ValueError for the first thing wrong with a table, by name.

    Refused are empty chains and device lists, rows of the wrong length, numbers that are negative or
    not finite, sizes that do not increase, edges that point backwards, devices without a node.
    """
    for problem in _problems(table):
        raise ValueError(f"the cost table is not usable: {problem}")


def _problems(table: CostTable) -> Iterator[str]:
    yield from _shape_problems(table)
    yield from _device_problems(table)
    for cost in table.costs:
        yield from _cost_problems(table, cost)
    yield from _mode_problems(table)
    yield from _edge_problems(table)


def _shape_problems(table: CostTable) -> Iterator[str]:
    if not table.units:
        yield "the chain has no units"
    if not any(c.devices for c in table.device_classes):
        yield "there are no devices"
    if table.batch < 1:
        yield f"the batch has {table.batch} samples; at least one is needed"
    if table.max_microbatches < 1 or table.max_replicas < 1:
        yield "max_microbatches and max_replicas must be at least 1"
    if not table.sizes or table.sizes[0] < 1 or list(table.sizes) != sorted(set(table.sizes)):
        yield f"microbatch sizes must be positive and increase, got {table.sizes}"
    if len(table.unit_names) != len(table.units):
        yield f"{len(table.units)} units have {len(table.unit_names)} names"
    for unit in table.units:
        if not 0 <= unit < len(table.costs):
            yield f"a unit refers to cost {unit} of {len(table.costs)}"
    for again in table.repeated:
        units = again.first, *again.again
        if list(units) != sorted(set(units)) or not 0 <= units[0] <= units[-1] < len(table.units):
            yield f"weights are read by units {units}, which must increase and exist"
        held = [again.weight_bytes, again.gradient_bytes, again.optimizer_bytes]
        yield from _bad_numbers("weights that several units read", {"bytes": held})
    scalars = {"reserved_bytes": [table.reserved_bytes], "sum_s_per_byte": [table.sum_s_per_byte]}
    yield from _bad_numbers("the table", scalars)


def _device_problems(table: CostTable) -> Iterator[str]:
    names = [d for c in table.device_classes for d in c.devices]
    if len(set(names)) != len(names):
        yield "a device name occurs twice"
    for device_class in table.device_classes:
        rows = {
            "memory_bytes": [device_class.memory_bytes],
            "stage_overhead_s": [device_class.stage_overhead_s],
            "update_share": [device_class.update_share],
        }
        yield from _bad_numbers(f"device class {device_class.name}", rows)
    topology = table.topology
    for name in names:
        node = topology.node_of.get(name)
        if node is None:
            yield f"device {name} has no node in the topology"
        elif node not in topology.inside:
            yield f"node {node} of device {name} has no inside link in the topology"
    named = {"network": topology.network}
    named |= {f"inside {node}": link for node, link in topology.inside.items()}
    named |= {f"between {a} and {b}": link for (a, b), link in topology.between.items()}
    for name, link in named.items():
        yield from _link_problems(name, link)
    for (a, b), link in topology.between.items():
        if topology.between.get((b, a), link) != link:
            yield f"the link between {a} and {b} is not the one between {b} and {a}; links go both ways"


def _link_problems(name: str, link: LinkCost) -> Iterator[str]:
    if not (math.isfinite(link.latency_s) and link.latency_s >= 0):
        yield f"link {name} has latency_s {link.latency_s}"
    if not link.bytes_per_s > 0:
        yield f"link {name} has bytes_per_s {link.bytes_per_s}"


def _cost_problems(table: CostTable, cost: UnitCost) -> Iterator[str]:
    where, classes, sizes = f"unit cost {cost.name}", len(table.device_classes), len(table.sizes)
    by_class: dict[str, Sequence[Sequence[float]]] = {
        "forward_s": cost.forward_s,
        "backward_s": cost.backward_s,
    }
    for name in ("saved_by_class", "working_by_class", "deferred_by_class"):
        if rows := getattr(cost, name):
            by_class[name] = rows
    for name, rows in by_class.items():
        if len(rows) != classes or any(len(row) != sizes for row in rows):
            yield f"{where}: {name} must be {classes} device classes by {sizes} sizes"
    by_size = {"saved_bytes": cost.saved_bytes, "working_bytes": cost.working_bytes}
    for name, row in by_size.items():
        if len(row) != sizes:
            yield f"{where}: {name} must have {sizes} sizes"
    if len(cost.weights_by_class) not in (0, classes):
        yield f"{where}: weights_by_class must have {classes} device classes"
    if len(cost.optimizer_s) != classes:
        yield f"{where}: optimizer_s must have {classes} device classes"
    flat: dict[str, Sequence[float]] = {
        name: [value for row in rows for value in row] for name, rows in by_class.items()
    }
    scalars = {
        "weight_bytes": [cost.weight_bytes],
        "gradient_bytes": [cost.gradient_bytes],
        "optimizer_bytes": [cost.optimizer_bytes],
    }
    yield from _bad_numbers(where, {**flat, **by_size, **scalars, "optimizer_s": cost.optimizer_s})


def _mode_problems(table: CostTable) -> Iterator[str]:
    keys = {(k,) for k in range(len(table.device_classes))}
    seen: set[object] = {(key, (), "float32", False, 0, (), 0) for key in keys}
    looked_at: set[tuple[int, int]] = set()
    for number, mode in enumerate(table.modes):
        where, size = f"mode {number}", len(mode.members)
        if not mode.members or not all(0 <= k < len(table.device_classes) for k in mode.members):
            yield f"{where} has members {mode.members} of {len(table.device_classes)} device classes"
        if mode.shares and (len(mode.shares) != size or min(mode.shares) <= 0):
            yield f"{where} has shares {mode.shares} for {size} members"
        if mode.mesh and (len(mode.mesh) != 2 or min(mode.mesh) < 2 or prod(mode.mesh) != size):
            yield f"{where} has a mesh of {mode.mesh} for {size} members"
        if mode.zero not in (0, 1, 2, 3) or (mode.zero and not table.training):
            yield f"{where} has ZeRO level {mode.zero}; 0 to 3 are known, and only 0 in inference"
        if mode.key in seen:
            yield f"{where} is there twice"
        seen.add(mode.key)
        if mode.link is not None:
            yield from _link_problems(f"of {where}", mode.link)
        if len(mode.costs) != len(table.costs):
            yield f"{where} has {len(mode.costs)} costs for {len(table.costs)} units"
        # ZeRO levels share their costs: one look at them is enough.
        for cost in mode.costs if (id(mode.costs), size) not in looked_at else ():
            yield from _mode_cost_problems(table, where, size, cost)
        looked_at.add((id(mode.costs), size))


def _mode_cost_problems(table: CostTable, where: str, size: int, cost: ModeCost) -> Iterator[str]:
    sizes = len(table.sizes)
    if len(cost.forward_s) != sizes or len(cost.backward_s) != sizes:
        yield f"{where}: forward_s and backward_s must have {sizes} sizes"
    rows = [*cost.saved_bytes, *cost.working_bytes]
    fixed = [cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes]
    whole = all(len(row) == size for row in (*fixed, cost.saved_bytes, cost.working_bytes))
    if not whole or any(len(row) != sizes for row in rows):
        yield f"{where}: bytes must be given for {size} members and {sizes} sizes"
    yield from _bad_numbers(
        where,
        {
            "forward_s": cost.forward_s,
            "backward_s": cost.backward_s,
            "optimizer_s": [cost.optimizer_s],
            "bytes": [value for row in (*fixed, *rows) for value in row],
        },
    )


def _edge_problems(table: CostTable) -> Iterator[str]:
    for edge in table.edges:
        where = f"edge {edge.source} -> {edge.target}"
        if not 0 <= edge.source < edge.target < table.num_units:
            yield f"{where} must point forward within {table.num_units} units"
        rows = {
            "bytes_per_sample": [edge.bytes_per_sample],
            "gradient_bytes_per_sample": [edge.gradient_bytes_per_sample],
            "fixed_bytes": [edge.fixed_bytes],
            "gradient_fixed_bytes": [edge.gradient_fixed_bytes],
        }
        yield from _bad_numbers(where, rows)


def _bad_numbers(where: str, rows: Mapping[str, Sequence[float]]) -> Iterator[str]:
    for name, values in rows.items():
        if not values or (min(values) >= 0 and sum(values) < math.inf):
            continue
        # One that is not a number makes the sum none.
        numbers = np.asarray(values, dtype=np.float64)
        wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
        if len(wrong):
            yield f"{where}: {name} holds {values[wrong[0]]}; it must be finite and not negative"
