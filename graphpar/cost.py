"""The border between machines and numbers: a cost model fills a `CostTable`, the partitioner reads it.

Left of the table sits all knowledge of hardware, right of it there are only seconds and bytes. A test
of the partitioner is a table written by hand.

The model is a chain of *units*: contiguous runs of ops, cut where little data crosses. Equal units (the
blocks of a network) share one `UnitCost`. What depends on the microbatch size is linear between `sizes`.

A *mode* is one way to run units: on which classes of devices (several form a tensor group), in which
precision, whether activations are recomputed, at which ZeRO level. Every device class has its plain
mode, whose numbers are the rows of the `UnitCost`s; a cost model may add others (`CostTable.modes`).
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from graphpar.cores import SharedCores


@dataclass(frozen=True)
class UnitCost:
    """What one distinct unit costs; equal units of the chain share it.

    `forward_s` and `backward_s` are indexed [device class][microbatch size], `optimizer_s` by class,
    `saved_bytes` (kept from forward to backward) and `working_bytes` (temporaries) by microbatch size, as
    `growing_bytes`: temporaries and gradients of weights in a backward before which there are none; empty
    for their sum, and no limit goes by them. Bytes of what is trained are 0 in inference.

    `weight_s`, indexed like `backward_s`, is the part of it that makes gradients of weights which may
    come later; `split_s`, too, is what halving a backward takes besides; `deferred_bytes`, by size, is
    kept until then. All are empty where nothing may come later. `again_s`, like `forward_s`, is what is
    computed once more where only inputs are kept; empty for all.

    `meetings` is how often pipelines side by side exchange something in one forward, `met_bytes` what
    each sends to each other in all of these; a backward does the same.

    Where device classes run the unit in unlike number formats, the fields that end in `by_class` say what
    each holds, and those without are the most of any; else they are empty.
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
    weight_s: tuple[tuple[float, ...], ...] = ()
    deferred_bytes: tuple[float, ...] = ()
    split_s: tuple[tuple[float, ...], ...] = ()
    again_s: tuple[tuple[float, ...], ...] = ()
    meetings: int = 0
    met_bytes: float = 0.0
    growing_bytes: tuple[float, ...] = ()
    weights_by_class: tuple[float, ...] = ()
    saved_by_class: tuple[tuple[float, ...], ...] = ()
    working_by_class: tuple[tuple[float, ...], ...] = ()
    deferred_by_class: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class ModeCost:
    """What one distinct unit costs in a mode.

    `forward_s` and `backward_s` are indexed by microbatch size and hold for the whole group, the
    collectives inside it included. All bytes are per member, in the order of `Mode.members`;
    `saved_bytes` and `working_bytes` are indexed [member][microbatch size]. ZeRO's division by the
    number of replicas is not made here, because the table does not know that number. `weight_s`,
    `deferred_bytes` and `split_s` are those of `UnitCost`, empty where no gradients may come later.
    `again_s` is what of `forward_s` is done once more where the unit is computed again; empty for all.
    `collective_s` is what of `forward_s` and `backward_s` together members spend in collectives, and
    `collective_again_s` what of `again_s`; both are empty for none.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    optimizer_s: float
    weight_bytes: tuple[float, ...]
    gradient_bytes: tuple[float, ...]
    optimizer_bytes: tuple[float, ...]
    saved_bytes: tuple[tuple[float, ...], ...]
    working_bytes: tuple[tuple[float, ...], ...]
    weight_s: tuple[float, ...] = ()
    deferred_bytes: tuple[tuple[float, ...], ...] = ()
    split_s: tuple[float, ...] = ()
    again_s: tuple[float, ...] = ()
    collective_s: tuple[float, ...] = ()
    collective_again_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Mode:
    """One way to run units.

    Attributes:
        members: The device class of each member; more than one form a tensor group, which counts as
            one replica.
        costs: One `ModeCost` per distinct unit of the table.
        shares: Each member's share of what is split; empty for equal shares.
        precision: Format that float32 values are computed in.
        recompute: Whether only what enters a unit is kept, and the rest computed again for backward.
        zero: 0, or what the replicas of a stage divide among them: 1 optimiser state, 2 gradients as
            well, 3 weights as well.
        link: The worst link between members that the costs hold for; None for one member.
        mesh: Members along each axis of a group of two; empty for one.
        lean: How dear memory was when it was decided how a tensor group shares its units.
    """

    members: tuple[int, ...]
    costs: tuple[ModeCost, ...] = field(repr=False)
    shares: tuple[float, ...] = ()
    precision: str = "float32"
    recompute: bool = False
    zero: int = 0
    link: "LinkCost | None" = None
    mesh: tuple[int, ...] = ()
    lean: int = 0

    @property
    def key(self) -> "ModeKey":
        """What tells a mode from others."""
        return self.members, self.shares, self.precision, self.recompute, self.zero, self.mesh, self.lean


class StageLike(Protocol):
    """The options of a stage that tell its mode."""

    @property
    def precision(self) -> str:
        """Number format."""

    @property
    def recompute(self) -> bool:
        """Whether activations are computed again."""

    @property
    def zero(self) -> int:
        """ZeRO level."""


class ReplicaLike(Protocol):
    """A device or a tensor group."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Members in order."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the members; empty for equal ones."""

    @property
    def mesh(self) -> tuple[int, ...]:
        """Members along each axis of a group of two; empty for one."""

    @property
    def lean(self) -> int:
        """How dear memory was when it was decided how the group shares its units."""


ModeKey = tuple[tuple[int, ...], tuple[float, ...], str, bool, int, tuple[int, ...], int]
"""Members, shares, precision, recompute, zero, mesh, lean."""


@dataclass(frozen=True)
class CutEdge:
    """A value produced in unit `source` and last used in unit `target` (both indices of the chain).

    It crosses every boundary between the two. `bytes_per_sample` travels forward per sample,
    `gradient_bytes_per_sample` backward; `fixed_bytes` travels once per microbatch whatever its size,
    and `gradient_fixed_bytes` back.
    """

    source: int
    target: int
    bytes_per_sample: float
    gradient_bytes_per_sample: float = 0.0
    fixed_bytes: float = 0.0
    gradient_fixed_bytes: float = 0.0


@dataclass(frozen=True)
class DeviceClass:
    """Devices that are equal to the cost model: one row of every table of times."""

    name: str
    devices: tuple[str, ...]
    memory_bytes: float
    stage_overhead_s: float = 0.0
    """Fixed time a stage on this device spends per microbatch (launch, messages), once per direction."""
    update_share: float = 0.0
    """Bytes that the optimiser's update takes for a while, per byte of the gradients that it steps."""
    refills: bool = False
    """Whether gradients come to lie where activations were, as in a process's heap. On a GPU they do not:
    six steps on an H100 took 2 % less to 3 % more than both together (`benchmarks/gpu_steps.py`)."""
    update_copies: float = 0.0
    """Copies of the largest tensor, of an update that goes tensor by tensor; no limit counts them."""

    def update_per_gradient(self, zero: int, width: int) -> float:
        """What the update takes beyond what is held at other times, per byte of a stage's gradients.

        Of `width` replicas each steps its part alone from ZeRO level 1 on; at level 1 it held whole
        gradients until they were summed.

        >>> gpu = DeviceClass("gpu", ("a/0",), 1e9, update_share=1.0)
        >>> [gpu.update_per_gradient(zero, 4) for zero in (0, 1, 2)]
        [1.0, 0.0, 0.25]
        """
        stepped = 1 / width if zero else 1.0
        freed = 1 - stepped if zero == 1 else 0.0
        return max(0.0, self.update_share * stepped - freed)


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

    def at_least(self, other: "LinkCost") -> bool:
        """Whether no message takes longer than over the other."""
        return self.latency_s <= other.latency_s and self.bytes_per_s >= other.bytes_per_s


@dataclass(frozen=True)
class Topology:
    """Which link two devices share: `inside[node]` within a node, `between[(a, b)]` or `network` across.

    `between` is looked up in both orders; a table in which the two differ is refused.
    """

    node_of: dict[str, str]
    inside: dict[str, LinkCost]
    network: LinkCost
    between: dict[tuple[str, str], LinkCost] = field(default_factory=dict)

    def between_nodes(self, nodes: Collection[str], others: Collection[str]) -> set[LinkCost]:
        """The links between nodes of two sets; no node's inside link is among them."""
        if not self.between:
            apart = len({*nodes, *others}) > 1 and nodes and others
            return {self.network} if apart else set()
        return {
            self.between.get((a, b)) or self.between.get((b, a)) or self.network
            for a in nodes
            for b in others
            if a != b
        }

    def link(self, device: str, other: str) -> LinkCost:
        """The link between two device names."""
        a, b = self.node_of[device], self.node_of[other]
        if a == b:
            return self.inside[a]
        return self.between.get((a, b)) or self.between.get((b, a)) or self.network


@dataclass(frozen=True)
class RepeatedWeights:
    """Weights that units read whose cost does not count them, since an earlier unit's does.

    A stage that has one of these units without the earlier one holds copies of its own.

    Attributes:
        first: The unit whose cost counts them.
        again: Later units that read them, in order.
        weight_bytes: Bytes of the weights.
        gradient_bytes: Bytes of their gradients.
        optimizer_bytes: Bytes of the optimiser's state.
    """

    first: int
    again: tuple[int, ...]
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float

    def held_by(self, first: int, last: int) -> bool:
        """Whether a stage of units `first .. last - 1` holds them besides what its units count."""
        return self.first < first and any(first <= unit < last for unit in self.again)


@dataclass(frozen=True)
class CostTable:
    """Everything the partitioner may know.

    Attributes:
        batch: Samples in one global batch.
        training: Whether there is a backward pass and an optimiser.
        sizes: Increasing microbatch sizes at which times are tabulated; the first is 1 unless the
            batch cannot be split, the last is `batch`.
        units: For each unit of the chain the index of its `UnitCost`; `unit_names` are for people.
        costs: The distinct units.
        edges: Values that cross unit boundaries.
        device_classes: Rows of the tables of times.
        topology: Links between devices.
        max_microbatches: 1 where samples mix and the batch must stay whole, or pipelines go in step.
        max_replicas: 1 where the batch must stay whole; otherwise how many copies of a unit may exist.
        batch_reason: Why the batch may not be split, for people; empty when it may.
        tail_reason: What needs the whole batch after all forwards and before any backward, for people;
            empty for nothing. The schedule is GPipe then.
        in_step_reason: What needs sums over the whole batch within the model, for people; empty for
            nothing. Every pipeline takes its samples as one microbatch then.
        reserved_bytes: Memory the framework itself takes on every device.
        passing_gradient_bytes: For each distinct unit the gradients of weights that are being added up
            while backward is in it: those that an earlier unit reads as well. Empty for none.
        few_row_bytes: For each distinct unit the trained weights that ZeRO may not divide among as many
            replicas as there can be, for want of rows. Empty for none.
        largest_gradient_bytes: For each distinct unit its largest gradient. Empty in inference.
        result_bytes: By unit of the chain what the results it makes take for a sample. Empty in training.
        repeated: Weights that several units read; each member of a tensor group counts them whole.
        sum_s_per_byte: Seconds a device spends, beyond its links, per byte that a ring sums for it.
        modes: Ways to run units besides the plain mode of each device class.
        shared: Which devices share this machine's cores; times are those of one that has its own.
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
    tail_reason: str = ""
    in_step_reason: str = ""
    reserved_bytes: float = 0.0
    sum_s_per_byte: float = 0.0
    passing_gradient_bytes: tuple[float, ...] = ()
    few_row_bytes: tuple[float, ...] = ()
    largest_gradient_bytes: tuple[float, ...] = ()
    result_bytes: tuple[float, ...] = ()
    repeated: tuple[RepeatedWeights, ...] = ()
    modes: tuple[Mode, ...] = ()
    shared: SharedCores | None = None

    @property
    def num_units(self) -> int:
        """Units in the chain."""
        return len(self.units)

    @property
    def message_s(self) -> float:
        """Seconds that a message between stages takes besides its link."""
        return self.shared.message_s if self.shared is not None else 0.0

    @property
    def handling_s(self) -> float:
        """Of `message_s`, what keeps either side busy, for a microbatch in all directions there are."""
        both = 2 if self.training else 1
        return both * self.shared.handling_s if self.shared is not None else 0.0

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

    @cached_property
    def every_mode(self) -> tuple[Mode, ...]:
        """The plain mode of each device class, in the order of the classes, then the others."""
        plain = (_plain_mode(self.costs, k) for k in range(len(self.device_classes)))
        return (*plain, *self.modes)

    @cached_property
    def both_s(self) -> npt.NDArray[np.float64]:
        """Seconds of both directions (of the forward alone in inference): [size, distinct unit, mode]."""
        modes, units = self.every_mode, range(len(self.costs))
        ahead = np.array([[m.costs[i].forward_s for m in modes] for i in units], dtype=np.float64)
        if self.training:
            ahead += np.array([[m.costs[i].backward_s for m in modes] for i in units], dtype=np.float64)
        found: npt.NDArray[np.float64] = np.moveaxis(ahead, -1, 0)
        return found

    @cached_property
    def post_work(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """[mode, distinct unit]: optimiser seconds and gradient bytes, summed over the members."""
        steps = [[len(m.members) * c.optimizer_s for c in m.costs] for m in self.every_mode]
        sums = [[sum(c.gradient_bytes) for c in m.costs] for m in self.every_mode]
        return np.array(steps, dtype=np.float64), np.array(sums, dtype=np.float64)

    @cached_property
    def mode_of_key(self) -> dict[ModeKey, int]:
        """The index of a mode in `every_mode`."""
        return {mode.key: i for i, mode in enumerate(self.every_mode)}

    def mode_number(self, stage: "StageLike", replica: "ReplicaLike") -> int | None:
        """The index in `every_mode` of how a stage runs on a replica; None where it is not priced."""
        members = tuple(self.class_of[d] for d in replica.devices)
        options = (stage.precision, stage.recompute, stage.zero)
        return self.mode_of_key.get((members, replica.shares, *options, replica.mesh, replica.lean))

    def mode_overhead_s(self, mode: int) -> float:
        """Fixed time a stage in this mode spends per microbatch, once per direction."""
        members = self.every_mode[mode].members
        return max(self.device_classes[k].stage_overhead_s for k in members)

    def forward_s(self, unit: int, mode: int, size: float) -> float:
        """Forward seconds of one unit of the chain for one microbatch.

        `mode` is an index into `every_mode`; that of a class's plain mode is the class's own.
        """
        return self.at_size(self.every_mode[mode].costs[self.units[unit]].forward_s, size)

    def backward_s(self, unit: int, mode: int, size: float) -> float:
        """Backward seconds of one unit of the chain for one microbatch."""
        return self.at_size(self.every_mode[mode].costs[self.units[unit]].backward_s, size)

    def unit_seconds(self, mode: int, size: float) -> tuple[list[float], list[float]]:
        """`forward_s` and `backward_s` of every unit of the chain, looked up once for a mode and size."""
        if (mode, size) not in self._unit_seconds:
            costs = self.every_mode[mode].costs
            ahead = [self.at_size(cost.forward_s, size) for cost in costs]
            back = [self.at_size(cost.backward_s, size) for cost in costs]
            self._unit_seconds[mode, size] = [ahead[k] for k in self.units], [back[k] for k in self.units]
        return self._unit_seconds[mode, size]

    @cached_property
    def _unit_seconds(self) -> dict[tuple[int, float], tuple[list[float], list[float]]]:
        return {}

    def weight_s(self, unit: int, mode: int, size: float) -> float:
        """The part of `backward_s` for gradients of weights that may come later."""
        row = self.every_mode[mode].costs[self.units[unit]].weight_s
        return self.at_size(row, size) if row else 0.0

    def collective_s(self, unit: int, mode: int, size: float) -> float:
        """What a unit's forward and backward of one microbatch spend in collectives of a tensor group."""
        row = self.every_mode[mode].costs[self.units[unit]].collective_s
        return self.at_size(row, size) if row else 0.0

    def split_s(self, unit: int, mode: int, size: float) -> float:
        """What a backward in two halves takes besides, for one microbatch."""
        row = self.every_mode[mode].costs[self.units[unit]].split_s
        return self.at_size(row, size) if row else 0.0

    def cut_bytes(self, boundary: int, size: float) -> tuple[float, float]:
        """Bytes of one microbatch, forward and backward, between units boundary-1 and boundary."""
        forward = backward = 0.0
        for edge in self.edges:
            if edge.source < boundary <= edge.target:
                forward += edge.bytes_per_sample * size + edge.fixed_bytes
                backward += edge.gradient_bytes_per_sample * size + edge.gradient_fixed_bytes
        return forward, backward


def _plain_mode(costs: Sequence[UnitCost], device_class: int) -> Mode:
    return Mode((device_class,), tuple(_plain_cost(cost, device_class) for cost in costs))


def _plain_cost(cost: UnitCost, k: int) -> ModeCost:
    """A unit on one device of a class."""
    deferred = cost.deferred_by_class[k] if cost.deferred_by_class else cost.deferred_bytes
    return ModeCost(
        forward_s=cost.forward_s[k],
        backward_s=cost.backward_s[k],
        optimizer_s=cost.optimizer_s[k],
        weight_bytes=(cost.weights_by_class[k] if cost.weights_by_class else cost.weight_bytes,),
        gradient_bytes=(cost.gradient_bytes,),
        optimizer_bytes=(cost.optimizer_bytes,),
        saved_bytes=(cost.saved_by_class[k] if cost.saved_by_class else cost.saved_bytes,),
        working_bytes=(cost.working_by_class[k] if cost.working_by_class else cost.working_bytes,),
        weight_s=cost.weight_s[k] if cost.weight_s else (),
        deferred_bytes=(deferred,) if deferred else (),
        split_s=cost.split_s[k] if cost.split_s else (),
        again_s=cost.again_s[k] if cost.again_s else (),
    )
