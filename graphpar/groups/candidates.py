"""Which devices may form a tensor group, in which shapes, and what became of a wish for one."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from math import isclose, prod
from typing import TypeGuard

from graphpar.cluster import Cluster, Device
from graphpar.cost import CostTable
from graphpar.cost_models.rates import CatalogueRates
from graphpar.partition.types import Partition, Replica, TensorWidth

LEAST_GAIN = 0.02
"""With `tensor="auto"` a second axis that cannot save a larger part of a microbatch, the price of memory
included, is not priced."""

_NEARLY = 0.05
"""Shares that differ by a smaller part are not tried apart."""


def candidate_groups(
    cluster: Cluster, widest: int, meshes: Collection[tuple[int, ...]] = ()
) -> list[Replica]:
    """Tensor groups worth a price, inside a node: equal devices in powers of two and in parts of all of
    them, unlike ones with shares by speed, by memory and halfway between.

    Args:
        cluster: The devices.
        widest: Most members of a group.
        meshes: Members along two axes, for groups of these shapes as well, each behind the group of one
            axis of the same devices: of equal devices, or of a whole node with equal devices in each
            row, shares by their speed. Of two shapes that differ in their order alone equal devices
            take one.

    >>> nodes = [{"name": "a", "devices": {"kind": "h100-sxm-80gb", "count": 4}, "link": "nvlink4"}]
    >>> cluster = Cluster.from_dict({"nodes": nodes})
    >>> [group.width for group in candidate_groups(cluster, 4, [(2, 2)])]
    ['2', '4', '2x2']
    """
    found: dict[object, Replica] = {}
    for node in cluster.nodes:
        alike: dict[object, list[Device]] = {}
        for device in node.devices:
            alike.setdefault(likeness(device), []).append(device)
        for devices in alike.values():
            for group in _of_equal(devices, widest, meshes):
                found.setdefault((likeness(devices[0]), group.axes, node.link.cost), group)
        if len(alike) == 1:
            continue
        mixed = [devices[0] for devices in alike.values()]
        for some in (mixed, list(node.devices)):
            for parts in _ways_to_share(some) if len(some) <= widest else ():
                found.setdefault(
                    (tuple(map(likeness, some)), parts, node.link.cost), _replica(some, parts)
                )
        for group in _of_equal_rows(list(alike.values()), len(node.devices), meshes):
            members = tuple(likeness(cluster.device(name)) for name in group.devices)
            found.setdefault((members, group.mesh, node.link.cost), group)
    return list(found.values())


def _of_equal(
    devices: Sequence[Device], widest: int, meshes: Collection[tuple[int, ...]]
) -> Iterator[Replica]:
    """Groups of some of a node's equal devices."""
    widths = _widths(len(devices), widest)
    for width in widths:
        yield _replica(devices[:width], ())
    for mesh in meshes:
        turned, size = mesh[::-1], prod(mesh)
        # Of several shapes those that have a group of one axis to be compared with; one was asked for.
        fits = size in widths if len(meshes) > 1 else size <= len(devices)
        if fits and (mesh <= turned or turned not in meshes):
            yield replace(_replica(devices[:size], ()), mesh=mesh)


def _of_equal_rows(
    kinds: Sequence[Sequence[Device]], count: int, meshes: Collection[tuple[int, ...]]
) -> Iterator[Replica]:
    """Meshes of all the unlike devices of a node, equal ones in each row."""
    for mesh in meshes:
        rows = _equal_rows(kinds, mesh[1])
        if len(rows) == mesh[0] and prod(mesh) == count:
            shares = (s / mesh[1] for s in speed_shares([row[0] for row in rows]) for _ in range(mesh[1]))
            group = _replica([device for row in rows for device in row], tuple(shares))
            yield replace(group, mesh=mesh)


def _widths(count: int, widest: int) -> list[int]:
    """
    >>> _widths(6, 6), _widths(8, 4), _widths(7, 8)
    ([2, 3, 4, 6], [2, 4], [2, 4, 7])
    """
    widths = range(2, min(count, widest) + 1)
    return [width for width in widths if count % width == 0 or width & (width - 1) == 0]


def _ways_to_share(devices: Sequence[Device]) -> list[tuple[float, ...]]:
    """Shares by speed; where memory would be divided otherwise, by that, too, and halfway between."""
    by_speed, whole = speed_shares(devices), sum(device.memory_bytes for device in devices)
    by_memory = tuple(device.memory_bytes / whole for device in devices)
    if all(isclose(a, b, rel_tol=_NEARLY) for a, b in zip(by_speed, by_memory, strict=True)):
        return [by_speed]
    between = tuple((a + b) / 2 for a, b in zip(by_speed, by_memory, strict=True))
    return [by_speed, between, by_memory]


def _equal_rows(kinds: Iterable[Sequence[Device]], width: int) -> list[Sequence[Device]]:
    """Rows of so many equal devices, as many as there are."""
    return [
        devices[first : first + width]
        for devices in kinds
        for first in range(0, len(devices) - width + 1, width)
    ]


def likeness(device: Device) -> object:
    """What equal devices have in common."""
    peaks = tuple(sorted(device.peak_flops_per_s.items()))
    own = (device.kind, device.family, device.is_cpu, device.memory_bytes_per_s, peaks)
    return *own, device.slowdown, device.memory_bytes, device.threads


def _replica(devices: Sequence[Device], shares: tuple[float, ...]) -> Replica:
    first, *others = [device.name for device in devices]
    return Replica(first, 1, tuple(others), shares)


def speed_shares(devices: Sequence[Device]) -> tuple[float, ...]:
    """Shares in proportion to what each device computes per second."""
    speeds = [CatalogueRates(d).peak("float32") / d.slowdown for d in devices]
    return tuple(speed / sum(speeds) for speed in speeds)


def widest_group(cluster: Cluster, tensor: TensorWidth) -> int:
    """The most members that a tensor group may have.

    Raises:
        ValueError: `tensor` is neither "auto", nor a whole number from 1 on, nor two from 2 on.
    """
    most = max(len(node.devices) for node in cluster.nodes)
    if tensor == "auto":
        return most
    wanted = prod(tensor) if _is_mesh(tensor) else tensor
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(
            f"tensor={tensor!r}: give the most members a tensor group may have (1 for none), two numbers "
            "from 2 on for a group of two axes, as (2, 4), or 'auto' for as many as a node has devices."
        )
    if wanted > most:
        fewer = f"more than {most} devices; groups of up to {most} are considered"
        if most == 1:
            fewer = "two devices; there are no groups to be considered"
        warnings.warn(f"tensor={tensor}, but no node has {fewer}.", stacklevel=3)
    return min(wanted, most)


def _is_mesh(tensor: object) -> TypeGuard[tuple[int, int]]:
    return (
        isinstance(tensor, tuple)
        and len(tensor) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 1 for size in tensor)
    )


def meshes_of(tensor: TensorWidth, widest: int) -> tuple[tuple[int, ...], ...]:
    """Members along two axes, for every shape that a group may have.

    Args:
        tensor: What was asked for.
        widest: Most members of a group.

    >>> meshes_of((2, 4), 8), meshes_of("auto", 6), meshes_of(8, 8)
    (((2, 4),), ((2, 2), (2, 3), (3, 2)), ())
    """
    if isinstance(tensor, tuple):
        return (tensor,)
    if tensor != "auto":
        return ()
    return tuple((a, b) for a in range(2, widest // 2 + 1) for b in range(2, widest // a + 1))


def width_notes(
    found: Partition, tensor: TensorWidth, candidates: Sequence[Replica], table: CostTable
) -> tuple[str, ...]:
    """What became of a width that was asked for by number, where a plan's groups are narrower.

    With "auto", which groups of two axes were not priced.

    Args:
        found: The plan.
        tensor: What was asked for.
        candidates: The groups that were considered.
        table: Their prices.
    """
    widest = max((len(replica.devices) for replica in candidates), default=1)
    replicas = [r for p in found.pipelines for s in p.stages for r in s.replicas]
    used = max((len(replica.devices) for replica in replicas), default=1)
    if isinstance(tensor, tuple):
        return _mesh_notes(tensor, replicas, candidates)
    if tensor == "auto":
        return _unpriced_notes(candidates, table)
    if tensor == 1 or used >= widest:
        return ()
    none = "none" if used == 1 else f"none of more than {used}"
    return (
        f"tensor={tensor}: groups of up to {widest} devices were considered; {none} makes the step "
        "shorter or is needed for memory",
    )


def _unpriced_notes(candidates: Sequence[Replica], table: CostTable) -> tuple[str, ...]:
    """Groups of two axes that were left out beside a group of one axis of the same devices."""
    priced = {(mode.members, mode.mesh) for mode in table.modes}
    meshes = {g: tuple(table.class_of[d] for d in g.devices) for g in candidates if g.mesh}
    left_out = dict.fromkeys(
        group.width.replace("x", " x ")
        for group, members in meshes.items()
        if (members, ()) in priced and (members, group.mesh) not in priced
    )
    if not left_out:
        return ()
    return (
        f"tensor groups of {', '.join(left_out)} were not priced: they could save no more than "
        f"{LEAST_GAIN:.0%} of a microbatch, the price of memory included, over groups of one axis of the "
        "same devices, whatever they send; ask for one by its shape, as tensor=(2, 2)",
    )


def _mesh_notes(
    mesh: tuple[int, int], replicas: Sequence[Replica], candidates: Sequence[Replica]
) -> tuple[str, ...]:
    """What became of a wish for two axes."""
    if any(replica.mesh == mesh for replica in replicas):
        return ()
    if not any(replica.mesh == mesh for replica in candidates):
        return (
            f"tensor={mesh}: no node has {mesh[0]} rows of {mesh[1]} equal devices; groups have one axis",
        )
    return (
        f"tensor={mesh}: groups of two axes were considered; none makes the step shorter or is needed "
        "for memory",
    )
