"""An independent judge of placements: loads, latency and every rule, from the problem alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from graphpar.partition.problems import NodeId, PlacementProblem

Objective: TypeAlias = Literal["throughput", "latency"]

MEMORY_TOLERANCE = 1e-12
"""Relative excess of a sum of sizes over a memory limit that is rounding."""


@dataclass(frozen=True)
class PlacementVerdict:
    """The value of an answer under one objective, and everything that is wrong with it."""

    value: float | None
    errors: tuple[str, ...]

    @property
    def feasible(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors


def check_placement(
    problem: PlacementProblem, answer: Mapping[NodeId, int], objective: Objective
) -> PlacementVerdict:
    """Judge an answer: device 0 is the CPUs, 1 to k the accelerators.

    *throughput* is the load of the busiest device. An accelerator's load is its compute plus, for
    every output that enters or leaves it, that output's transfer once; the CPUs' load is their
    compute. The forward part of every device must be contiguous: no path leaves and comes back.
    *latency* is the finishing time of one sample. A CPU operator starts when its inputs are ready; an
    accelerator starts when all inputs of its set are ready and finishes all of it, transfers
    included, at once. Accelerator sets must be contiguous and must not wait for one another in a
    circle.
    """
    devices: list[int] = []
    for op in problem.operators:
        device = answer.get(op.node_id)
        if device is None or not 0 <= device <= problem.num_accelerators:
            return PlacementVerdict(None, (f"node {op.node_id!r} is on device {device!r}",))
        devices.append(device)
    errors = [*_local_errors(problem, devices)]
    errors += _contiguity_errors(problem, devices, objective)
    loads = _loads(problem, devices)
    if objective == "throughput":
        return PlacementVerdict(max(loads.values(), default=0.0), tuple(errors))
    finish = _finish(problem, devices, loads)
    if finish is None:
        errors.append("accelerators wait for one another in a circle")
    return PlacementVerdict(finish, tuple(errors))


def _local_errors(problem: PlacementProblem, devices: list[int]) -> list[str]:
    errors, colours = [], dict[str, int]()
    sizes = dict.fromkeys(sorted(set(devices)), 0.0)
    for op, device in zip(problem.operators, devices, strict=True):
        sizes[device] += op.size
        if device and not op.on_accelerator:
            errors.append(f"node {op.node_id!r} cannot run on an accelerator")
        if not device and not problem.num_cpus:
            errors.append(f"node {op.node_id!r} is on the CPUs, but there are none")
        if colours.setdefault(op.colour, device) != device:
            errors.append(f"colour class {op.colour} is split")
    for device, size in sizes.items():
        if device and size > problem.memory_limit * (1 + MEMORY_TOLERANCE):
            errors.append(f"device {device} holds {size}, above {problem.memory_limit}")
    return errors


def _contiguity_errors(problem: PlacementProblem, devices: list[int], objective: Objective) -> list[str]:
    forward_only = objective == "throughput"
    kept = [not (forward_only and op.backward) for op in problem.operators]
    after: list[list[int]] = [[] for _ in devices]
    for edge in problem.transfers:
        if kept[edge.source] and kept[edge.target]:
            after[edge.source].append(edge.target)
    errors = []
    for device in sorted(set(devices) if forward_only else set(devices) - {0}):
        inside = [kept[v] and devices[v] == device for v in range(len(devices))]
        waiting = [w for v, own in enumerate(inside) if own for w in after[v] if not inside[w]]
        seen = set(waiting)
        while waiting:
            for w in after[waiting.pop()]:
                if inside[w]:
                    errors.append(f"device {device} is not contiguous")
                    waiting.clear()
                    break
                if w not in seen:
                    seen.add(w)
                    waiting.append(w)
    return errors


def _loads(problem: PlacementProblem, devices: list[int]) -> dict[int, float]:
    loads = dict.fromkeys(devices, 0.0)
    for op, device in zip(problem.operators, devices, strict=True):
        loads[device] += op.accelerator_latency if device else op.cpu_latency
    moved: dict[tuple[int, int], float] = {}
    for edge in problem.transfers:
        if devices[edge.source] != devices[edge.target]:
            for end in (edge.source, edge.target):
                moved[edge.source, devices[end]] = edge.cost
    for (_, device), cost in moved.items():
        if device:
            loads[device] += cost
    return loads


def _finish(problem: PlacementProblem, devices: list[int], loads: Mapping[int, float]) -> float | None:
    """When the last unit ends; a unit is one CPU operator or one whole accelerator."""
    count = len(devices)
    unit = [v if device == 0 else count + device for v, device in enumerate(devices)]
    length = {u: problem.operators[u].cpu_latency if u < count else loads[u - count] for u in unit}
    after: dict[int, set[int]] = {u: set() for u in unit}
    for edge in problem.transfers:
        if unit[edge.source] != unit[edge.target]:
            after[unit[edge.source]].add(unit[edge.target])
    missing = dict.fromkeys(after, 0)
    for targets in after.values():
        for u in targets:
            missing[u] += 1
    start = dict.fromkeys(after, 0.0)
    ready = [u for u, number in missing.items() if not number]
    done, latest = 0, 0.0
    while ready:
        u = ready.pop()
        done += 1
        end = start[u] + length[u]
        latest = max(latest, end)
        for w in after[u]:
            start[w] = max(start[w], end)
            missing[w] -= 1
            if not missing[w]:
                ready.append(w)
    return latest if done == len(after) else None
