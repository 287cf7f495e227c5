"""Hand-made configurations: widths of tensor, pipeline and data parallelism, priced as given.

Tensor groups are priced as the planner prices them, by solving how the members share every layer.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.handmade import priced_plan
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.relaxed_tables import crossing_bytes
from graphpar.partition.relaxed_tables import recomputed as recomputed_mode
from graphpar.partition.settings import (
    Microbatches,
    ScheduleChoice,
    microbatch_counts,
    schedules_of,
)
from graphpar.partition.table_check import check_table
from graphpar.partition.types import (
    Partition,
    PipelineChoice,
    Replica,
    StageChoice,
)
from graphpar.scenarios.types import Layout


def configured(
    table: CostTable,
    layout: Layout,
    schedule: ScheduleChoice,
    microbatches: Microbatches,
    recompute: bool = False,
) -> Partition:
    """The configuration, priced as given.

    Devices are taken in the cluster's order: members of a tensor group first, then data-parallel
    copies, then stages. Units are cut where cumulative time is even.

    Args:
        table: Prices; of tensor groups too, where the configuration has some.
        layout: The configuration.
        schedule: A schedule, or `auto` for the best of those there are.
        microbatches: A fixed number per pipeline, or `auto`.
        recompute: Whether all stages compute their activations again.

    Raises:
        InfeasibleError: There are too few devices or units, or samples that cannot be split.
    """
    groups = tensor_groups(table, layout.tensor)
    wanted = layout.pipeline * layout.data
    if len(groups) < wanted:
        raise InfeasibleError(
            f"{layout} takes {wanted} groups of {layout.tensor} equal devices of one node; the cluster "
            f"has {len(groups)}",
            limit="devices",
        )
    if layout.pipeline > table.num_units:
        raise InfeasibleError(
            f"{layout} takes {layout.pipeline} stages; the model has {table.num_units} units",
            limit="units",
        )
    if layout.data > min(table.batch, table.max_replicas):
        why = table.batch_reason or f"the batch has {table.batch} samples"
        raise InfeasibleError(f"{layout} takes {layout.data} copies of the model: {why}", limit="batch")
    cuts = _even_cuts(table, layout.pipeline)
    count = layout.microbatches or microbatches
    share = table.batch // layout.data
    counts = microbatch_counts(table, share, count)
    if not counts:
        raise InfeasibleError(
            f"{layout} has {share} samples per pipeline; {count} microbatches are too many", limit="batch"
        )
    names = schedules_of(table, schedule)
    check_table(table)
    physical_s = physical_bound_s(table)
    tried = [
        priced_plan(table, _pipelines(table.batch, groups, cuts, layout, n, recompute), name, physical_s)
        for n in counts
        for name in names
    ]
    return min(tried, key=lambda found: (_excess_bytes(table, found), found.objective_s))


def _pipelines(
    batch: int,
    groups: list[Replica],
    cuts: list[int],
    layout: Layout,
    microbatches: int,
    recompute: bool,
) -> list[PipelineChoice]:
    small, larger = divmod(batch, layout.data)
    return [
        PipelineChoice(
            small + (copy < larger),
            microbatches,
            tuple(
                StageChoice(a, b, (groups[stage * layout.data + copy],), recompute=recompute)
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


def tensor_groups(table: CostTable, width: int) -> list[Replica]:
    """Groups of `width` equal devices of one node, in the table's order."""
    found = []
    for old in table.device_classes:
        for node in dict.fromkeys(table.topology.node_of[d] for d in old.devices):
            here = [d for d in old.devices if table.topology.node_of[d] == node]
            for start in range(0, len(here) - width + 1, width):
                first, *others = here[start : start + width]
                found.append(Replica(first, 0, tuple(others)))
    return found


def recomputed(table: CostTable) -> CostTable:
    """The table where every unit keeps its input alone and runs forward again before backward.

    Ways of its plain rows besides that (groups, ZeRO) are told as if they did not.
    """
    entering, _ = crossing_bytes(table)
    plain = table.every_mode[: len(table.device_classes)]
    again = [recomputed_mode(table, mode, entering).costs for mode in plain]
    costs = tuple(
        replace(
            cost,
            backward_s=tuple(rows[i].backward_s for rows in again),
            saved_bytes=again[0][i].saved_bytes[0],
            working_bytes=again[0][i].working_bytes[0],
            weight_s=(),
            deferred_bytes=(),
            split_s=(),
            saved_by_class=tuple(rows[i].saved_bytes[0] for rows in again) if cost.saved_by_class else (),
            working_by_class=tuple(rows[i].working_bytes[0] for rows in again)
            if cost.working_by_class
            else (),
            deferred_by_class=(),
        )
        for i, cost in enumerate(table.costs)
    )
    ways = [m for m in table.modes if m.recompute and (m.zero or len(m.members) > 1)]
    return replace(table, costs=costs, modes=tuple(replace(m, recompute=False) for m in ways))
