"""Devices, links and nodes: the frozen parts of a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphpar.cost import LinkCost
from graphpar.units import format_bytes, format_rate, format_seconds

LOCAL_KIND = "cpu"
"""The device kind that stands for this machine's processor."""


def _rank(dtype: str, peak: float) -> tuple[bool, float]:
    """Training formats before others, faster ones first."""
    return dtype in ("float32", "float16", "bfloat16"), peak


@dataclass(frozen=True)
class Device:
    """One device: what it can do, and what is emulated of it.

    Attributes:
        name: `node/index`, such as `a/0`.
        node: Name of its node.
        kind: Name in the catalogue, or of a kind described in place.
        family: Which efficiency curve it follows.
        memory_bytes: Memory for weights, activations and the framework together.
        memory_bytes_per_s: Peak bandwidth of that memory.
        peak_flops_per_s: Dense peak by dtype.
        slowdown: Times slower than real, by waiting.
        is_cpu: Whether tensors live in main memory.
        threads: CPU threads one worker uses.
        power_w: Power at full load, where known.
        in_catalogue: Whether the kind is known by name.
    """

    name: str
    node: str
    kind: str
    family: str
    memory_bytes: int
    memory_bytes_per_s: float
    peak_flops_per_s: Mapping[str, float] = field(hash=False)
    slowdown: float = 1.0
    is_cpu: bool = False
    threads: int = 1
    power_w: float | None = None
    in_catalogue: bool = True

    @property
    def is_local_cpu(self) -> bool:
        """Whether it stands for this machine's own processor."""
        return self.kind == LOCAL_KIND

    def to_dict(self) -> dict[str, Any]:
        """The written form of a group of one."""
        written: dict[str, Any] = {"kind": self.kind, "count": 1, "memory_bytes": self.memory_bytes}
        if not self.in_catalogue:
            written["kind"] = self._kind_to_dict()
        if self.slowdown != 1:
            written["slowdown"] = self.slowdown
        if self.threads != 1:
            written["threads"] = self.threads
        return written

    def _kind_to_dict(self) -> dict[str, Any]:
        kind = {
            "name": self.kind,
            "family": self.family,
            "peak_flops_per_s": dict(sorted(self.peak_flops_per_s.items())),
            "memory_bytes": self.memory_bytes,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "is_cpu": self.is_cpu,
        }
        return kind if self.power_w is None else {**kind, "power_w": self.power_w}

    def table_cells(self) -> tuple[str, ...]:
        """Kind, memory, bandwidth, peak and slowdown, for people."""
        dtype, peak = max(self.peak_flops_per_s.items(), key=lambda item: _rank(*item))
        return (
            self.kind,
            format_bytes(self.memory_bytes),
            format_rate(self.memory_bytes_per_s, "B"),
            f"{format_rate(peak, 'FLOP')} {dtype}",
            f"{self.slowdown:g}",
        )


@dataclass(frozen=True)
class Link:
    """One direction between two devices: n bytes take `latency_s + n / bytes_per_s`.

    `emulated` says that the runtime has to wait to make it that slow. `kind` is its name in the
    catalogue; empty when given by numbers.
    """

    bytes_per_s: float
    latency_s: float
    emulated: bool = False
    kind: str = ""

    @property
    def cost(self) -> LinkCost:
        """The numbers alone."""
        return LinkCost(self.latency_s, self.bytes_per_s)

    def to_dict(self) -> str | dict[str, float]:
        """The written form."""
        return self.kind or {"bytes_per_s": self.bytes_per_s, "latency_s": self.latency_s}

    def __str__(self) -> str:
        numbers = f"{format_rate(self.bytes_per_s, 'B')}, {format_seconds(self.latency_s)}"
        return f"{self.kind} ({numbers})" if self.kind else numbers


@dataclass(frozen=True)
class Node:
    """One machine: its devices, the link among them, and its own network card where given."""

    name: str
    devices: tuple[Device, ...]
    link: Link
    host: str | None = None
    network: Link | None = None

    def to_dict(self) -> dict[str, Any]:
        """The written form, equal neighbours counted together."""
        groups: list[dict[str, Any]] = []
        for device in self.devices:
            body = device.to_dict()
            if groups and {**groups[-1], "count": 1} == body:
                groups[-1]["count"] += 1
            else:
                groups.append(body)
        written: dict[str, Any] = {"name": self.name, "devices": groups}
        written["link"] = self.link.to_dict()
        if self.host is not None:
            written["host"] = self.host
        if self.network is not None:
            written["network"] = self.network.to_dict()
        return written

    def table_rows(self) -> list[tuple[str, ...]]:
        """Rows for people, equal neighbours on one line."""
        rows, start = [], 0
        for end in range(1, len(self.devices) + 1):
            first = self.devices[start]
            if end < len(self.devices) and self.devices[end].to_dict() == first.to_dict():
                continue
            last = self.devices[end - 1]
            names = first.name if end - start == 1 else f"{first.name}..{last.name.split('/')[1]}"
            rows.append((names, *first.table_cells(), str(self.link)))
            start = end
        return rows
