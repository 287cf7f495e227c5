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
from graphpar.cost_models.classes import device_classes, microbatch_sizes
from graphpar.cost_models.divisible import (
    few_row_bytes,
    largest_gradient_bytes,
    passing_gradient_bytes,
    repeated_weights,
    result_bytes,
)
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.memory import (
    CPU_RESERVED_BYTES,
    GPU_CONTEXT_BYTES,
    GPU_MESSAGE_BYTES,
    code_bytes,
)
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.unit_costs import UnitPricer
from graphpar.cost_options import PricingOptions
from graphpar.device import Link
from graphpar.ir.chain import Chain, crossings
from graphpar.ir.graph import Graph

Rewritten = tuple[Graph, Chain]
"""A graph and its chain of units."""


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
        known: dict[int, UnitPricer] | None = None,
    ) -> CostTable:
        """Fill the table of seconds and bytes.

        Args:
            graph: A captured graph.
            chain: Its units.
            cluster: The devices.
            options: Batch, training or inference, optimiser, limits on splitting.
            rewritten: By device name the graph that the device runs in place of this one, the same
                units in other number formats; devices left out run this one.
            known: Pricers of graphs by their identity, to be used and added to: what they worked out for
                another batch holds for this one. Only where no op works on the whole batch.
        """
        classes = device_classes(cluster)
        sizes = microbatch_sizes(options)
        examples = [cluster.device(c.devices[0]) for c in classes]
        given = rewritten or {}
        runs = [given.get(device.name, (graph, chain)) for device in examples]
        pricers: dict[int, UnitPricer] = {}
        shared = known if known is not None else {}
        for run in runs:
            key = id(run[0])
            if key not in shared:
                shared[key] = UnitPricer(*run, options, find_layout(run[0]), self.calibration)
            pricers[key] = replace(shared[key], options=options)
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
                    _update(options, device.is_cpu)[0],
                    device.is_cpu,
                    _update(options, device.is_cpu)[1],
                )
                for c, free, device in zip(classes, free_s, examples, strict=True)
            ),
            topology=self.topology(cluster),
            max_microbatches=options.max_microbatches,
            max_replicas=options.max_replicas,
            batch_reason=options.batch_reason,
            tail_reason=options.tail_reason,
            in_step_reason=options.in_step_reason,
            reserved_bytes=self.reserved_bytes(cluster, graph, options.training, given),
            sum_s_per_byte=self.sum_s_per_byte(cluster),
            repeated=repeated_weights(graph, chain, units, options),
            few_row_bytes=few_row_bytes(graph, chain, units, most) if options.training else (),
            largest_gradient_bytes=largest_gradient_bytes(graph, chain, units)
            if options.training
            else (),
            passing_gradient_bytes=passing_gradient_bytes(graph, chain, units)
            if options.training
            else (),
            result_bytes=() if options.training else result_bytes(graph, chain, options.batch),
            shared=self.shared_cores(cluster),
        )

    def unpriced(self, graph: Graph) -> tuple[str, ...]:
        """Operators without a rule; they are priced by the bytes they touch."""
        layout = find_layout(graph)
        found = {op.target for op in graph.ops if not work_of(op, graph, layout, 1).known}
        return tuple(sorted(found))

    def reserved_bytes(
        self,
        cluster: Cluster,
        graph: Graph,
        training: bool = True,
        rewritten: Mapping[str, Rewritten] | None = None,
    ) -> float:
        """Memory that a worker takes on any of the devices; one alone sends no messages.

        Args:
            cluster: The devices.
            graph: What they run, but for those that run a graph `rewritten` for them.
            training: Whether backward follows.
            rewritten: By device name, as for `price`.
        """
        alone, own = len(cluster.devices) == 1, rewritten or {}
        runs = {d.name: own[d.name][0] if d.name in own else graph for d in cluster.devices if d.is_cpu}
        code = {key: code_bytes(run, training) for key, run in {id(r): r for r in runs.values()}.items()}
        return max(
            self._reserved_bytes(d, alone) + (code[id(runs[d.name])] if d.is_cpu else 0.0)
            for d in cluster.devices
        )

    def _reserved_bytes(self, device: Device, alone: bool) -> float:
        """Memory that a worker takes before it holds anything; torch's builds differ widely."""
        if not device.is_cpu:
            return GPU_CONTEXT_BYTES + (0.0 if alone else GPU_MESSAGE_BYTES)
        measured = self.calibration
        if measured is None or not measured.worker_bytes or not device.is_local_cpu:
            return CPU_RESERVED_BYTES
        return measured.worker_bytes

    def _message_s(self, device: Device) -> float:
        """Time a stage's process spends on handing a message to the transport."""
        if device.is_local_cpu and self.calibration is not None:
            if self.calibration.send_s:
                return 0.0  # counted by message (`CostTable.message_s`)
            return self.calibration.loopback.latency_s / 2 * device.slowdown
        return 20e-6 * device.slowdown

    def sum_s_per_byte(self, cluster: Cluster) -> float:
        """What gradient sums cost this machine's processor; only measured where all workers run on it."""
        local = all(device.is_local_cpu for device in cluster.devices)
        measured = self.calibration
        if not local or measured is None or len(cluster.devices) < 2:
            return 0.0
        links = _links_in_use(cluster)
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
        mine, links = self.calibration, _links_in_use(cluster)
        late_s = mine.late_s if links and all(link.emulated for link in links) else 0.0
        return SharedCores(
            mine.fingerprint.num_cores,
            mine.slowing,
            workers,
            mine.reference_s,
            mine.send_s,
            mine.receive_s,
            late_s,
        )

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


def _update(options: PricingOptions, on_cpu: bool) -> tuple[float, float]:
    """What the optimiser's update takes, by all gradients and by the largest tensor."""
    if not options.training:
        return 0.0, 0.0
    if on_cpu:
        return options.cpu_update_share, options.cpu_update_copies
    return options.update_share, options.update_copies


def _links_in_use(cluster: Cluster) -> list[Link]:
    """The links that messages take, inside nodes and between them."""
    inside = [node.link for node in cluster.nodes if len(node.devices) > 1]
    return inside + ([cluster.network] if len(cluster.nodes) > 1 else [])


def _dense(kinds: Sequence[Hashable]) -> tuple[int, ...]:
    """Kinds renumbered in order of first appearance, which is the order of the costs."""
    number: dict[Hashable, int] = {}
    for kind in kinds:
        number.setdefault(kind, len(number))
    return tuple(number[kind] for kind in kinds)


def _joined(runs: Sequence[tuple["UnitPricer", Device]], index: int, sizes: Sequence[int]) -> UnitCost:
    """What a unit costs on devices that run it in unlike formats, or allocate memory in unlike ways."""
    groups: dict[tuple[int, bool], tuple[UnitPricer, list[Device]]] = {}
    for pricer, device in runs:
        groups.setdefault((id(pricer), device.is_cpu), (pricer, []))[1].append(device)
    costs = {key: pricer.unit_cost(index, devices, sizes) for key, (pricer, devices) in groups.items()}
    if len(costs) == 1:
        return next(iter(costs.values()))
    seen = dict.fromkeys(costs, 0)
    rows = []
    for pricer, device in runs:
        key = id(pricer), device.is_cpu
        rows.append((costs[key], seen[key]))
        seen[key] += 1
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
        growing_bytes=(),
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
            gradient_fixed_bytes=max(e.gradient_fixed_bytes for e in edges),
        )
        for edges in zip(*several, strict=True)
    )
