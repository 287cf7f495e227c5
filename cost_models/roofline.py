"""The default cost model: kernels of each op on each kind of device, from the catalogue or measured."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster, Device
from graphpar.cores import CoreUse, SharedCores
from graphpar.cost import (
    CostTable,
    CutEdge,
    DeviceClass,
    LinkCost,
    Topology,
    UnitCost,
)
from graphpar.cost_models.again import run_again
from graphpar.cost_models.classes import device_classes, microbatch_sizes
from graphpar.cost_models.divisible import few_row_bytes, passing_gradient_bytes, repeated_weights
from graphpar.cost_models.layout import Layout, find_layout
from graphpar.cost_models.memory import (
    ALLOCATOR_SLACK,
    CPU_RESERVED_BYTES,
    CPU_WARM_BYTES,
    GPU_CONTEXT_BYTES,
    GPU_MESSAGE_BYTES,
    parameter_bytes,
    saved_roots,
    unit_memory,
)
from graphpar.cost_models.opcost import fan_out_kernels, work_of
from graphpar.cost_models.rates import Rates, rates_of
from graphpar.cost_models.work import Kernel, OpWork
from graphpar.cost_options import PricingOptions
from graphpar.ir.chain import Chain, Crossing, Unit, crossings
from graphpar.ir.formats import multiplies_8_bits, wire_format
from graphpar.ir.graph import Graph
from graphpar.ir.late import late_weights
from graphpar.ir.ops import DTYPE_BYTES, Op, Ref, TensorType

Rewritten = tuple[Graph, Chain]
"""A graph and its chain of units."""

LATE_OP_S = 45e-6
"""What an op on a tape of its own takes besides: a call of a Python function each way and two more of
autograd's engine. Measured on a CPU, where `benchmarks/schedules.py` shows it."""


@dataclass(frozen=True)
class Roofline:
    """Prices a chain of units on a cluster.

    Args:
        calibration: Measured curves of this machine's processor; used for devices of kind `cpu`.
    """

    calibration: Calibration | None = None

    def price(
        self,
        graph: Graph,
        chain: Chain,
        cluster: Cluster,
        options: PricingOptions,
        rewritten: Mapping[str, Rewritten] | None = None,
    ) -> CostTable:
        """Fill the table of seconds and bytes.

        Args:
            graph: A captured graph.
            chain: Its units.
            cluster: The devices.
            options: Batch, training or inference, optimiser, limits on splitting.
            rewritten: By device name the graph that the device runs in place of this one, the same
                units in other number formats; devices left out run this one.
        """
        classes = device_classes(cluster)
        sizes = microbatch_sizes(options)
        examples = [cluster.device(c.devices[0]) for c in classes]
        given = rewritten or {}
        runs = [given.get(device.name, (graph, chain)) for device in examples]
        pricers: dict[int, _Pricer] = {}
        for run in runs:
            if id(run[0]) not in pricers:
                pricers[id(run[0])] = _Pricer(self, *run, options, find_layout(run[0]))
        mine = [pricers[id(run[0])] for run in runs]
        units = _dense([tuple(p.chain.units[u].kind for p in mine) for u in range(len(chain.units))])
        firsts = [units.index(kind) for kind in range(max(units, default=-1) + 1)]
        costs = tuple(_joined(list(zip(mine, examples, strict=True)), i, sizes) for i in firsts)
        most = min(options.max_replicas, len(cluster.devices))
        free_s = [p.free_seconds(d, sizes[0]) for p, d in zip(mine, examples, strict=True)]
        return CostTable(
            batch=options.batch,
            training=options.training,
            sizes=sizes,
            units=units,
            unit_names=tuple(unit.name for unit in chain.units),
            costs=costs,
            edges=_widest([p.edges(crossings(graph, chain)) for p in pricers.values()]),
            device_classes=tuple(
                DeviceClass(
                    c.name,
                    c.devices,
                    c.memory_bytes,
                    free / 2 + self._message_s(device),
                )
                for c, free, device in zip(classes, free_s, examples, strict=True)
            ),
            topology=self.topology(cluster),
            max_microbatches=options.max_microbatches,
            max_replicas=options.max_replicas,
            batch_reason=options.batch_reason,
            tail_reason=options.tail_reason,
            in_step_reason=options.in_step_reason,
            reserved_bytes=max(self._reserved_bytes(d, len(cluster.devices) == 1) for d in examples),
            sum_s_per_byte=self._sum_s_per_byte(cluster),
            repeated=repeated_weights(graph, chain, units, options),
            few_row_bytes=few_row_bytes(graph, chain, units, most) if options.training else (),
            passing_gradient_bytes=passing_gradient_bytes(graph, chain, units)
            if options.training
            else (),
            shared=self.shared_cores(cluster),
        )

    def unpriced(self, graph: Graph) -> tuple[str, ...]:
        """Operators without a rule; they are priced by the bytes they touch."""
        layout = find_layout(graph)
        found = {op.target for op in graph.ops if not work_of(op, graph, layout, 1).known}
        return tuple(sorted(found))

    def _reserved_bytes(self, device: Device, alone: bool) -> float:
        """Memory that a worker takes before it holds anything; torch's builds differ widely."""
        if not device.is_cpu:
            return GPU_CONTEXT_BYTES + (0.0 if alone else GPU_MESSAGE_BYTES)
        measured = self.calibration.worker_bytes if self.calibration and device.is_local_cpu else 0.0
        return measured + CPU_WARM_BYTES if measured else CPU_RESERVED_BYTES

    def _message_s(self, device: Device) -> float:
        """Time a stage's process spends on handing a message to the transport."""
        if device.is_local_cpu and self.calibration is not None:
            if self.calibration.send_s:
                return 0.0  # the simulator knows which messages there are
            return self.calibration.loopback.latency_s / 2 * device.slowdown
        return 20e-6 * device.slowdown

    def _sum_s_per_byte(self, cluster: Cluster) -> float:
        """What gradient sums cost this machine's processor; only measured where all workers run on it."""
        local = all(device.is_local_cpu for device in cluster.devices)
        measured = self.calibration
        if not local or measured is None or len(cluster.devices) < 2:
            return 0.0
        links = [node.link for node in cluster.nodes if len(node.devices) > 1]
        links += [cluster.network] if len(cluster.nodes) > 1 else []
        if not any(link.emulated for link in links):
            return measured.sum_s_per_byte
        # Sums over an emulated link run while it is waited for: what is seen of them is what they take
        # longer than the link, and the copy that gathers gradients before, shared out over the messages.
        real_s = measured.sum_s_per_byte + 1 / measured.loopback.bytes_per_s
        fastest = max(
            link.bytes_per_s if link.emulated else measured.loopback.bytes_per_s for link in links
        )
        holders = len(cluster.devices)
        gathering_s = 2 / measured.memory_bytes_per_s * holders / (2 * (holders - 1))
        return max(real_s - 1 / fastest, gathering_s)

    def shared_cores(self, cluster: Cluster) -> SharedCores | None:
        """Which devices share this machine's cores; None where nothing is measured, or on named hosts."""
        here = [device for device in cluster.devices if device.is_local_cpu]
        if self.calibration is None or not here or any(node.host for node in cluster.nodes):
            return None
        workers = {device.name: CoreUse(device.threads, device.slowdown) for device in here}
        mine = self.calibration
        handling = mine.send_s, mine.receive_s
        return SharedCores(mine.fingerprint.num_cores, mine.slowing, workers, mine.reference_s, *handling)

    def topology(self, cluster: Cluster) -> Topology:
        """The cluster's links, with the measured loopback where this machine talks to itself."""
        topology = cluster.topology()
        if self.calibration is None:
            return topology
        measured = self.calibration.loopback
        inside = dict(topology.inside)
        for node in cluster.nodes:
            if node.link.kind == "loopback" and any(d.is_local_cpu for d in node.devices):
                inside[node.name] = measured
        is_loopback = cluster.network.kind == "loopback"
        network: LinkCost = measured if is_loopback else topology.network
        return Topology(topology.node_of, inside, network, topology.between)


def _dense(kinds: Sequence[Hashable]) -> tuple[int, ...]:
    """Kinds renumbered in order of first appearance, which is the order of the costs."""
    number: dict[Hashable, int] = {}
    for kind in kinds:
        number.setdefault(kind, len(number))
    return tuple(number[kind] for kind in kinds)


def _joined(runs: Sequence[tuple["_Pricer", Device]], index: int, sizes: Sequence[int]) -> UnitCost:
    """What a unit costs on devices that run it in unlike formats."""
    groups: dict[int, tuple[_Pricer, list[Device]]] = {}
    for pricer, device in runs:
        groups.setdefault(id(pricer), (pricer, []))[1].append(device)
    costs = {key: pricer.unit_cost(index, devices, sizes) for key, (pricer, devices) in groups.items()}
    if len(costs) == 1:
        return next(iter(costs.values()))
    seen = dict.fromkeys(costs, 0)
    rows = []
    for pricer, _ in runs:
        rows.append((costs[id(pricer)], seen[id(pricer)]))
        seen[id(pricer)] += 1
    all_costs = list(costs.values())
    can_defer = all(cost.weight_s for cost in all_costs)
    return replace(
        all_costs[0],
        forward_s=tuple(cost.forward_s[row] for cost, row in rows),
        backward_s=tuple(cost.backward_s[row] for cost, row in rows),
        optimizer_s=tuple(cost.optimizer_s[row] for cost, row in rows),
        weight_bytes=max(cost.weight_bytes for cost in all_costs),
        saved_bytes=tuple(map(max, *(cost.saved_bytes for cost in all_costs))),
        weight_s=tuple(cost.weight_s[row] for cost, row in rows) if can_defer else (),
        deferred_bytes=tuple(map(max, *(c.deferred_bytes for c in all_costs))) if can_defer else (),
        split_s=tuple(cost.split_s[row] for cost, row in rows) if can_defer else (),
        again_s=tuple(cost.again_s[row] for cost, row in rows) if all_costs[0].again_s else (),
        working_bytes=tuple(map(max, *(cost.working_bytes for cost in all_costs))),
        weights_by_class=tuple(cost.weight_bytes for cost, _ in rows),
        saved_by_class=tuple(cost.saved_bytes for cost, _ in rows),
        working_by_class=tuple(cost.working_bytes for cost, _ in rows),
        deferred_by_class=tuple(cost.deferred_bytes for cost, _ in rows) if can_defer else (),
    )


def _widest(several: Sequence[tuple[CutEdge, ...]]) -> tuple[CutEdge, ...]:
    """The same edges with the most bytes that any format needs."""
    if len(several) == 1:
        return several[0]
    return tuple(
        replace(
            edges[0],
            bytes_per_sample=max(e.bytes_per_sample for e in edges),
            gradient_bytes_per_sample=max(e.gradient_bytes_per_sample for e in edges),
            fixed_bytes=max(e.fixed_bytes for e in edges),
        )
        for edges in zip(*several, strict=True)
    )


@dataclass(frozen=True)
class _Pricer:
    """Works out one graph; kernels do not depend on the device and are computed once per size."""

    model: Roofline
    graph: Graph
    chain: Chain
    options: PricingOptions
    layout: Layout

    def unit_cost(self, index: int, devices: Sequence[Device], sizes: Sequence[int]) -> UnitCost:
        unit = self.chain.units[index]
        works = [self._works(unit.ops, size) for size in sizes]
        sources = self._own_sources(index)
        weights, trained, numel, tensors = parameter_bytes(self.graph, sources)
        options = self.options
        memory = [
            unit_memory(
                self.graph,
                self.layout,
                work,
                self._owned(index),
                size,
                options.precision,
                options.training,
            )
            for work, size in zip(works, sizes, strict=True)
        ]
        copies, lower = self._lower_weights(unit)
        late = self._late(unit)
        rates = [rates_of(device, self.model.calibration) for device in devices]
        state = options.optimizer_state_bytes_per_parameter_byte
        met = [op for op in map(self.graph.__getitem__, unit.ops) if op.attr("meets")]
        return UnitCost(
            name=unit.name,
            meetings=len(met),
            met_bytes=sum(map(self._met_bytes, met)),
            forward_s=tuple(
                tuple(self._forward_s(rate, work) * device.slowdown for work in works)
                for rate, device in zip(rates, devices, strict=True)
            ),
            backward_s=tuple(
                tuple(
                    self._backward_s(rate, unit, work, size, trained) * device.slowdown
                    for work, size in zip(works, sizes, strict=True)
                )
                for rate, device in zip(rates, devices, strict=True)
            ),
            optimizer_s=tuple(
                self._update_s(rate, numel, tensors, lower) * device.slowdown
                for rate, device in zip(rates, devices, strict=True)
            ),
            weight_bytes=weights + copies,
            gradient_bytes=trained if options.training else 0.0,
            optimizer_bytes=trained * state if options.training else 0.0,
            saved_bytes=tuple(m.saved_bytes for m in memory),
            working_bytes=tuple(m.working_bytes for m in memory),
            weight_s=self._weight_s(late, works, list(zip(rates, devices, strict=True))),
            deferred_bytes=tuple(self._deferred_bytes(late, size) for size in sizes) if late else (),
            split_s=tuple(LATE_OP_S * len(late) * d.slowdown for d in devices) if late else (),
            again_s=self._again_s(works, list(zip(rates, devices, strict=True))),
        )

    def _again_s(
        self, works: Sequence[dict[str, OpWork]], devices: Sequence[tuple[Rates, Device]]
    ) -> tuple[tuple[float, ...], ...]:
        if not self.options.training:
            return ()
        again = [{name: work[name] for name in run_again(self.graph, work)} for work in works]
        return tuple(
            tuple(self._forward_s(rate, work) * device.slowdown for work in again)
            for rate, device in devices
        )

    def _late(self, unit: Unit) -> dict[str, tuple[int, ...]]:
        """The unit's ops whose weights may get their gradients later, with the places of these."""
        if not self.options.training:
            return {}
        found = {name: late_weights(self.graph, self.graph[name]) for name in unit.ops}
        return {name: places for name, places in found.items() if places}

    def _weight_s(
        self,
        late: Mapping[str, tuple[int, ...]],
        works: Sequence[dict[str, OpWork]],
        devices: Sequence[tuple[Rates, Device]],
    ) -> tuple[tuple[float, ...], ...]:
        """What gradients of weights take that may be made later, adding them up included."""
        if not late:
            return ()
        weights = {self.layout.root[a] for name, places in late.items() for a in self._at(name, places)}
        trained = float(sum(self.graph[name].type.bytes(1) for name in weights))
        adding = [Kernel("accumulate", trained / 4, 3 * trained, trained / 4)]
        more = adding if self.options.max_microbatches > 1 else []
        return tuple(
            tuple(
                rate.seconds([*(k for n in late for k in work[n].late), *more], backward=True)
                * device.slowdown
                for work in works
            )
            for rate, device in devices
        )

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
        clip_s = rates.clip_seconds(numel, tensors) if options.clips_gradients else 0.0
        state = options.optimizer_state_bytes_per_parameter_byte
        update_s = clip_s + rates.optimizer_seconds(numel, tensors, state)
        return update_s + rates.seconds(lower) if lower else update_s

    def _lower_weights(self, unit: Unit) -> tuple[float, list[Kernel]]:
        """Bytes of a unit's weights in lower formats, and the kernels that make them once a step."""
        casts = [self.graph[name] for name in unit.ops if self.graph[name].target == "gp.cast_weight"]
        wide = DTYPE_BYTES["float32"]
        held, kernels = 0.0, []
        for op in casts:
            elements, size = op.type.numel(1), float(op.type.bytes(1))
            kernels.append(Kernel("cast", elements, size + wide * elements, elements))
            held += size
            if len(op.type.shape) == 2 and any(map(multiplies_8_bits, self.graph.users(op.name))):
                # Read for the largest element, scaled, cast, and turned once more for the backward.
                kernels.append(Kernel("cast", elements, 11.0 * elements, elements))
                held += 2.0 * elements
        return held, kernels

    def free_seconds(self, device: Device, size: int) -> float:
        """Time of the ops that every stage computes for itself."""
        works = self._works(tuple(sorted(self.chain.free)), size)
        rate = rates_of(device, self.model.calibration)
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
            gradient = each if flows and all(t.is_floating for t in kinds) else 0.0
            found.append(CutEdge(crossing.source, crossing.target, each, gradient, fixed))
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
        return {name: self._work(self.graph[name], size) for name in names}

    def _work(self, op: Op, size: int) -> OpWork:
        """One op's work; of the tail, which runs once on the whole batch, the part of these samples."""
        precision = self.options.precision
        if not op.attr("tail"):
            return work_of(op, self.graph, self.layout, size, precision)
        whole = work_of(op, self.graph, self.layout, self.options.batch, precision)
        return whole.part(size / self.options.batch)

    def _forward_s(self, rates: Rates, works: dict[str, OpWork]) -> float:
        return rates.seconds(k for work in works.values() for k in work.forward)

    def _backward_s(
        self, rates: Rates, unit: Unit, works: dict[str, OpWork], size: int, trained: float
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
