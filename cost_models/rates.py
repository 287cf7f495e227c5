"""Seconds of a kernel on a device: from the catalogue's curves, or from a calibration of this machine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from graphpar import catalogue
from graphpar.calibration import Calibration
from graphpar.catalogue import Family
from graphpar.cost_models import gemm
from graphpar.cost_models.work import Kernel
from graphpar.device import Device
from graphpar.ir.ops import DTYPE_BYTES

ELEMENTS_PER_S = {
    "layer_norm": 3.3e9,
    "layer_norm_backward": 1.5e9,
    "softmax": 4.7e9,
    "softmax_backward": 1.4e9,
    "cross_entropy": 1.33e9,
    "cross_entropy_backward": 1.0e9,
    "gelu": 6.6e9,
    "gelu_backward": 5.2e9,
    "gelu_tanh": 8.5e9,
    "copy": 2.6e9,
    "reduce": 5.0e9,
    "dropout": 2.5e9,
}
"""Elements that one multiprocessor of a GPU gets through in a second where memory does not hold it back:
kernels that reduce rows, call special functions or gather what lies apart. Fitted on an H200 to
`benchmarks/device_curves.py`."""
ATTENTION_HALF = (180.0, 455.0)
"""Keys at which fused attention reaches half of its share, forward and backward; `CAUSAL_HALF` more and
`CAUSAL_SHARE` of it where half is skipped, since tiles on the diagonal are not. Fitted like the above."""
CAUSAL_HALF, CAUSAL_SHARE = 440.0, 0.87
LISTED_TENSOR_S = 1e-6
"""The host's time per tensor of an op over a list of tensors (`torch._foreach_*`, the optimisers' default
on GPUs): an estimate, not measured."""
FLOAT_PEAK_FALLBACK = ("tf32", "float32", "bfloat16", "float16")


class Rates(Protocol):
    """Seconds of kernels on one device."""

    def seconds(self, kernels: Iterable[Kernel], *, backward: bool = False) -> float:
        """Time of the kernels one after the other."""

    def optimizer_seconds(self, numel: float, tensors: int, state_ratio: float) -> float:
        """Time of one optimiser step over so many trained elements in so many tensors."""

    def clip_seconds(self, numel: float, tensors: int) -> float:
        """Time of clipping the gradients of so many elements in so many tensors by their norm."""


@dataclass(frozen=True)
class CatalogueRates:
    """A roofline from the catalogue: peak by dtype with an efficiency curve, bandwidth, launch floor."""

    device: Device

    @property
    def family(self) -> Family:
        """The device's efficiency curves."""
        return catalogue.families()[self.device.family]

    def seconds(self, kernels: Iterable[Kernel], *, backward: bool = False) -> float:
        """Device time, or the host's time to issue the kernels where that is longer."""
        listed = list(kernels)
        return max(self.device_seconds(listed), len(listed) * self.family.host_op_s)

    def device_seconds(self, kernels: Iterable[Kernel]) -> float:
        """Time on the device alone, where the host is well ahead of it."""
        return sum(self._kernel(kernel) for kernel in kernels)

    def _kernel(self, kernel: Kernel) -> float:
        if kernel.bytes == 0 and kernel.flops == 0:
            return 0.0
        memory_s = kernel.bytes / self._bytes_per_s
        compute_s = self._tiles_s(kernel) or kernel.flops / self._flops_per_s(kernel)
        # The 4-norm: like the textbook roofline (the maximum) far from the ridge, 19 % slower on it,
        # where neither side hides all of the other.
        return self.family.launch_s + math.sqrt(math.hypot(memory_s**2, compute_s**2))

    @property
    def _bytes_per_s(self) -> float:
        return self.device.memory_bytes_per_s * self.family.bandwidth_fraction

    def _tiles_s(self, kernel: Kernel) -> float:
        """A product by its tiles, other kernels by their elements, where the device's multiprocessors are
        known and something is known of the kernel; else nothing."""
        known = self.device.in_catalogue and kernel.attention is None
        multiprocessors = catalogue.devices()[self.device.kind].multiprocessors if known else None
        if not multiprocessors:
            return 0.0
        if kernel.matrix is None:
            rate = ELEMENTS_PER_S.get(kernel.curve, math.inf) * multiprocessors
            return kernel.elements / rate
        batch, rows, columns, inner = kernel.matrix
        return gemm.product_s(
            rows,
            columns,
            inner,
            batch,
            flops_per_s=self.peak(kernel.dtype) * self._measured_top(kernel.dtype),
            multiprocessors=multiprocessors,
            bytes_per_s=self._bytes_per_s,
        )

    def _flops_per_s(self, kernel: Kernel) -> float:
        if kernel.matrix is not None:
            return self.matmul_flops_per_s(kernel.flops, kernel.dtype)
        if kernel.attention is not None:
            length, head, causal = kernel.attention
            share = self.family.attention_fraction
            if self.family.attention_by_head and DTYPE_BYTES.get(kernel.dtype) == 2:
                share = self._fused_share(length, head, causal, kernel.curve.endswith("backward"))
            return self.peak(kernel.dtype) * share * (2.0 if causal else 1.0)
        return self.device.peak_flops_per_s.get("float32", self.peak("float32")) * 0.5

    def _fused_share(self, length: float, head: int, causal: bool, backward: bool) -> float:
        """Share of the peak that fused attention in 16 bits reaches on what it cannot skip."""
        share = interpolate(self.family.attention_by_head, head) * (CAUSAL_SHARE if causal else 1.0)
        half = ATTENTION_HALF[backward] + (CAUSAL_HALF if causal else 0.0)
        return share * length / (length + half)

    def peak(self, dtype: str) -> float:
        """Dense peak for a dtype; formats the device lacks run in the nearest one it has."""
        peaks = self.device.peak_flops_per_s
        if dtype in peaks:
            return peaks[dtype]
        if dtype == "float64":
            return peaks.get("float32", max(peaks.values())) / 32
        if dtype == "bfloat16" and "float32" in peaks:
            return peaks["float32"]
        return next((peaks[d] for d in FLOAT_PEAK_FALLBACK[1:] if d in peaks), max(peaks.values()))

    def matmul_flops_per_s(self, flops: float, dtype: str) -> float:
        """Rate of a matrix product of so many FLOPs."""
        points = self.family.matmul_efficiency
        top = self._measured_top(dtype) / points[-1][1] if points else 1.0
        # The curve was measured at the tensor-core peak; a slower format is saturated by less work, and
        # so is a slower device of which there is a description alone.
        fastest = max(self.device.peak_flops_per_s.values())
        measured = fastest if self.device.in_catalogue else self.family.matmul_peak_flops_per_s
        reach = measured / self.peak(dtype)
        return self.peak(dtype) * min(interpolate(points, flops * reach) * top, 1.0)

    def _measured_top(self, dtype: str) -> float:
        points = self.family.matmul_efficiency
        if not self.device.in_catalogue:
            return points[-1][1]
        return catalogue.devices()[self.device.kind].measured_fraction(dtype) or points[-1][1]

    def optimizer_seconds(self, numel: float, tensors: int, state_ratio: float) -> float:
        """Memory traffic in float32 of an op at a time; on a GPU the host issues ops meanwhile."""
        moved = numel * 4 * optimizer_passes(state_ratio)
        rate = self.device.memory_bytes_per_s * self.family.bandwidth_fraction
        host_s = self._host_s(2 + 3 * state_ratio, tensors)
        return host_s + moved / rate if self.device.is_cpu else max(host_s, moved / rate)

    def clip_seconds(self, numel: float, tensors: int) -> float:
        """Memory traffic: read for the norm, then read and written, in float32; four ops a tensor."""
        rate = self.device.memory_bytes_per_s * self.family.bandwidth_fraction
        return self._host_s(4, tensors) + numel * 12 / rate

    def _host_s(self, num_ops: float, tensors: int) -> float:
        """Time to issue ops over all tensors: one by one on a processor, as a list on a GPU."""
        if self.device.is_cpu:
            return num_ops * tensors * self.family.host_op_s
        return num_ops * (self.family.host_op_s + tensors * LISTED_TENSOR_S)


OPTIMIZER_PASSES = (3.0, 8.0, 20.0)
"""How often an optimiser passes over a parameter's size with none, one or two states, one op after the
other as torch's defaults do: SGD 3 (weight and gradient read, weight written), with momentum 8, AdamW 20
(22 by the time that it took on an H200, `benchmarks/device_curves.py`)."""


def optimizer_passes(state_ratio: float) -> float:
    """Reads and writes of a parameter's size in one step of an optimiser with so many states.

    >>> optimizer_passes(0), optimizer_passes(1.5), optimizer_passes(3)
    (3.0, 14.0, 32.0)
    """
    low = min(int(state_ratio), len(OPTIMIZER_PASSES) - 2)
    first, second = OPTIMIZER_PASSES[low : low + 2]
    return first + (second - first) * (state_ratio - low)


def interpolate(points: tuple[tuple[float, float], ...], flops: float) -> float:
    """An efficiency on a curve; below it time stays what it is at the first point.

    >>> interpolate(((100.0, 0.25), (10000.0, 0.75)), 1000.0), interpolate(((100.0, 0.2),), 50.0)
    (0.5, 0.1)
    """
    if flops <= points[0][0]:
        return points[0][1] * max(flops, 1.0) / points[0][0]
    for (low, first), (high, second) in pairwise(points):
        if flops <= high:
            share = math.log(flops / low) / math.log(high / low)
            return first + (second - first) * share
    return points[-1][1]


@dataclass(frozen=True)
class CalibratedRates:
    """This machine's processor, as measured."""

    calibration: Calibration

    def seconds(self, kernels: Iterable[Kernel], *, backward: bool = False) -> float:
        """Time of the kernels, with what each costs more in a mixed sequence."""
        listed = list(kernels)
        each_s = self.calibration.node_s if backward else self.calibration.op_s
        return each_s * len(listed) + sum(self._kernel(kernel) for kernel in listed)

    def _kernel(self, kernel: Kernel) -> float:
        if kernel.matrix is not None:
            return self._product(kernel, *kernel.matrix)
        if kernel.attention is not None:
            return self._attention(kernel, *kernel.attention)
        curves = self.calibration.curves
        curve = curves.get(f"{kernel.curve}_{kernel.dtype}", curves.get(kernel.curve))
        if curve is None:
            return self.calibration.curves["pointwise"].at(kernel.bytes)
        return curve.at(kernel.size)

    def _product(self, kernel: Kernel, batch: int, rows: int, columns: int, inner: int) -> float:
        grids = self.calibration.matmul if batch == 1 else self.calibration.batched_matmul
        grid = grids.get(kernel.dtype)
        # A format that was not measured is computed at float32's rate.
        grid = grid if grid is not None else grids["float32"]
        rate = grid.at(rows, math.sqrt(columns * inner))
        return self._floor() + kernel.flops / rate

    def _attention(self, kernel: Kernel, keys: int, head: int, causal: bool) -> float:
        name = ("causal" if causal else "full") + (
            "_backward" if kernel.curve.endswith("backward") else ""
        )
        grids = self.calibration.attention
        rate = grids.get(f"{name}_{kernel.dtype}", grids[name]).at(keys, head)
        return self._floor() + kernel.flops / rate

    def _floor(self) -> float:
        return self.calibration.curves["view"].seconds[0]

    def optimizer_seconds(self, numel: float, tensors: int, state_ratio: float) -> float:
        """Measured: AdamW's time for two states, plain SGD's for none, between them in proportion."""
        curves = self.calibration.curves
        share = min(state_ratio / 2, 1.0)
        each = numel / max(tensors, 1)
        one = (1 - share) * curves["sgd"].at(each) + share * curves["adamw"].at(each)
        return one * tensors

    def clip_seconds(self, numel: float, tensors: int) -> float:
        """Measured on tensors of the mean size."""
        return self.calibration.curves["clip"].at(numel / max(tensors, 1)) * tensors


def rates_of(device: Device, calibration: Calibration | None) -> Rates:
    """The rates that fit a device: measured ones for this machine's processor, if at hand."""
    if calibration is None or not device.is_local_cpu:
        return CatalogueRates(device)
    # Measured for another number of threads the curves say nothing of this device.
    fits = calibration.fingerprint.threads == device.threads
    return CalibratedRates(calibration) if fits else CatalogueRates(device)
