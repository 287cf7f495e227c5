"""The border between machines and numbers: a cost model fills a `CostTable`, the partitioner reads it.

Left of the table sits all knowledge of hardware, right of it there are only seconds and bytes. A test
of the partitioner is a table written by hand.

The model is a chain of *units*: contiguous runs of ops, cut where little data crosses. Equal units
(the repeated blocks of a network) share one `UnitCost`. Times and activation sizes depend on the
microbatch size and are tabulated at `CostTable.sizes`; between two entries they are interpolated
linearly.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class UnitCost:
    """What one distinct unit costs; equal units of the chain share it.

    `forward_s` and `backward_s` are indexed [device class][microbatch size], `optimizer_s` by device
    class, `saved_bytes` (kept from forward to backward) and `working_bytes` (temporaries) by
    microbatch size. `gradient_bytes` and `optimizer_bytes` are zero when nothing is trained.
    """

    name: str
    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    optimizer_s: tuple[float, ...]
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    saved_bytes: tuple[float, ...]
    working_bytes: tuple[float, ...]


@dataclass(frozen=True)
class CutEdge:
    """A value produced in unit `source` and last used in unit `target` (both indices of the chain).

    It crosses every boundary between the two. `bytes_per_sample` travels forward per sample,
    `gradient_bytes_per_sample` backward; `fixed_bytes` travels once per microbatch whatever its size.
    """

    source: int
    target: int
    bytes_per_sample: float
    gradient_bytes_per_sample: float = 0.0
    fixed_bytes: float = 0.0


@dataclass(frozen=True)
class DeviceClass:
    """Devices that are equal to the cost model: one row of every table of times."""

    name: str
    devices: tuple[str, ...]
    memory_bytes: float
    stage_overhead_s: float = 0.0
    """Fixed time a stage on this device spends per microbatch (launch, messages), once per direction."""


@dataclass(frozen=True)
class LinkCost:
    """One direction of a link: a message of n bytes takes `latency_s + n / bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Time of one message.

        >>> LinkCost(1e-6, 1e9).seconds(1000)
        2e-06
        """
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes > 0 else 0.0


@dataclass(frozen=True)
class Topology:
    """Which link two devices share: `inside[node]` within a node, `between[(a, b)]` or `network` across.

    `between` is looked up in both orders.
    """

    node_of: dict[str, str]
    inside: dict[str, LinkCost]
    network: LinkCost
    between: dict[tuple[str, str], LinkCost] = field(default_factory=dict)

    def link(self, device: str, other: str) -> LinkCost:
        """The link between two device names."""
        a, b = self.node_of[device], self.node_of[other]
        if a == b:
            return self.inside[a]
        return self.between.get((a, b)) or self.between.get((b, a)) or self.network


@dataclass(frozen=True)
class PricingOptions:
    """What a cost model has to know besides the graph and the cluster.

    Attributes:
        batch: Samples in one global batch.
        training: Whether there is a backward pass and an optimiser.
        precision: Format that float32 values are computed in.
        optimizer_state_bytes_per_parameter_byte: 0 for plain SGD, 1 with momentum, 2 for Adam.
        max_microbatches: 1 where samples mix and the batch must stay whole.
        max_replicas: 1 where samples mix.
        batch_reason: Why the batch may not be split, for people.
        clips_gradients: Whether gradients are clipped by their global norm before the optimiser.
    """

    batch: int
    training: bool
    precision: str = "float32"
    optimizer_state_bytes_per_parameter_byte: float = 2.0
    max_microbatches: int = 64
    max_replicas: int = 64
    batch_reason: str = ""
    clips_gradients: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "max_microbatches", "max_replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.optimizer_state_bytes_per_parameter_byte < 0:
            raise ValueError("optimizer_state_bytes_per_parameter_byte must not be negative.")


@dataclass(frozen=True)
class CostTable:
    """Everything the partitioner may know.

    Attributes:
        batch: Samples in one global batch.
        training: Whether there is a backward pass and an optimiser.
        sizes: Increasing microbatch sizes at which times are tabulated; the first is 1 unless the
            batch cannot be split, the last is `batch`.
        units: For each unit of the chain the index of its `UnitCost`.
        unit_names: For each unit of the chain a name for people.
        costs: The distinct units.
        edges: Values that cross unit boundaries.
        device_classes: Rows of the tables of times.
        topology: Links between devices.
        max_microbatches: 1 where samples mix and the batch must stay whole.
        max_replicas: 1 where samples mix; otherwise how many copies of a unit may exist.
        batch_reason: Why the batch may not be split, for people; empty when it may.
        reserved_bytes: Memory the framework itself takes on every device.
        sum_s_per_byte: Seconds a device spends, beyond its links, per byte that a ring sums for it.
    """

    batch: int
    training: bool
    sizes: tuple[int, ...]
    units: tuple[int, ...]
    unit_names: tuple[str, ...]
    costs: tuple[UnitCost, ...]
    edges: tuple[CutEdge, ...]
    device_classes: tuple[DeviceClass, ...]
    topology: Topology
    max_microbatches: int
    max_replicas: int
    batch_reason: str = ""
    reserved_bytes: float = 0.0
    sum_s_per_byte: float = 0.0

    @property
    def num_units(self) -> int:
        """Units in the chain."""
        return len(self.units)

    @cached_property
    def class_of(self) -> dict[str, int]:
        """Device name to the index of its class."""
        return {d: i for i, c in enumerate(self.device_classes) for d in c.devices}

    def at_size(self, values: Sequence[float], size: float) -> float:
        """Interpolate a per-size row at a microbatch size (flat outside the tabulated range)."""
        sizes = self.sizes
        if size <= sizes[0]:
            return values[0] if size == sizes[0] else values[0] * max(size, 0) / sizes[0]
        if size >= sizes[-1]:
            return values[-1] * size / sizes[-1]
        right = bisect_left(sizes, size)
        if sizes[right] == size:
            return values[right]
        low, high = sizes[right - 1], sizes[right]
        share = (size - low) / (high - low)
        return values[right - 1] * (1 - share) + values[right] * share

    def forward_s(self, unit: int, device_class: int, size: float) -> float:
        """Forward seconds of one unit of the chain for one microbatch."""
        return self.at_size(self.costs[self.units[unit]].forward_s[device_class], size)

    def backward_s(self, unit: int, device_class: int, size: float) -> float:
        """Backward seconds of one unit of the chain for one microbatch."""
        return self.at_size(self.costs[self.units[unit]].backward_s[device_class], size)

    def cut_bytes(self, boundary: int, size: float) -> tuple[float, float]:
        """Bytes of one microbatch, forward and backward, between units boundary-1 and boundary."""
        forward = backward = 0.0
        for edge in self.edges:
            if edge.source < boundary <= edge.target:
                forward += edge.bytes_per_sample * size + edge.fixed_bytes
                backward += edge.gradient_bytes_per_sample * size
        return forward, backward
