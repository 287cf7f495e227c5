"""Which number format runs where: from what is asked for and what the devices have."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.device import Device
from graphpar.errors import ClusterError
from graphpar.ir.chain import Chain, extended
from graphpar.ir.formats import EIGHT_BITS, FORMATS, base_format
from graphpar.ir.graph import Graph
from graphpar.partition.types import Partition, StageChoice
from graphpar.passes.casts import AssignFormats, InsertCasts
from graphpar.rewrite import Pipeline
from graphpar.units import format_rate

PRECISIONS = (*FORMATS, "auto")
"""What `precision=` may be."""

_SHORT = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32",
    "fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "mixed": "auto",
}  # fmt: skip
UnitFormats = tuple[str, ...]
"""The format of each unit of the chain."""


def check_precision(precision: str) -> None:
    """Make sure that there is such a precision.

    Raises:
        ValueError: There is not.

    >>> check_precision("bf16")
    Traceback (most recent call last):
    ...
    ValueError: Unknown precision 'bf16'; known are float32, bfloat16, float16, float8_e4m3fn, auto. \
Did you mean 'bfloat16'?
    """
    if precision in PRECISIONS:
        return
    near = difflib.get_close_matches(str(precision), PRECISIONS, n=1, cutoff=0.5)
    meant = _SHORT.get(str(precision).lower(), near[0] if near else "")
    raise ValueError(
        f"Unknown precision {precision!r}; known are {', '.join(PRECISIONS)}."
        + (f" Did you mean {meant!r}?" if meant else "")
    )


@dataclass(frozen=True)
class Formats:
    """The format of every unit on every device, and what there is to say about it."""

    by_device: Mapping[str, UnitFormats]
    notes: tuple[str, ...] = ()

    def all_in(self, devices: Iterable[str], precision: str) -> bool:
        """Whether these devices compute everything in one format."""
        chosen = (self.by_device.get(name, ("float32",)) for name in devices)
        return all(f == precision for formats in chosen for f in formats)


def formats_of(device: Device) -> tuple[str, ...]:
    """The formats that a device can compute in, float32 first.

    This machine's CPU computes in all of them, how fast, the calibration tells; 8 bits it emulates.

    >>> formats_of(Cluster.from_dict({"devices": [{"kind": "v100-sxm2-32gb"}]}).devices[0])
    ('float32', 'float16')
    """
    if device.is_local_cpu:
        return FORMATS
    return tuple(f for f in FORMATS if f == "float32" or f in device.peak_flops_per_s)


def uniform_formats(cluster: Cluster, precision: str, num_units: int) -> Formats:
    """One format for all units, on every device that has it; the others stay in float32.

    Raises:
        ClusterError: No device has the format.
    """
    if precision == "float32":
        return Formats({})
    having = {d.name for d in cluster.devices if precision in formats_of(d)}
    if not having:
        kinds = {d.kind: ", ".join(formats_of(d)) for d in cluster.devices}
        told = "; ".join(f"{kind} has {formats}" for kind, formats in kinds.items())
        raise ClusterError(
            f"precision={precision!r}: no device of the cluster computes in it ({told}). "
            "Ask for a format that one of them has, or for 'float32'."
        )
    lacking = [d for d in cluster.devices if d.name not in having]
    notes: tuple[str, ...] = ()
    if lacking:
        kinds_without = ", ".join(dict.fromkeys(d.kind for d in lacking))
        notes = (
            f"{kinds_without} cannot compute in {precision}: stages on {_names(lacking)} stay in float32",
        )
    return Formats(dict.fromkeys(having, (precision,) * num_units), notes)


def slow_format_notes(
    cluster: Cluster, precision: str, calibration: Calibration | None
) -> tuple[str, ...]:
    """Whether this machine's CPU is slower in a format than in float32, by nature or by measurement."""
    local = any(device.is_local_cpu for device in cluster.devices)
    if local and precision in EIGHT_BITS:
        return (
            f"this machine's CPU has no products in {precision}: it rounds to them and multiplies in "
            "float32, which is exact and slower than float32 alone",
        )
    if not local or calibration is None or precision not in calibration.matmul:
        return ()
    mine, wide = calibration.peak_flops_per_s(precision), calibration.peak_flops_per_s("float32")
    if precision == "float32" or mine >= wide:
        return ()
    return (
        f"this machine's CPU is slower in {precision} ({format_rate(mine, 'FLOP')} at best) than in "
        f"float32 ({format_rate(wide, 'FLOP')})",
    )


def unmeasured_notes(cluster: Cluster, calibration: Calibration | None) -> tuple[str, ...]:
    """Whether nobody knows how fast this machine's CPU is in lower formats."""
    if calibration is not None or not any(device.is_local_cpu for device in cluster.devices):
        return ()
    return (
        "this machine's CPU was not measured and is taken to be no faster in lower formats; "
        "`graphpar calibrate` measures it",
    )


def _names(devices: Sequence[Device], most: int = 4) -> str:
    names = ", ".join(d.name for d in devices[:most])
    return names + (f" and {len(devices) - most} more" if len(devices) > most else "")


def rewrite(graph: Graph, chain: Chain, formats: UnitFormats) -> tuple[Graph, Chain]:
    """A captured graph with casts as its units will run, and the same units with the casts in them."""
    passes = Pipeline((AssignFormats(formats), InsertCasts(takes="captured", gives="captured")))
    rewritten, _ = passes.run(graph)
    return rewritten, extended(chain, rewritten)


def rewritten_by_device(graph: Graph, chain: Chain, formats: Formats) -> dict[str, tuple[Graph, Chain]]:
    """What each device with a lower format runs in place of the captured graph."""
    known: dict[UnitFormats, tuple[Graph, Chain]] = {}
    for units in formats.by_device.values():
        if units not in known and any(f != "float32" for f in units):
            known[units] = rewrite(graph, chain, units)
    return {name: known[units] for name, units in formats.by_device.items() if units in known}


def quarrels(found: Partition, formats: Formats) -> tuple[tuple[str, ...], ...]:
    """Devices that are to run the same stage but would do so in unlike formats."""
    groups = []
    for pipeline in found.pipelines:
        for stage in pipeline.stages:
            names = tuple(name for replica in stage.replicas for name in replica.devices)
            cut = slice(stage.first, stage.last)
            if len({formats.by_device.get(name, ())[cut] for name in names}) > 1:
                groups.append(names)
    return tuple(groups)


def runs_as(plan: Partition, known: Partition, formats: Formats) -> bool:
    """Whether every unit computes in formats that it computes in under a plan whose error is known."""
    mine, theirs = (_formats_of_units(p, formats) for p in (plan, known))
    return all(own <= theirs[unit] for unit, own in mine.items())


def _formats_of_units(plan: Partition, formats: Formats) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for stage in (s for p in plan.pipelines for s in p.stages):
        for name in (d for r in stage.replicas for d in r.devices):
            units = formats.by_device.get(name, ())
            for unit in range(stage.first, stage.last):
                found.setdefault(unit, set()).add(units[unit] if units else "float32")
    return found


def settled(formats: Formats, groups: Sequence[Sequence[str]], cluster: Cluster) -> Formats:
    """Float32 for all devices of the kinds that must share a stage but not a format."""
    kinds = {cluster.device(name).kind for names in groups for name in names}
    kept = {n: f for n, f in formats.by_device.items() if cluster.device(n).kind not in kinds}
    told = f"{', '.join(sorted(kinds))} run a stage together but share no lower format: float32 there"
    return Formats(kept, (*formats.notes, told))


def labelled(table: CostTable, formats: Formats) -> CostTable:
    """The table with its modes under the names of the formats that their numbers were made for.

    The search knows one way to run a unit on each device, whatever its format; this gives the answer's
    stages, which do name theirs, the same numbers.
    """
    named = []
    for mode in table.every_mode:
        devices = [d for k in mode.members for d in table.device_classes[k].devices]
        units = (f for d in devices for f in formats.by_device.get(d, ()))
        lower = {base_format(f) for f in units if f != "float32"}
        named += [replace(mode, precision=f) for f in sorted(lower)]
    return replace(table, modes=(*table.modes, *named))


def with_formats(found: Partition, formats: Formats) -> Partition:
    """The partition with every stage in the format of its devices."""

    def chosen(stage: StageChoice) -> StageChoice:
        mine = formats.by_device.get(stage.replicas[0].device, ())[stage.first : stage.last]
        lower = [f for f in mine if f != "float32"]
        if not lower:
            return stage
        plain = len(set(mine)) == 1 and mine[0] in FORMATS
        return replace(stage, precision=base_format(lower[0]), unit_formats=() if plain else mine)

    pipelines = tuple(
        replace(pipeline, stages=tuple(map(chosen, pipeline.stages))) for pipeline in found.pipelines
    )
    return replace(found, pipelines=pipelines)
