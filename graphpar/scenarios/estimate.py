"""Will it fit, and on what: memory by part for each number format and recomputation choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphpar import catalogue
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.cost_models.memory import GPU_MESSAGE_BYTES
from graphpar.frontend.torch_private import flatten, unflatten
from graphpar.planner import price
from graphpar.precision.formats import uniform_formats
from graphpar.preparation import Prepared, prepare
from graphpar.scenarios.layouts import recomputed
from graphpar.training import Training
from graphpar.units import format_bytes

MOST_DEVICES = 64

FORMATS = ("float32", "bfloat16 mixed", "bfloat16")
"""Mixed computes in bfloat16 and keeps weights, gradients and optimiser in float32, and lower copies of
the weights beside them. The last is the model converted to bfloat16, captured as such: what it computes
in float32 by itself (norms, often) stays so, and so do numbers that are none of floating point."""

LACKING = "*"
"""Marks kinds of devices that lack one of the formats."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one way to hold the model; activations are those of the smallest microbatch.

    That is one sample, or the whole batch where it cannot be split (`samples`).

    `update_bytes` is what the optimiser's update needs besides on a GPU, where torch updates all tensors
    together unless told otherwise (`foreach`): for Adam a value for every gradient. Activations and
    workspace are gone by then.
    `devices` says for each device kind how many of them a pipeline needs at least (0: more than
    `MOST_DEVICES`), with such microbatches and one replica of each stage, under 1F1B.
    """

    format: str
    recompute: bool
    samples: int
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


def estimate(
    prepared: Prepared, train: Training | None, kinds: Sequence[str], half: Prepared | None = None
) -> list[MemoryEstimate]:
    """Every number format with and without recomputation, for these device kinds.

    Args:
        prepared: The model in float32.
        train: How it trains; None for inference.
        kinds: Device kinds of the catalogue.
        half: The model converted to bfloat16, as `in_bfloat16` prepares it; without it that format is
            left out.
    """
    found = []
    for name in FORMATS if half is not None else FORMATS[:2]:
        table = _table(half if half is not None and name == FORMATS[2] else prepared, train, name)
        found.append(_estimate(table, name, False, kinds))
        if train is not None:
            found.append(_estimate(recomputed(table), name, True, kinds))
    return found


def in_bfloat16(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], train: Training | None
) -> Prepared:
    """The model converted to bfloat16, inputs of floating point too. It is converted in place.

    Raises:
        CaptureError: It does not run in bfloat16.
    """
    leaves, spec = flatten((tuple(args), dict(kwargs)))
    floating = (isinstance(x, torch.Tensor) and x.is_floating_point() for x in leaves)
    lower = [x.to(torch.bfloat16) if f else x for x, f in zip(leaves, floating, strict=True)]
    args, kwargs = unflatten(lower, spec)
    return prepare(model.to(torch.bfloat16), args, kwargs, train)


def _table(prepared: Prepared, train: Training | None, name: str) -> CostTable:
    cluster = Cluster.from_dict({"nodes": [{"name": "a", "devices": {"kind": "a100-sxm-80gb"}}]})
    # As plans price it: mixed formats keep a second, lower copy of the weights.
    mixed = name == FORMATS[1]
    formats = uniform_formats(cluster, "bfloat16" if mixed else "float32", len(prepared.chain.units))
    return price(prepared, cluster, train=train, calibration=None, formats=formats)


def _place(table: CostTable) -> int:
    """Where the smallest microbatch of one pipeline stands among the table's sizes."""
    return 0 if table.max_microbatches > 1 else len(table.sizes) - 1


def _estimate(table: CostTable, name: str, recompute: bool, kinds: Sequence[str]) -> MemoryEstimate:
    costs, size = [table.costs[u] for u in table.units], _place(table)
    devices = catalogue.devices()
    gradients = sum(c.gradient_bytes for c in costs)
    return MemoryEstimate(
        format=name,
        recompute=recompute,
        samples=table.sizes[size],
        weights_bytes=sum(c.weight_bytes for c in costs),
        gradients_bytes=gradients,
        optimizer_bytes=sum(c.optimizer_bytes for c in costs),
        activations_bytes=sum(c.saved_bytes[size] for c in costs) if table.training else 0.0,
        workspace_bytes=max(c.working_bytes[size] for c in costs),
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
    has as many as there are stages, or in the batch.
    """
    for stages in range(1, min(MOST_DEVICES, table.num_units) + 1):
        if _fits(table, capacity, stages):
            return stages
    return 0


def _fits(table: CostTable, capacity: float, stages: int) -> bool:
    share, last, size = _update_share(table), table.num_units, _place(table)
    reserved = table.reserved_bytes + (GPU_MESSAGE_BYTES if stages > 1 else 0.0)
    for stage in range(1, stages + 1):
        end, held, saved, working, update = last, reserved, 0.0, 0.0, 0.0
        in_flight = min(stage, table.batch // table.sizes[size]) if table.training else 0
        for unit in reversed(range(end)):
            cost = table.costs[table.units[unit]]
            held += cost.weight_bytes + cost.gradient_bytes + cost.optimizer_bytes
            saved += in_flight * cost.saved_bytes[size]
            working, update = max(working, cost.working_bytes[size]), update + share * cost.gradient_bytes
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


def format_estimates(name: str, mode: str, found: Sequence[MemoryEstimate], why_whole: str = "") -> str:
    """Two tables: bytes by part, and how many devices of each kind are enough.

    Args:
        name: The model.
        mode: Training or inference, in words.
        found: What to show.
        why_whole: Why the batch cannot be split.
    """
    samples = found[0].samples
    sizes = "one sample at a time" if samples == 1 else f"all {samples} samples at once"
    head = ("format", "recompute", *PARTS)
    rows = [
        (
            e.format,
            "yes" if e.recompute else "no",
            *(format_bytes(getattr(e, f"{p}_bytes")) for p in PARTS),
        )
        for e in found
    ]
    lines = [f"memory of {name} on one device, {mode}, {sizes}", *_aligned([head, *rows])]
    lines += [f"the batch cannot be split: {why_whole}"] if why_whole else []
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
        "devices needed at least, as stages of a pipeline "
        + ("with one sample per microbatch" if samples == 1 else "that the whole batch passes at once"),
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
