"""One device of each kind is priced, at full speed: what slower ones and other memory cost follows.

Memory changes no time, and a device that is so many times slower takes so many times as long for
everything. So a sweep over either is priced once.
"""

from collections.abc import Sequence
from dataclasses import replace

from graphpar.cluster import Cluster
from graphpar.cost import CostTable, UnitCost
from graphpar.cost_models.classes import device_classes

Rows = tuple[tuple[int, float], ...]
"""For each class of devices its row in the table at full speed, and how many times slower it is."""


def at_full_speed(cluster: Cluster) -> Cluster:
    """The cluster with every device at full speed, and no word of how much memory each has."""
    nodes = (
        replace(n, devices=tuple(replace(d, slowdown=1.0, memory_bytes=0) for d in n.devices))
        for n in cluster.nodes
    )
    return replace(cluster, nodes=tuple(nodes))


def rows_of(cluster: Cluster) -> Rows:
    """Which rows of the table of `at_full_speed` the classes of a cluster take.

    >>> devices = [{"kind": "t4"}, {"kind": "l4"}, {"kind": "t4", "slowdown": 2}]
    >>> rows_of(Cluster.from_dict({"devices": devices}))
    ((0, 1.0), (1, 1.0), (0, 2.0))
    """
    plain = enumerate(device_classes(at_full_speed(cluster)))
    row = {device: number for number, c in plain for device in c.devices}
    firsts = [c.devices[0] for c in device_classes(cluster)]
    return tuple((row[first], cluster.device(first).slowdown) for first in firsts)


def for_devices(table: CostTable, cluster: Cluster) -> CostTable:
    """The table at full speed as that of a cluster: its classes, their memory and their speed."""
    rows = rows_of(cluster)
    own = zip(device_classes(cluster), rows, strict=True)
    classes = tuple(
        replace(
            c,
            stage_overhead_s=table.device_classes[row].stage_overhead_s * slowdown,
            update_share=table.device_classes[row].update_share,
            update_copies=table.device_classes[row].update_copies,
            refills=table.device_classes[row].refills,
        )
        for c, (row, slowdown) in own
    )
    return replace(with_rows(table, rows), device_classes=classes)


def with_rows(table: CostTable, rows: Sequence[tuple[int, float]]) -> CostTable:
    """The table of some rows of another, each so many times slower."""
    rows = tuple(rows)
    if rows == tuple((number, 1.0) for number in range(len(table.device_classes))):
        return table
    return replace(
        table,
        costs=tuple(_of_rows(cost, rows) for cost in table.costs),
        device_classes=tuple(table.device_classes[row] for row, _ in rows),
    )


def _of_rows(cost: UnitCost, rows: Rows) -> UnitCost:
    """What a unit costs on classes of devices."""

    def slower(times: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(s * x for x in times[row]) for row, s in rows) if times else ()

    def held(bytes_by_size: Sequence[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
        return tuple(bytes_by_size[row] for row, _ in rows) if bytes_by_size else ()

    return replace(
        cost,
        forward_s=slower(cost.forward_s),
        backward_s=slower(cost.backward_s),
        optimizer_s=tuple(s * cost.optimizer_s[row] for row, s in rows),
        weight_s=slower(cost.weight_s),
        split_s=slower(cost.split_s),
        again_s=slower(cost.again_s),
        weights_by_class=tuple(cost.weights_by_class[row] for row, _ in rows)
        if cost.weights_by_class
        else (),
        saved_by_class=held(cost.saved_by_class),
        working_by_class=held(cost.working_by_class),
        deferred_by_class=held(cost.deferred_by_class),
    )
