"""What was measured of one machine, as data: curves over size, kept in a file under a fingerprint.

`graphpar.local.measure` fills it; cost models read it. Nothing here runs a kernel or imports torch.
"""

import functools
import hashlib
import json
import logging
import math
import os
import platform
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from graphpar.cost import LinkCost
from graphpar.errors import GraphparError
from graphpar.files import write_whole

_log = logging.getLogger("graphpar.calibration")

FORMAT_VERSION = 5


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a measurement is bound to: it holds for no other processor, torch or thread count."""

    processor: str
    num_cores: int
    torch: str
    threads: int

    @property
    def key(self) -> str:
        """A short name for files."""
        text = json.dumps(msgspec.to_builtins(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one call over a size (elements or bytes), both increasing in `sizes`.

    >>> curve = Curve((1.0, 100.0), (1e-6, 1e-5))
    >>> round(curve.at(10) * 1e6, 2), curve.at(0.1), round(curve.at(1000) * 1e4, 2)
    (3.16, 1e-06, 1.0)
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, size: float) -> float:
        """Interpolated on logarithms; the floor below the first size, constant rate above the last."""
        if size <= self.sizes[0]:
            return self.seconds[0]
        if size >= self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        right = bisect_left(self.sizes, size)
        low, high = self.sizes[right - 1], self.sizes[right]
        share = math.log(size / low) / math.log(high / low)
        return _geometric(self.seconds[right - 1], self.seconds[right], share)


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FLOP/s over two sizes, interpolated on logarithms and flat outside.

    >>> grid = Grid((1.0, 4.0), (8.0, 16.0), ((1e9, 1e9), (4e9, 4e9)))
    >>> round(grid.at(2, 8) / 1e9, 2), round(grid.at(100, 100) / 1e9, 2)
    (2.0, 4.0)
    """

    rows: tuple[float, ...]
    widths: tuple[float, ...]
    flops_per_s: tuple[tuple[float, ...], ...]

    def at(self, rows: float, width: float) -> float:
        """The rate at a size."""
        low, high, share = _place(self.rows, rows)
        left, right, across = _place(self.widths, width)
        first = self._between(self.flops_per_s[low], left, right, across)
        second = self._between(self.flops_per_s[high], left, right, across)
        return _geometric(first, second, share)

    @staticmethod
    def _between(row: Sequence[float], left: int, right: int, share: float) -> float:
        return _geometric(row[left], row[right], share)


def _geometric(first: float, second: float, share: float) -> float:
    """The weighted geometric mean, which is linear interpolation of logarithms."""
    return first * math.exp(share * math.log(second / first))


def _place(points: Sequence[float], value: float) -> tuple[int, int, float]:
    """Neighbours of a value among increasing points, and its share of the way on logarithms."""
    if value <= points[0]:
        return 0, 0, 0.0
    if value >= points[-1]:
        return len(points) - 1, len(points) - 1, 0.0
    right = bisect_left(points, value)
    low, high = points[right - 1], points[right]
    return right - 1, right, math.log(value / low) / math.log(high / low)


@dataclass(frozen=True)
class Calibration:
    """Measured curves of this machine's processor.

    Attributes:
        fingerprint: What the numbers are bound to.
        curves: Seconds of kernels over size, by the names that cost models use.
        matmul: Rates of one matrix product by dtype: rows of the left side, geometric mean of the rest.
        batched_matmul: The same per matrix of a batch.
        attention: Rates by `causal` or `full`, forward and backward: sequence length, head size.
        loopback: A message between two processes of this machine.
        sum_s_per_byte: What a ring all-reduce costs beyond its messages, per byte that a holder sends.
        op_s: What an op of forward costs in a mixed sequence beyond its curve, tape included.
        node_s: The same for a kernel of backward.
        memory_bytes_per_s: Copy bandwidth for sizes far beyond the caches.
        slowing: How many times longer computing takes with 1, 2, ... cores at work than with one.
        reference_s: Time of a reference kernel, to tell later how the machine's speed has moved.
        measured_at: When, as an ISO date and time.
        send_s: What handing a message to the transport takes a worker; 0 in files from before that.
        receive_s: What taking in a message that is there takes one.
        late_s: How much later than described a message of an emulated link is there.
        worker_bytes: Peak memory of a worker that trains and holds next to nothing; 0 where not measured.

    >>> found = Calibration.cached()
    >>> found is None or found.peak_flops_per_s("float32") > 1e8
    True
    """

    fingerprint: Fingerprint
    curves: Mapping[str, Curve] = field(hash=False)
    matmul: Mapping[str, Grid] = field(hash=False)
    batched_matmul: Mapping[str, Grid] = field(hash=False)
    attention: Mapping[str, Grid] = field(hash=False)
    loopback: LinkCost
    sum_s_per_byte: float
    op_s: float
    node_s: float
    memory_bytes_per_s: float
    slowing: tuple[float, ...] = (1.0,)
    reference_s: float = 0.0
    measured_at: str = ""
    send_s: float = 0.0
    receive_s: float = 0.0
    late_s: float = 0.0
    worker_bytes: float = 0.0

    def peak_flops_per_s(self, dtype: str = "float32") -> float:
        """The best matmul rate that was measured for a dtype, or for float32 where it was not."""
        grid = self.matmul.get(dtype, self.matmul["float32"])
        return max(max(row) for row in grid.flops_per_s)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write as JSON, by default where `load` looks; the file is replaced in one step."""
        target = Path(path) if path is not None else cache_path(self.fingerprint)
        body = msgspec.json.encode({"format_version": FORMAT_VERSION, **vars(self)})
        write_whole(target, msgspec.json.format(body, indent=1))
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read a file written by `save`.

        Raises:
            GraphparError: It cannot be read, or is no calibration of this version.
        """
        name = os.fspath(path)
        try:
            text = Path(path).read_bytes()
            found = msgspec.json.decode(text, type=_Header).format_version
            if found != FORMAT_VERSION:
                age = "an older" if found < FORMAT_VERSION else "a newer"
                raise GraphparError(
                    f"The calibration {name} was written by {age} version of graphpar (format {found}, "
                    f"not {FORMAT_VERSION}). Measure again with `graphpar calibrate`."
                )
            return msgspec.json.decode(text, type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise GraphparError(
                f"The calibration {name} cannot be used: {error}. "
                "Measure again with `graphpar calibrate`."
            ) from error

    @classmethod
    def cached(cls, threads: int = 1) -> "Calibration | None":
        """The calibration of this machine, if it was measured before and fits.

        One that is there but cannot be used is told about once, as a warning.
        """
        found, why_not = cls.look(threads)
        if why_not:
            _tell(why_not)
        return found

    @classmethod
    def look(cls, threads: int = 1) -> "tuple[Calibration | None, str]":
        """The calibration of this machine, or why the one that is there cannot be used."""
        mine = fingerprint(threads)
        path = cache_path(mine)
        if not path.exists():
            return None, _made_elsewhere(path.parent, mine)
        try:
            return cls.load(path), ""
        except GraphparError as error:
            return None, f"{error} Until then numbers of the catalogue stand for this machine."

    def __str__(self) -> str:
        mine = self.fingerprint
        rates = ", ".join(
            f"{dtype} {self.peak_flops_per_s(dtype) / 1e9:.0f}" for dtype in sorted(self.matmul)
        )
        return "\n".join(
            (
                f"{mine.processor}, {mine.num_cores} cores, torch {mine.torch}, "
                f"{mine.threads} thread{'s' * (mine.threads != 1)} per worker",
                f"matmul, GFLOP/s: {rates}",
                f"memory: {self.memory_bytes_per_s / 1e9:.1f} GB/s; with all cores at work kernels take "
                f"{self.slowing[-1]:.2f} times as long",
                f"op floor: {self.curves['pointwise'].seconds[0] * 1e6:.1f} us, "
                f"more in a mixed sequence: {self.op_s * 1e6:.1f} us "
                f"forward, {self.node_s * 1e6:.1f} us backward",
                f"loopback: {self.loopback.latency_s * 1e6:.0f} us, "
                f"{self.loopback.bytes_per_s / 1e9:.2f} GB/s, "
                f"gradient sums {1e-9 / (1 / self.loopback.bytes_per_s + self.sum_s_per_byte):.2f} GB/s",
            )
        )


@functools.cache
def _tell(text: str) -> None:
    """Warn once in a process."""
    _log.warning("%s", text)


def _made_elsewhere(folder: Path, mine: Fingerprint) -> str:
    """Why calibrations of this processor at hand do not count; empty where there are none."""
    for path in sorted(folder.glob("calibration-*.json"))[:_MOST_LOOKED_AT]:
        try:
            other = msgspec.json.decode(path.read_bytes(), type=_Header).fingerprint
        except (OSError, msgspec.DecodeError):
            continue
        if other is None or other.processor != mine.processor or other.threads != mine.threads:
            continue
        differ = [
            f"{words} {getattr(other, name)}, not {getattr(mine, name)}"
            for name, words in (("torch", "torch"), ("num_cores", "a number of cores of"))
            if getattr(other, name) != getattr(mine, name)
        ]
        return (
            f"The calibration {path} does not count: it was measured with {' and '.join(differ)}. "
            "Measure again with `graphpar calibrate`. Until then numbers of the catalogue stand for this "
            "machine."
        )
    return ""


_MOST_LOOKED_AT = 50


class _Header(msgspec.Struct):
    """What files of all formats have."""

    format_version: int
    fingerprint: Fingerprint | None = None


def fingerprint(threads: int = 1) -> Fingerprint:
    """The fingerprint of this machine for workers of so many threads."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "none"
    return Fingerprint(_processor(), os.cpu_count() or 1, torch_version, threads)


def _processor() -> str:
    """Model and stepping, because names such as "AMD EPYC" cover several generations."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model", "stepping", "CPU part")
    first = text.split("\n\n", 1)[0]
    lines = (line.partition(":") for line in first.splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    parts = [found[key] for key in wanted if key in found]
    return " ".join(parts) or platform.machine()


def cache_path(mine: Fingerprint) -> Path:
    """Where the calibration of a machine is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "graphpar" / f"calibration-{mine.key}.json"
