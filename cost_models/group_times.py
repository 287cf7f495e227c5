"""What ops, weights and collectives cost a tensor group: seconds and bytes at its slowest member."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from graphpar.cost import LinkCost
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.rates import CatalogueRates, Rates
from graphpar.cost_models.work import Kernel, OpWork
from graphpar.device import Device
from graphpar.ir.conversions import CollectiveName
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, axis_shares, line_of
from graphpar.ir.ops import SOURCES, Op, apportion
from graphpar.ir.strategies import Strategy

_CPU_CALL_S = 1e-4
"""Processor time of the calling thread in a gloo collective of few bytes, its autograd node included:
75 to 130 microseconds for a sum, twice that for an exchange, on an AMD EPYC, torch 2.13, 2026-11-25."""
WORKLESS = SOURCES | {"gp.send", "gp.recv", "output", "getitem"}
BATCH_CUT_S = 1e-9
"""What an op whose samples are cut costs beside its time: of two ways that take equally long the one that
suits microbatches of any size is taken."""
_CALLS: dict[CollectiveName, int] = {
    "all_reduce": 1,
    "all_gather": 2,
    "reduce_scatter": 2,
    "all_to_all": 2,
}
_COPIED: dict[CollectiveName, float] = {
    "all_reduce": 0.5, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0
}  # fmt: skip
"""How much of the value a member copies for itself: to slices and back, or for a sum half of it."""


Numbers = npt.NDArray[np.intp]
Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TensorGroup:
    """Who shares a stage.

    Attributes:
        devices: The members.
        shares: Each member's share of what is cut.
        link: The worst link between two of them.
        mesh: Members along each axis of a group of two, row by row; empty for one.
        links: The worst link between members that differ along one axis alone, by axis; empty for `link`.
    """

    devices: tuple[Device, ...]
    shares: tuple[float, ...]
    link: LinkCost
    mesh: tuple[int, ...] = ()
    links: tuple[LinkCost, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """Members along each axis."""
        return self.mesh or (self.size,)

    def along(self, axis: int) -> "TensorGroup":
        """The line of the first member along an axis, with the shares that members have along it."""
        if not self.mesh:
            return self
        line = line_of(0, axis, self.mesh)
        shares = axis_shares(self.shares, self.mesh)[axis]
        link = self.links[axis] if self.links else self.link
        return TensorGroup(tuple(self.devices[k] for k in line), shares, link)

    @property
    def size(self) -> int:
        """Members."""
        return len(self.devices)

    def seconds(self, name: CollectiveName | None, num_bytes: float) -> float:
        """Time of a collective over a value of so many bytes: a ring, messages of 1/n of it.

        An all-to-all of slices sends 1/n of each slice to each member.
        """
        if name is None:
            return 0.0
        turns = self.size - 1
        part = num_bytes / self.size / (self.size if name == "all_to_all" else 1)
        return (
            (2 if name == "all_reduce" else 1)
            * turns
            * (self.link.latency_s + part / self.link.bytes_per_s)
        )


@dataclass(frozen=True)
class ShardingOptions:
    """What the programme has to know besides graph and group.

    Attributes:
        samples: Samples in a microbatch.
        microbatches: Microbatches between two optimiser steps.
        training: Whether there is a backward.
        state_ratio: Bytes of optimiser state per byte of weights.
        fixed: Layouts of weights by label, along each axis, that are given: those an earlier job holds.
        cuts_batch: Whether the samples of a microbatch may be cut, if there are enough.
        cuts_weights: False keeps every weight whole, for optimisers that must see whole ones.
        memory_bytes: Most bytes that weights, gradients, optimiser state and the activations of one
            microbatch may take at a member; None for no limit.
        hold_factor: Price of memory: a byte of weights, gradients and optimiser state that a member
            holds counts as so many bytes sent. 0 lets time alone decide, which often keeps weights
            whole and cuts the sequence.
        keep_factor: The same for a byte that a member keeps from forward to backward.
    """

    samples: int
    microbatches: int = 4
    training: bool = True
    state_ratio: float = 2.0
    fixed: Mapping[str, Layouts] = field(default_factory=dict)
    cuts_batch: bool = True
    cuts_weights: bool = True
    memory_bytes: float | None = None
    hold_factor: float = 0.0
    keep_factor: float = 0.0


class KnownWork:
    """What was worked out of a graph's ops, by microbatch size and devices; groups share it.

    Args:
        graph: The lowered graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.layout = find_layout(graph)
        self.keepers: Counter[str] | None = None
        self._works: dict[int, dict[str, OpWork]] = {}
        self._ends: dict[object, dict[str, tuple[_Ends, ...]]] = {}
        self._rows: dict[object, dict[tuple[str, ...], Rows]] = {}

    def works(self, samples: int) -> dict[str, OpWork]:
        """By op what it asks of one device that computes it whole."""
        return self._works.setdefault(samples, {})

    def ends(self, samples: int, rates: object) -> "dict[str, tuple[_Ends, ...]]":
        """By op what it takes devices of some rates."""
        return self._ends.setdefault((samples, rates), {})

    def rows(self, samples: int, rates: object) -> "dict[tuple[str, ...], Rows]":
        """The same of several ops in one array."""
        return self._rows.setdefault((samples, rates), {})


class OpTimes:
    """Seconds and bytes of ops for one group; see `MeshTimes` for what is sent.

    Args:
        graph: The lowered graph.
        group: Who computes.
        options: Microbatch size and the like.
        rates: Rates of each member; from the catalogue when left out, so that every rank of a job
            decides the same whatever was measured on its machine.
        known: What was worked out of the graph, to be used and added to.
    """

    def __init__(
        self,
        graph: Graph,
        group: TensorGroup,
        options: ShardingOptions,
        rates: Callable[[Device], Rates] = CatalogueRates,
        known: KnownWork | None = None,
    ) -> None:
        self.graph, self.group, self.options = graph, group, options
        self._known = known or KnownWork(graph)
        self.layout = self._known.layout
        self._kinds = _kinds_of(group.devices)
        firsts = [group.devices[self._kinds.index(kind)] for kind in range(max(self._kinds) + 1)]
        self._rates = [(rates(device), device.slowdown, device.is_cpu) for device in firsts]
        kinds = tuple(replace(device, name="", node="", memory_bytes=0) for device in firsts)
        listed = all(isinstance(rate[0], CatalogueRates) for rate in self._rates)
        # Measured rates are not compared: what they give is found for each group.
        self._priced_by: object = (kinds, options.training) if listed else object()
        self._works = self._known.works(options.samples)
        self._whole = self._known.ends(options.samples, self._priced_by)
        self._rows = self._known.rows(options.samples, self._priced_by)
        self._of_kernels: dict[tuple[tuple[Kernel, ...], ...], tuple[_Ends, ...]] = {}
        self._pairs: dict[tuple[float, ...], tuple[Portion, ...]] = {}

    def at(self, samples: int) -> "OpTimes":
        """The same for microbatches of another size; what kernels take is found once for all."""
        other = copy(self)
        other.options = replace(self.options, samples=samples)
        other._works = self._known.works(samples)
        other._whole = self._known.ends(samples, self._priced_by)
        other._rows = self._known.rows(samples, self._priced_by)
        return other

    def parts(self, op: Op, strategy: Strategy) -> tuple[float, float]:
        """Forward and backward seconds at the member that takes longest."""
        return self.parts_at(op, self.unlike(self.shares_of(strategy) or (1.0,) * self.group.size))

    def parts_at(self, op: Op, shares: "Sequence[Portion]") -> tuple[float, float]:
        """The same where members have these shares of it."""
        if op.target in WORKLESS:
            return 0.0, 0.0
        ends = self._members(op)
        times = []
        for kind, share in shares:
            full, floor, full_b, floor_b = ends[kind]
            times.append((floor + (full - floor) * share, floor_b + (full_b - floor_b) * share))
        return max(t[0] for t in times), max(t[1] for t in times)

    def several(self, ops: Sequence[Op], kinds: Numbers, shares: Rows) -> tuple[list[float], list[float]]:
        """Forward and backward seconds of each of some ops, as `parts_at`.

        Args:
            ops: What is computed.
            kinds: [op, portion]: the kind of members.
            shares: [op, portion]: the share of each such member.
        """
        names = tuple([op.name for op in ops])
        if names not in self._rows:
            none = ((0.0,) * 4,) * len(self._rates)
            self._rows[names] = np.array(
                [none if op.target in WORKLESS else self._members(op) for op in ops]
            ).reshape(len(ops), len(self._rates), 4)
        full, floor, full_b, floor_b = np.moveaxis(
            self._rows[names][np.arange(len(ops))[:, None], kinds], 2, 0
        )
        ahead, behind = floor + (full - floor) * shares, floor_b + (full_b - floor_b) * shares
        return ahead.max(axis=1).tolist(), behind.max(axis=1).tolist()

    def shares_of(self, strategy: Strategy) -> tuple[float, ...]:
        """Each member's part of the work; of samples there are only whole ones."""
        if not strategy.samples:
            return strategy.shares
        samples = self.options.samples
        return tuple(part / samples for part in apportion(samples, strategy.samples))

    def unlike(self, shares: tuple[float, ...]) -> "tuple[Portion, ...]":
        """Kinds of members with their shares, each pair once: equal members take equally long."""
        if shares not in self._pairs:
            self._pairs[shares] = tuple(dict.fromkeys(zip(self._kinds, shares, strict=True)))
        return self._pairs[shares]

    def _members(self, op: Op) -> "tuple[_Ends, ...]":
        """What the op takes each kind of member."""
        if op.name not in self._whole:
            work = self.work(op)
            kernels = (work.forward, work.backward if self.options.training else ())
            if kernels not in self._of_kernels:
                self._of_kernels[kernels] = tuple(_ends(*kernels, *rate[:2]) for rate in self._rates)
            self._whole[op.name] = self._of_kernels[kernels]
        return self._whole[op.name]

    def work(self, op: Op) -> OpWork:
        """What the op asks of one device that computes it whole."""
        if op.name not in self._works:
            self._works[op.name] = work_of(op, self.graph, self.layout, self.options.samples)
        return self._works[op.name]

    @property
    def keepers(self) -> Counter[str]:
        """How many ops keep a storage for their backward, of however many samples."""
        if self._known.keepers is None:
            works = (self.work(op) for op in self.graph.ops if op.target not in WORKLESS)
            self._known.keepers = Counter(
                root
                for work in works
                if work.backward
                for root in {self.layout.root[name] for name in work.saved}
            )
        return self._known.keepers

    def host_seconds(self, name: CollectiveName | None, num_bytes: float) -> float:
        """What a collective asks of a CPU itself: calls, and copies to where slices belong."""
        if name is None:
            return 0.0
        copied = Kernel("copy", num_bytes / 4, 2 * num_bytes * _COPIED[name])
        return max(
            (
                slowdown * (_CPU_CALL_S * _CALLS[name] + rate.seconds([copied]))
                for rate, slowdown, is_cpu in self._rates
                if is_cpu
            ),
            default=0.0,
        )

    def step_seconds(self, op: Op, shares: tuple[float, ...]) -> float:
        """A microbatch's part of the optimiser's time for a weight of which members hold these parts."""
        if not self.options.training or not op.attr("grad"):
            return 0.0
        numel = op.type.numel(1)
        times = (
            self._rates[kind][0].optimizer_seconds(numel * share, 1, self.options.state_ratio)
            * self._rates[kind][1]
            for kind, share in self.unlike(shares)
        )
        return max(times) / self.options.microbatches

    def weight_bytes(self, op: Op, share: float) -> float:
        """Weight, gradient and optimiser state at a member with this part of it."""
        trained = self.options.training and bool(op.attr("grad"))
        times = 2 + self.options.state_ratio if trained else 1.0
        return op.type.bytes(1) * times * share


Portion = tuple[int, float]
"""A kind of members, and the share that some of them have."""

_Ends = tuple[float, float, float, float]
"""Seconds forward, the part of them that no split shortens, and the same backward."""


def _ends(
    forward: tuple[Kernel, ...], backward: tuple[Kernel, ...], rate: Rates, slowdown: float
) -> _Ends:
    ahead, empty = rate.seconds(forward), rate.seconds(_empty(forward))
    behind, hollow = (rate.seconds(ks, backward=True) for ks in (backward, _empty(backward)))
    return (
        slowdown * ahead,
        slowdown * min(empty, ahead),
        slowdown * behind,
        slowdown * min(hollow, behind),
    )


def _kinds_of(devices: Sequence[Device]) -> list[int]:
    """For each device a number; devices that differ in name and place alone have the same."""
    found: list[Device] = []
    numbers = []
    for device in devices:
        nameless = replace(device, name="", node="")
        if nameless not in found:
            found.append(nameless)
        numbers.append(found.index(nameless))
    return numbers


def _empty(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The same launches with nothing to do but start."""
    return [replace(k, elements=1.0, bytes=1.0, flops=0.0, matrix=None, attention=None) for k in kernels]
