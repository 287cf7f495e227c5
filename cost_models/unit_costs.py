"""What one unit costs in seconds and bytes on each kind of device, from the kernels of its ops."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from graphpar.calibration import Calibration
from graphpar.cluster import Device
from graphpar.cost import CutEdge, UnitCost
from graphpar.cost_models.again import run_again
from graphpar.cost_models.layout import Layout
from graphpar.cost_models.memory import (
    ALLOCATOR_SLACK,
    UnitMemory,
    is_scaled,
    lower_copy_bytes,
    parameter_bytes,
    saved_roots,
    unit_memory,
)
from graphpar.cost_models.opcost import fan_out_kernels, work_of
from graphpar.cost_models.rates import Rates, rates_of
from graphpar.cost_models.work import Kernel, OpWork
from graphpar.cost_options import PricingOptions
from graphpar.ir.chain import Chain, Crossing, Unit
from graphpar.ir.formats import base_format, format_of, wire_format
from graphpar.ir.graph import Graph
from graphpar.ir.late import late_weights
from graphpar.ir.ops import DTYPE_BYTES, Op, Ref, TensorType

LATE_OP_S = 45e-6
"""What an op on a tape of its own takes besides: a call of a Python function each way and two more of
autograd's engine. Measured on a CPU, where `benchmarks/schedules.py` shows it."""


@dataclass(frozen=True)
class _Seconds:
    """Of a unit on a device at one size: both directions, gradients made late, and computing again."""

    forward_s: float
    backward_s: float
    weight_s: float
    again_s: float

    def slower(self, times: float) -> "_Seconds":
        """On a device that is so many times slower."""
        return _Seconds(
            self.forward_s * times, self.backward_s * times, self.weight_s * times, self.again_s * times
        )


@dataclass(frozen=True)
class UnitPricer:
    """Works out one graph; kernels do not depend on the device and are computed once per size.

    `works` are the ops' kernels by name and size, `memories` what units keep by number and size, and
    `seconds` what they take by name, device and size. They may be shared with pricers of the same graph
    for other batches, where nothing depends on the whole batch.
    """

    graph: Graph
    chain: Chain
    options: PricingOptions
    layout: Layout
    calibration: Calibration | None
    works: dict[tuple[str, int], OpWork] = field(default_factory=dict, repr=False)
    memories: dict[tuple[int, int, bool, bool], UnitMemory] = field(default_factory=dict, repr=False)
    seconds: dict[tuple[str, Device, int, bool], _Seconds] = field(default_factory=dict, repr=False)

    def unit_cost(self, index: int, devices: Sequence[Device], sizes: Sequence[int]) -> UnitCost:
        """What a unit costs on each of these devices, at each of these microbatch sizes.

        Bytes are those of a processor where any of them is one.
        """
        unit = self.chain.units[index]
        weights, trained, numel, tensors = parameter_bytes(self.graph, self._own_sources(index))
        options = self.options
        on_cpu = any(device.is_cpu for device in devices)
        memory = [self._memory(index, size, on_cpu) for size in sizes]
        copies, lower = self._lower_weights(unit)
        late = self._late(unit)
        state = options.optimizer_state_bytes_per_parameter_byte
        met = [op for op in map(self.graph.__getitem__, unit.ops) if op.attr("meets")]
        times = [
            [self._seconds(unit, late, trained, device, size) for size in sizes] for device in devices
        ]

        def each(part: Callable[[_Seconds], float]) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(map(part, row)) for row in times)

        return UnitCost(
            name=unit.name,
            meetings=len(met),
            met_bytes=sum(map(self._met_bytes, met)),
            forward_s=each(lambda at: at.forward_s),
            backward_s=each(lambda at: at.backward_s),
            optimizer_s=tuple(
                self._update_s(rates_of(device, self.calibration), numel, tensors, lower)
                * device.slowdown
                for device in devices
            ),
            weight_bytes=weights + copies,
            gradient_bytes=trained if options.training else 0.0,
            optimizer_bytes=trained * state if options.training else 0.0,
            saved_bytes=tuple(m.saved_bytes for m in memory),
            # Holes in a heap are smaller at some larger sizes, where values happen to fit.
            working_bytes=tuple(accumulate((m.working_bytes for m in memory), max)),
            growing_bytes=tuple(m.growing_bytes for m in memory) if options.training and on_cpu else (),
            weight_s=each(lambda at: at.weight_s) if late else (),
            deferred_bytes=tuple(self._deferred_bytes(late, size) for size in sizes) if late else (),
            split_s=tuple((LATE_OP_S * len(late) * d.slowdown,) * len(sizes) for d in devices)
            if late
            else (),
            again_s=each(lambda at: at.again_s) if options.training else (),
        )

    def _seconds(
        self, unit: Unit, late: Mapping[str, tuple[int, ...]], trained: float, device: Device, size: int
    ) -> "_Seconds":
        """What a unit takes on a device at one size; the same in every batch that adds gradients up."""
        key = unit.name, device, size, self.options.max_microbatches > 1
        if key not in self.seconds:
            works, rates = self._works(unit.ops, size), rates_of(device, self.calibration)
            again = run_again(self.graph, works) if self.options.training else ()
            found = _Seconds(
                forward_s=self._forward_s(rates, works),
                backward_s=self._backward_s(rates, unit, works, size, trained),
                weight_s=self._weight_s(rates, late, works) if late else 0.0,
                again_s=self._forward_s(rates, {name: works[name] for name in again}),
            )
            self.seconds[key] = found.slower(device.slowdown)
        return self.seconds[key]

    def _memory(self, index: int, size: int, on_cpu: bool) -> UnitMemory:
        """What a unit keeps and needs for a microbatch of this size."""
        # The graph may be that of another batch.
        again = self.options.max_microbatches > 1 and size < self.options.batch
        key = index, size, on_cpu, again
        if key not in self.memories:
            works = self._works(self.chain.units[index].ops, size)
            how = self.options.precision, self.options.training, on_cpu, again
            self.memories[key] = unit_memory(
                self.graph, self.layout, works, self._owned(index), size, *how
            )
        return self.memories[key]

    def _late(self, unit: Unit) -> dict[str, tuple[int, ...]]:
        """The unit's ops whose weights may get their gradients later, with the places of these."""
        if not self.options.training:
            return {}
        found = {name: late_weights(self.graph, self.graph[name]) for name in unit.ops}
        return {name: places for name, places in found.items() if places}

    def _weight_s(
        self, rates: Rates, late: Mapping[str, tuple[int, ...]], works: Mapping[str, OpWork]
    ) -> float:
        """What gradients of weights take that may be made later, adding them up included."""
        weights = {self.layout.root[a] for name, places in late.items() for a in self._at(name, places)}
        trained = float(sum(self.graph[name].type.bytes(1) for name in weights))
        adding = [Kernel("accumulate", trained / 4, 3 * trained, trained / 4)]
        more = adding if self.options.max_microbatches > 1 else []
        return rates.seconds([*(k for n in late for k in works[n].late), *more], backward=True)

    def _at(self, name: str, places: Sequence[int]) -> list[str]:
        """The values at some places of an op's arguments."""
        return [a.name for i, a in enumerate(self.graph[name].args) if i in places and isinstance(a, Ref)]

    def _deferred_bytes(self, late: Mapping[str, tuple[int, ...]], size: int) -> float:
        """Until the weights' gradients are made: operands, by storage, and gradients of results."""
        operands = {
            self.layout.root[o]
            for name, places in late.items()
            for o in set(self.graph[name].operands()) - set(self._at(name, places))
        }
        kept = (t for name in (*operands, *late) for t in self.graph[name].types if t is not None)
        return self._bytes(list(kept), size) * ALLOCATOR_SLACK

    def _met_bytes(self, op: Op) -> float:
        """What one part tells another: a sum, or three numbers in float64 for each channel."""
        if op.target == "gp.sum_parts":
            return float(op.type.bytes(1))
        channels = op.type.shape[1]
        assert isinstance(channels, int)
        return 3.0 * DTYPE_BYTES["float64"] * channels

    def _update_s(self, rates: Rates, numel: float, tensors: int, lower: Sequence[Kernel]) -> float:
        """What happens to the unit's parameters once their gradients are summed.

        `lower` are the kernels that make copies in lower formats of the new weights.
        """
        options = self.options
        if not (options.training and tensors):
            return 0.0
        # Looking for overflows reads gradients as their norm does, and taking off the scale is clipping.
        times = options.clips_gradients + self._scales_loss
        clip_s = times * rates.clip_seconds(numel, tensors) if times else 0.0
        state = options.optimizer_state_bytes_per_parameter_byte
        update_s = clip_s + rates.optimizer_seconds(numel, tensors, state)
        return update_s + rates.seconds(lower) if lower else update_s

    @cached_property
    def _scales_loss(self) -> bool:
        """Whether something computes in float16, so that gradients are scaled."""
        return any(base_format(format_of(op)) == "float16" for op in self.graph.ops)

    def _lower_weights(self, unit: Unit) -> tuple[float, list[Kernel]]:
        """Bytes of a unit's weights in lower formats, and the kernels that make them once a step."""
        casts = [self.graph[name] for name in unit.ops if self.graph[name].target == "gp.cast_weight"]
        wide = DTYPE_BYTES["float32"]
        held, kernels = 0.0, []
        for op in casts:
            elements, size = op.type.numel(1), float(op.type.bytes(1))
            kernels.append(Kernel("cast", elements, size + wide * elements, elements))
            held += lower_copy_bytes(self.graph, op)
            if is_scaled(self.graph, op):
                # Read for the largest element, scaled, cast, and turned once more for the backward.
                kernels.append(Kernel("cast", elements, 11.0 * elements, elements))
        return held, kernels

    def free_seconds(self, device: Device, size: int) -> float:
        """Time of the ops that every stage computes for itself."""
        works = self._works(tuple(sorted(self.chain.free)), size)
        rate = rates_of(device, self.calibration)
        return self._forward_s(rate, works) * device.slowdown

    def edges(self, values: Sequence[Crossing]) -> tuple[CutEdge, ...]:
        """Values that cross unit boundaries, with their bytes per sample."""
        found = []
        for crossing in values:
            op = self.graph[crossing.name]
            kinds = [self._on_the_wire(op, t) for t in op.types if t is not None]
            fixed, each = self._bytes(kinds, 0), self._bytes(kinds, 1)
            flows = self.options.training and bool(op.attr("grad"))
            if all(not t.batch_dims for t in kinds):
                fixed, each = each, 0.0
            back = (each, fixed) if flows and all(t.is_floating for t in kinds) else (0.0, 0.0)
            found.append(CutEdge(crossing.source, crossing.target, each, back[0], fixed, back[1]))
        return tuple(found)

    def _on_the_wire(self, op: Op, kind: TensorType) -> TensorType:
        """The type in which a value goes to a later stage."""
        if op.attr("format") is None or op.is_tuple:
            return kind
        return TensorType(kind.shape, wire_format(op, self.graph.users(op.name)))

    def _bytes(self, kinds: Sequence[TensorType], batch: int) -> float:
        precision = self.options.precision
        return float(
            sum(
                t.numel(batch) * DTYPE_BYTES[precision if t.dtype == "float32" else t.dtype]
                for t in kinds
            )
        )

    def _works(self, names: tuple[str, ...], size: int) -> dict[str, OpWork]:
        for name in names:
            if (name, size) not in self.works:
                self.works[name, size] = self._work(self.graph[name], size)
        return {name: self.works[name, size] for name in names}

    def _work(self, op: Op, size: int) -> OpWork:
        """One op's work; of the tail, which runs once on the whole batch, the part of these samples."""
        precision = self.options.precision
        if not op.attr("tail"):
            return work_of(op, self.graph, self.layout, size, precision)
        whole = work_of(op, self.graph, self.layout, self.options.batch, precision)
        return whole.part(size / self.options.batch)

    def _forward_s(self, rates: Rates, works: Mapping[str, OpWork]) -> float:
        return rates.seconds(k for work in works.values() for k in work.forward)

    def _backward_s(
        self, rates: Rates, unit: Unit, works: Mapping[str, OpWork], size: int, trained: float
    ) -> float:
        if not self.options.training:
            return 0.0
        kernels = [k for work in works.values() for k in work.backward]
        for name in unit.ops:
            kernels += fan_out_kernels(self.graph[name], self.graph, size, self.options.precision)
        if trained and self.options.max_microbatches > 1:
            # Gradients of later microbatches are added to those of earlier ones.
            kernels.append(Kernel("accumulate", trained / 4, 3 * trained, trained / 4))
        return rates.seconds(kernels, backward=True)

    def _own_sources(self, index: int) -> tuple[str, ...]:
        """Parameters and buffers whose first user is this unit."""
        earlier = {name for unit in self.chain.units[:index] for name in unit.ops}
        mine = self.chain.units[index].ops
        found = dict.fromkeys(
            operand
            for name in mine
            for operand in self.graph[name].operands()
            if self.graph[operand].target in ("parameter", "buffer")
        )
        return tuple(
            name for name in found if not any(user.name in earlier for user in self.graph.users(name))
        )

    def _owned(self, index: int) -> frozenset[str]:
        """Storage that counts to this unit: its own, and what comes in and no earlier unit keeps."""
        unit = self.chain.units[index]
        inside = set(unit.ops)
        incoming = {
            self.layout.root[operand]
            for name in unit.ops
            for operand in self.graph[name].operands()
            if operand not in inside
        }
        kept_before = self._kept_before(index, frozenset(incoming))
        return frozenset(inside | (incoming - kept_before - self.chain.free))

    def _kept_before(self, index: int, names: frozenset[str]) -> frozenset[str]:
        """Which of these values an earlier unit keeps already."""
        unit_of = self.chain.unit_of()
        users = {
            user.name
            for root in names
            for user in self._users_of_storage(root)
            if unit_of.get(user.name, index) < index
        } | {n for n in names if unit_of.get(n, index) < index}
        works = self._works(tuple(sorted(users)), 1)
        return saved_roots(self.graph, self.layout, works) & names

    def _users_of_storage(self, root: str) -> tuple[Op, ...]:
        return tuple(user for name in self.layout.sharers[root] for user in self.graph.users(name))
