"""Will it fit, and on what: memory by part for each number format and recomputation choice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphpar import catalogue
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.planner import price
from graphpar.precision import uniform_formats
from graphpar.preparation import Prepared
from graphpar.scenarios.layouts import recomputed
from graphpar.training import Training
from graphpar.units import format_bytes

MOST_DEVICES = 64

FORMATS = ("float32", "bfloat16 mixed", "bfloat16")
"""Mixed computes in bfloat16 and keeps weights, gradients and optimiser in float32, and lower copies of
the weights beside them."""

LACKING = "*"
"""Marks kinds of devices that lack one of the formats."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one way to hold the model; activations are those of one sample.

    `update_bytes` is what the optimiser's update needs besides on a GPU, where torch updates all tensors
    together unless told otherwise (`foreach`): for Adam a value for every gradient. Activations and
    workspace are gone by then.
    `devices` says for each device kind how many of them a pipeline needs at least (0: more than
    `MOST_DEVICES`), with one sample per microbatch.
    """

    format: str
    recompute: bool
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    workspace_bytes: float
    update_bytes: float
    framework_bytes: float
    devices: dict[str, int]

    @property
    def total_bytes(self) -> float:
        """The peak on one device: in backward or in the update, whichever needs more."""
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.framework_bytes
        return held + max(self.activations_bytes + self.workspace_bytes, self.update_bytes)


def estimate(prepared: Prepared, train: Training | None, kinds: Sequence[str]) -> list[MemoryEstimate]:
    """Every number format with and without recomputation, for these device kinds."""
    found = []
    for name in FORMATS:
        table = _table(prepared, train, name)
        found.append(_estimate(table, name, False, kinds))
        if train is not None:
            found.append(_estimate(recomputed(table), name, True, kinds))
    return found


def _table(prepared: Prepared, train: Training | None, name: str) -> CostTable:
    cluster = Cluster.from_dict({"nodes": [{"name": "a", "devices": {"kind": "a100-sxm-80gb"}}]})
    if name != "bfloat16":
        # As plans price it: lower formats keep a second, lower copy of the weights.
        formats = uniform_formats(cluster, name.split()[0], len(prepared.chain.units))
        return price(prepared, cluster, train=train, calibration=None, formats=formats)
    table = price(prepared, cluster, train=train, precision=name, calibration=None)
    costs = tuple(
        replace(
            c,
            weight_bytes=c.weight_bytes / 2,
            gradient_bytes=c.gradient_bytes / 2,
            optimizer_bytes=c.optimizer_bytes / 2,
        )
        for c in table.costs
    )
    return replace(table, costs=costs)


def _estimate(table: CostTable, name: str, recompute: bool, kinds: Sequence[str]) -> MemoryEstimate:
    costs = [table.costs[u] for u in table.units]
    devices = catalogue.devices()
    gradients = sum(c.gradient_bytes for c in costs)
    return MemoryEstimate(
        format=name,
        recompute=recompute,
        weights_bytes=sum(c.weight_bytes for c in costs),
        gradients_bytes=gradients,
        optimizer_bytes=sum(c.optimizer_bytes for c in costs),
        activations_bytes=sum(c.saved_bytes[0] for c in costs) if table.training else 0.0,
        workspace_bytes=max(c.working_bytes[0] for c in costs),
        update_bytes=_update_share(table) * gradients,
        framework_bytes=table.reserved_bytes,
        devices={kind: _fewest(table, devices[kind].memory_bytes) for kind in kinds},
    )


def _update_share(table: CostTable) -> float:
    """What the update takes per byte of gradients."""
    return table.device_classes[0].update_per_gradient(zero=0, width=1) if table.training else 0.0


def _fewest(table: CostTable, capacity: float) -> int:
    """The least number of stages such that every one fits; 0 beyond `MOST_DEVICES`.

    Stages are filled greedily from the last, which has one microbatch in flight, to the first, which
    has as many as there are stages.
    """
    for stages in range(1, min(MOST_DEVICES, table.num_units) + 1):
        if _fits(table, capacity, stages):
            return stages
    return 0


def _fits(table: CostTable, capacity: float, stages: int) -> bool:
    share, last = _update_share(table), table.num_units
    for stage in range(1, stages + 1):
        end, held, saved, working, update = last, table.reserved_bytes, 0.0, 0.0, 0.0
        for unit in reversed(range(end)):
            cost = table.costs[table.units[unit]]
            held += cost.weight_bytes + cost.gradient_bytes + cost.optimizer_bytes
            saved += stage * cost.saved_bytes[0] if table.training else 0.0
            working, update = max(working, cost.working_bytes[0]), update + share * cost.gradient_bytes
            # Of weights that an earlier stage counts this one has copies of its own.
            again = [r for r in table.repeated if r.held_by(unit, end)]
            copies = sum(r.weight_bytes + r.gradient_bytes + r.optimizer_bytes for r in again)
            update_of_copies = share * sum(r.gradient_bytes for r in again)
            if held + copies + max(saved + working, update + update_of_copies) > capacity:
                break
            last = unit
    return last == 0


def accelerators(words: Sequence[str] = ()) -> list[str]:
    """Device kinds of the catalogue that are no processors; all, or those named.

    Raises:
        ClusterError: A name is unknown.
    """
    if words:
        return [catalogue.find_device(word) for word in words]
    return [name for name, kind in catalogue.devices().items() if not kind.is_cpu]


TOTAL = "total: with activations and workspace, or with the update, whichever is more; never both at once"

PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "update", "framework", "total")


def format_estimates(name: str, samples: str, found: Sequence[MemoryEstimate]) -> str:
    """Two tables: bytes by part, and how many devices of each kind are enough."""
    head = ("format", "recompute", *PARTS)
    rows = [
        (
            e.format,
            "yes" if e.recompute else "no",
            *(format_bytes(getattr(e, f"{p}_bytes")) for p in PARTS),
        )
        for e in found
    ]
    lines = [f"memory of {name} on one device, {samples}", *_aligned([head, *rows])]
    lines += [TOTAL, ""] if any(e.update_bytes for e in found) else [""]
    choices = [e.format + (" +rc" if e.recompute else "") for e in found]
    kinds = list(found[0].devices)
    devices = catalogue.devices()
    lacking = {k for k in kinds if "bfloat16" not in devices[k].peak_flops_per_s}
    table = [
        ("device kind", "memory", *choices),
        *(
            (
                kind + (LACKING if kind in lacking else ""),
                format_bytes(devices[kind].memory_bytes),
                *(str(e.devices[kind] or "-") for e in found),
            )
            for kind in sorted(kinds, key=lambda k: -devices[k].memory_bytes)
        ),
    ]
    lines += [
        "devices needed at least, as stages of a pipeline, one sample per microbatch",
        *_aligned(table),
    ]
    lines.append("mixed: arithmetic and activations in bfloat16, the rest float32; +rc: recomputation")
    if lacking:
        lines.append(
            f"{LACKING} the catalogue knows no rate of bfloat16 there: its columns say what would fit; "
            "plans keep such a device in float32"
        )
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_plain(found: Sequence[MemoryEstimate]) -> list[dict[str, Any]]:
    """Plain data for JSON."""
    return [{**vars(e), "total_bytes": e.total_bytes} for e in found]
