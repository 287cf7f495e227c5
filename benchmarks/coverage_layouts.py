"""The plans that each architecture runs under: stages in a line, and unlike pipelines side by side."""

from graphpar.cluster import Cluster
from graphpar.partition.handmade import Tried, evaluate, greedy_split
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, plan_prepared, price
from graphpar.plans.plan import Plan
from graphpar.preparation import Prepared
from graphpar.training import Training

SLOWDOWNS = (1.0, 1.7, 2.6)
"""How much slower than this machine each worker is; the first so many are used."""


def in_line(prepared: Prepared, workers: int, train: Training | None) -> tuple[Cluster, Plan]:
    """The planner's own plan where it uses all workers in a line, else a split over all of them.

    Raises:
        ValueError: There is nothing to cut.
    """
    cluster = Cluster.local(slowdowns=SLOWDOWNS[:workers])
    plan = plan_prepared(
        prepared,
        cluster,
        train=train,
        precision="float32",
        calibration=None,
        time_limit_s=5.0,
        gap=0.05,
        explain_s=0.0,
    )
    pipelines = plan.partition.pipelines
    if len(pipelines) == 1 and len(pipelines[0].stages) == workers:
        return cluster, plan
    table = price(prepared, cluster, train=train, precision="float32", calibration=None)
    if table.num_units < 2:
        raise ValueError("the model is a single unit that cannot be cut")
    microbatches = min(2, table.max_microbatches)
    split = greedy_split(table, Tried(microbatches=microbatches))
    return cluster, plan_of(prepared, cluster, table, split)


def side_by_side(prepared: Prepared, train: Training) -> tuple[Cluster, Plan]:
    """Two stages (one where there is nothing to cut) for all samples but one, a device for that one.

    So the pipelines differ in length, in their shares of the batch and of its ignored labels, and in
    how many microbatches they take.
    """
    cluster = Cluster.local(slowdowns=SLOWDOWNS)
    table = price(prepared, cluster, train=train, precision="float32", calibration=None)
    fast, slow, alone = (device.name for device in cluster.devices)
    samples, units = prepared.graph.batch, table.num_units
    count = min(2, table.max_microbatches)
    halves = ((fast, 0, units // 2), (slow, units // 2, units))[units < 2 :]
    long = tuple(StageChoice(first, last, (Replica(d, count),)) for d, first, last in halves)
    short = (StageChoice(0, units, (Replica(alone, 1),)),)
    pipelines = (PipelineChoice(samples - 1, count, long), PipelineChoice(1, 1, short))
    partition = evaluate(table, pipelines, "gpipe")
    return cluster, plan_of(prepared, cluster, table, partition, train=train)
