"""How far a what-if answer is to be trusted: its error bar, and what it assumes."""

from collections.abc import Collection

from graphpar.calibration import Calibration
from graphpar.catalogue import families
from graphpar.cost_models.extrapolation import WIDER, described
from graphpar.device import Device
from graphpar.scenarios.pricing import PriceBook
from graphpar.scenarios.types import Setting

MEASURED_ERROR, CATALOGUE_ERROR, DESCRIBED_ERROR = 0.10, 0.20, 0.35
"""Half-widths of the interval a step is expected in: this machine's measured processor, a device of the
catalogue (the errors in docs/cost-models.md), a device described in place."""


def trust(setting: Setting, book: PriceBook, used: Collection[str] = ()) -> tuple[float, tuple[str, ...]]:
    """How wide the error bar of a plan on the used devices is, and what is assumed; of none: of all."""
    calibration, everyone = book.calibration, setting.cluster.devices
    devices = [d for d in everyone if d.name in used] or list(everyone)
    names = {d.name for d in devices}
    error = max(_error(d, calibration) for d in devices)
    remarks = list(described(devices))
    if setting.precision != "float32":
        remarks += book.formats(setting).notes
        if setting.precision in book.by_format(setting, names):
            # Formats other than float32 were checked against fewer measurements.
            error *= 1.25
    if any(d.is_local_cpu for d in devices) and calibration is None:
        error = max(error, DESCRIBED_ERROR)
        remarks.append("this machine's processor is not calibrated; run `graphpar calibrate`")
    far = book.extrapolations(setting, names)
    if far:
        error *= WIDER
        remarks += far
    return error, tuple(remarks)


def _error(device: Device, calibration: Calibration | None) -> float:
    if device.is_local_cpu:
        return MEASURED_ERROR if calibration is not None else DESCRIBED_ERROR
    if not device.in_catalogue:
        return DESCRIBED_ERROR
    # A curve of few points says less.
    points = len(families()[device.family].matmul_efficiency)
    return CATALOGUE_ERROR if points > 1 else DESCRIBED_ERROR
