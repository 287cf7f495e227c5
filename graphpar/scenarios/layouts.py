"""Hand-made configurations: widths of tensor, pipeline and data parallelism, priced as given.

A tensor group of t equal devices of one node is priced as one device of a table of groups, by the
analytic rule of Megatron (https://arxiv.org/abs/1909.08053): times and bytes of layers divided by t,
and one all-reduce of the activations that leave a unit per direction, in a ring.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

from graphpar.cost import CostTable, DeviceClass, LinkCost, Topology, UnitCost
from graphpar.errors import InfeasibleError
from graphpar.partition.handmade import evaluate
from graphpar.partition.settings import (
    Microbatches,
    ScheduleChoice,
    microbatch_counts,
    schedules_of,
)
from graphpar.partition.types import (
    Partition,
    PipelineChoice,
    Replica,
    StageChoice,
)
from graphpar.scenarios.types import Layout

JOIN = "+"
"""Between the names of a group's members."""


def configured(
    table: CostTable, layout: Layout, schedule: ScheduleChoice, microbatches: Microbatches
) -> tuple[CostTable, Partition]:
    """The table of groups and the priced configuration on it.

    Devices are taken in the cluster's order: members of a tensor group first, then data-parallel
    copies, then stages. Units are cut where cumulative time is even.

    Raises:
        InfeasibleError: There are too few devices or units, or samples that cannot be split.
    """
    grouped = grouped_table(table, layout.tensor)
    groups = list(grouped.class_of)
    wanted = layout.pipeline * layout.data
    if len(groups) < wanted:
        raise InfeasibleError(
            f"{layout} takes {wanted} groups of {layout.tensor} equal devices of one node; the cluster "
            f"has {len(groups)}",
            limit="devices",
        )
    if layout.pipeline > grouped.num_units:
        raise InfeasibleError(
            f"{layout} takes {layout.pipeline} stages; the model has {grouped.num_units} units",
            limit="units",
        )
    if layout.data > min(table.batch, table.max_replicas):
        why = table.batch_reason or f"the batch has {table.batch} samples"
        raise InfeasibleError(f"{layout} takes {layout.data} copies of the model: {why}", limit="batch")
    cuts = _even_cuts(grouped, layout.pipeline)
    count = layout.microbatches or microbatches
    share = table.batch // layout.data
    counts = microbatch_counts(grouped, share, count)
    if not counts:
        raise InfeasibleError(
            f"{layout} has {share} samples per pipeline; {count} microbatches are too many", limit="batch"
        )
    names = schedules_of(table, schedule)
    tried = [
        evaluate(grouped, _pipelines(table.batch, groups, cuts, layout, n), name)
        for n in counts
        for name in names
    ]
    return grouped, min(tried, key=lambda found: (_excess_bytes(grouped, found), found.objective_s))


def _pipelines(
    batch: int, groups: list[str], cuts: list[int], layout: Layout, microbatches: int
) -> list[PipelineChoice]:
    small, larger = divmod(batch, layout.data)
    return [
        PipelineChoice(
            small + (copy < larger),
            microbatches,
            tuple(
                StageChoice(a, b, (Replica(groups[stage * layout.data + copy], 0),))
                for stage, (a, b) in enumerate(pairwise(cuts))
            ),
        )
        for copy in range(layout.data)
    ]


def _excess_bytes(table: CostTable, found: Partition) -> float:
    """What the fullest device lacks; 0 where all fits."""
    lacking = (
        peak - table.device_classes[table.class_of[d]].memory_bytes
        for d, peak in found.peak_bytes.items()
    )
    return max(0.0, *lacking)


def _even_cuts(table: CostTable, stages: int) -> list[int]:
    size = table.sizes[0]
    times = [table.forward_s(u, 0, size) + table.backward_s(u, 0, size) for u in range(table.num_units)]
    done = list(accumulate(times))
    cuts = [0]
    for stage in range(1, stages):
        target = done[-1] * stage / stages
        near = min(range(table.num_units), key=lambda u: abs(done[u] - target)) + 1
        cuts.append(min(max(near, cuts[-1] + 1), table.num_units - (stages - stage)))
    return [*cuts, table.num_units]


def grouped_table(table: CostTable, width: int) -> CostTable:
    """The table whose devices are groups of `width` equal devices of one node."""
    if width == 1:
        return table
    classes, node_of = [], {}
    for old in table.device_classes:
        names = []
        for node in dict.fromkeys(table.topology.node_of[d] for d in old.devices):
            here = [d for d in old.devices if table.topology.node_of[d] == node]
            for start in range(0, len(here) - width + 1, width):
                name = JOIN.join(here[start : start + width])
                names.append(name)
                node_of[name] = node
        classes.append(DeviceClass(old.name, tuple(names), old.memory_bytes, old.stage_overhead_s))
    topology = Topology(node_of, table.topology.inside, table.topology.network, table.topology.between)
    links = [_inside(table, c) for c in table.device_classes]
    return replace(
        table,
        device_classes=tuple(classes),
        modes=(),
        topology=topology,
        costs=tuple(_grouped_cost(table, i, c, width, links) for i, c in enumerate(table.costs)),
    )


def _inside(table: CostTable, device_class: DeviceClass) -> LinkCost:
    """The slowest link inside nodes that hold devices of a class."""
    nodes = {table.topology.node_of[d] for d in device_class.devices}
    found = [table.topology.inside[n] for n in nodes] or [table.topology.network]
    return min(found, key=lambda link: link.bytes_per_s)


def _grouped_cost(
    table: CostTable, index: int, cost: UnitCost, width: int, links: list[LinkCost]
) -> UnitCost:
    last = max(u for u, c in enumerate(table.units) if c == index)
    unit = last if last + 1 < table.num_units else max(last - 1, 0)

    def reduced_s(link: LinkCost, size: float, backward: bool) -> float:
        num_bytes = table.cut_bytes(unit + 1, size)[backward] if table.num_units > 1 else 0.0
        return 2 * (width - 1) * link.seconds(num_bytes / width)

    def row(times: tuple[float, ...], link: LinkCost, backward: bool) -> tuple[float, ...]:
        return tuple(
            t / width + (reduced_s(link, s, backward) if t > 0 else 0.0)
            for t, s in zip(times, table.sizes, strict=True)
        )

    return replace(
        cost,
        forward_s=tuple(row(t, links[k], False) for k, t in enumerate(cost.forward_s)),
        backward_s=tuple(row(t, links[k], True) for k, t in enumerate(cost.backward_s)),
        optimizer_s=tuple(t / width for t in cost.optimizer_s),
        weight_bytes=cost.weight_bytes / width,
        gradient_bytes=cost.gradient_bytes / width,
        optimizer_bytes=cost.optimizer_bytes / width,
        saved_bytes=tuple(s / width for s in cost.saved_bytes),
        working_bytes=tuple(s / width for s in cost.working_bytes),
    )


def recomputed(table: CostTable) -> CostTable:
    """The table where every unit keeps its input alone and runs forward again before backward."""
    costs = []
    for index, cost in enumerate(table.costs):
        first = table.units.index(index)
        kept = tuple(table.cut_bytes(first, s)[0] for s in table.sizes)
        costs.append(
            replace(
                cost,
                backward_s=tuple(
                    tuple(f + b for f, b in zip(forward, backward, strict=True))
                    for forward, backward in zip(cost.forward_s, cost.backward_s, strict=True)
                ),
                saved_bytes=tuple(min(a, b) for a, b in zip(kept, cost.saved_bytes, strict=True)),
                working_bytes=tuple(
                    w + s for w, s in zip(cost.working_bytes, cost.saved_bytes, strict=True)
                ),
            )
        )
    return replace(table, costs=tuple(costs), modes=())
