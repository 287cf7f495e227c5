"""How much of a model's work lies far outside of what a device's numbers were taken from.

Past the last measured size a rate is taken to stay what it was there, and a format without a number of
its own is taken to run like another one. Both are guesses that a plan has to tell.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphpar import catalogue
from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.work import Kernel
from graphpar.device import Device
from graphpar.ir.graph import Graph

FAR = 4.0
"""A size past this many times the last measured one is far outside."""
NOTABLE = 0.2
"""Share of the model's arithmetic from which on it is worth a word."""
WIDER = 1.5
"""How many times wider the error bar of such a plan is."""


@dataclass(frozen=True)
class _Range:
    """The largest sizes that a device's rates were measured at; None where nothing is known."""

    rows: float | None = None
    width: float | None = None
    keys: float | None = None
    flops: float | None = None

    def holds(self, kernel: Kernel) -> bool:
        """Whether a kernel is not far outside."""
        if kernel.matrix is not None:
            _, rows, columns, inner = kernel.matrix
            near = _near(rows, self.rows) and _near(math.sqrt(columns * inner), self.width)
            return near and _near(math.sqrt(kernel.flops), self.flops and math.sqrt(self.flops))
        if kernel.attention is not None:
            return _near(kernel.attention[0], self.keys)
        return True


def _near(size: float, last: float | None) -> bool:
    return last is None or size <= FAR * last


def extrapolations(
    graph: Graph, cluster: Cluster, calibration: Calibration | None, precision: str, size: int
) -> tuple[str, ...]:
    """What is guessed beyond measurements, in words; empty where it is less than `NOTABLE` of the work.

    Args:
        graph: A captured graph.
        cluster: The devices.
        calibration: What was measured of this machine's processor.
        precision: Format that float32 values are computed in; devices without it stay in float32.
        size: Samples of a microbatch.
    """
    layout, kernels = find_layout(graph), dict[str, list[Kernel]]()
    found: dict[str, list[str]] = {}
    for kind, device in {d.kind: d for d in cluster.devices}.items():
        has_it = device.is_local_cpu or precision in device.peak_flops_per_s
        own = precision if has_it else "float32"
        if own not in kernels:
            every = (k for op in graph.ops for k in work_of(op, graph, layout, size, own).forward)
            kernels[own] = [k for k in every if k.flops and (k.matrix or k.attention)]
        for told in _told(device, calibration, kernels[own]):
            found.setdefault(told, []).append(kind)
    return tuple(f"{told} ({', '.join(kinds)})" for told, kinds in found.items())


def _told(device: Device, calibration: Calibration | None, kernels: Sequence[Kernel]) -> Iterable[str]:
    total = sum(k.flops for k in kernels)
    if not total:
        return
    known = _range(device, calibration)
    share = sum(k.flops for k in kernels if not known.holds(k)) / total
    if share >= NOTABLE:
        yield (
            f"{100 * share:.0f} % of the arithmetic is in kernels more than {FAR:g} times as large as "
            "any that was measured: rates are taken to stay what they were there, error bar widened"
        )
    for dtype in sorted({k.dtype for k in kernels}):
        instead = _stand_in(device, calibration, dtype)
        share = sum(k.flops for k in kernels if k.dtype == dtype) / total
        if instead and share >= NOTABLE:
            yield f"nothing is known of {dtype}, which is taken to run {instead}, error bar widened"


def _range(device: Device, calibration: Calibration | None) -> _Range:
    if device.is_local_cpu and calibration is not None:
        products, attention = calibration.matmul["float32"], calibration.attention.get("full")
        return _Range(products.rows[-1], products.widths[-1], attention.rows[-1] if attention else None)
    family = catalogue.families()[device.family]
    points = family.matmul_efficiency
    fastest = max(device.peak_flops_per_s.values())
    moved = 1.0 if device.in_catalogue else fastest / family.matmul_peak_flops_per_s
    return _Range(flops=points[-1][0] * moved if len(points) > 1 else None)


def described(devices: Iterable[Device]) -> tuple[str, ...]:
    """What is assumed of kinds that a cluster file describes: a datasheet says nothing of kernels."""
    kinds = {device.kind: device.family for device in devices if not device.in_catalogue}
    return tuple(
        f"{kind} is described in the cluster: kernels are taken to reach of its peaks and bandwidth what "
        f"they reach on devices of the family {family}, at sizes in proportion to the peaks"
        for kind, family in kinds.items()
    )


def _stand_in(device: Device, calibration: Calibration | None, dtype: str) -> str:
    """What a format without numbers of its own is priced as; empty where it has them."""
    if device.is_local_cpu and calibration is not None:
        return "" if dtype in calibration.matmul else "at float32's rate"
    peaks = device.peak_flops_per_s
    if dtype in peaks:
        return ""
    if dtype == "float64":
        return "at 1/32 of float32's peak"
    if dtype == "float32" and "tf32" in peaks:
        return ""
    return "at the peak of the nearest format there is"
