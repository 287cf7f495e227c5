"""Partitions, cost tables and plans for tests: random ones and one fixed small one."""

from dataclasses import replace
from typing import get_args

from hypothesis import settings
from hypothesis import strategies as st

from graphpar.calibration import Calibration, Curve, Fingerprint, Grid
from graphpar.cost import CostTable, CutEdge, DeviceClass, LinkCost, Topology, UnitCost
from graphpar.partition.types import (
    Partition,
    PipelineChoice,
    Replica,
    ScheduleName,
    SearchedSchedule,
    StageChoice,
    StagePace,
)
from graphpar.plans.build import PlanSubject, make_plan, predict
from graphpar.plans.plan import Plan, hash_of
from graphpar.schedule import StageLink

# A busy machine must not fail a test: examples have no time limit of their own.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def partition_of(pipelines: tuple[PipelineChoice, ...], schedule: ScheduleName = "1f1b") -> Partition:
    """A partition with made-up certificate numbers."""
    return Partition(
        pipelines=pipelines,
        schedule=schedule,
        status="feasible",
        objective_s=0.2,
        parts={"fill_compute_s": 0.05, "steady_s": 0.15},
        bound_s=0.19,
        gap=0.05,
        physical_bound_s=0.1,
        seconds=1.5,
        truncated_by=("time limit",),
        family="pipelines of contiguous stages with replicas",
        peak_bytes={},
    )


def chain(
    num_stages: int, microbatches: int, schedule: ScheduleName = "1f1b", size: int = 1
) -> Partition:
    """One unit per stage, one device per stage."""
    stages = tuple(StageChoice(s, s + 1, (Replica(f"d{s}", microbatches),)) for s in range(num_stages))
    return partition_of((PipelineChoice(size * microbatches, microbatches, stages),), schedule)


def chain_links(num_stages: int, num_bytes: float = 0.0) -> tuple[StageLink, ...]:
    """Neighbours exchange activations and gradients; a tiny gradient keeps links two-way."""
    return tuple(StageLink(s, s + 1, num_bytes, num_bytes, 0.0, 1e-9) for s in range(num_stages - 1))


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    """Six units in up to three pipelines of up to four stages with up to three unequal replicas each.

    Interleaved and zero-bubble ones may repeat their devices, and may have paces.
    """
    schedule = draw(st.sampled_from(get_args(ScheduleName)))
    pipelines = []
    for p in range(draw(st.integers(1, 3))):
        microbatches = draw(st.integers(1, 9))
        cuts = draw(st.sets(st.integers(1, 5), max_size=3))
        bounds = [0, *sorted(cuts), 6]
        stages: list[StageChoice] = []
        for s in range(len(bounds) - 1):
            width = draw(st.integers(1, min(3, microbatches)))
            marks = draw(
                st.sets(
                    st.integers(1, max(1, microbatches - 1)),
                    min_size=width - 1,
                    max_size=width - 1,
                )
            )
            ends = [0, *sorted(marks), microbatches]
            replicas = tuple(Replica(f"p{p}s{s}/{r}", ends[r + 1] - ends[r]) for r in range(width))
            if schedule in get_args(SearchedSchedule):
                pass
            elif s > 0 and draw(st.booleans()):
                replicas = stages[draw(st.integers(0, s - 1))].replicas
            stages.append(StageChoice(bounds[s], bounds[s + 1], replicas))
        samples = draw(st.integers(microbatches, 3 * microbatches))
        pipelines.append(PipelineChoice(samples, microbatches, tuple(stages)))
    made = partition_of(tuple(pipelines), schedule)
    if schedule in get_args(SearchedSchedule) or draw(st.booleans()):
        return made
    times = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    paces = st.builds(StagePace, times, times, times, times, st.integers(0, 3), st.integers(0, 4))
    number = sum(len(p.stages) for p in made.pipelines)
    return replace(made, paces=tuple(draw(paces) for _ in range(number)))


@st.composite
def stage_links(draw: st.DrawFn, partition: Partition) -> tuple[StageLink, ...]:
    """Any pairs of stages of a pipeline, skip edges and edges without gradients among them."""
    links = []
    first = 0
    for pipeline in partition.pipelines:
        last = first + len(pipeline.stages)
        for source in range(first, last):
            for target in range(source + 1, last):
                if draw(st.booleans()):
                    backward = draw(st.sampled_from([0.0, 3.0]))
                    links.append(StageLink(source, target, 8.0, backward, 16.0))
        first = last
    return tuple(links)


def table_for(partition: Partition, *, training: bool = True, num_units: int = 6) -> CostTable:
    """Two kinds of devices, the second of each pair three times slower, one node per pipeline."""
    devices = partition.used_devices
    fast, slow = devices[::2], (*devices[1::2], "spare/0")
    batch = sum(p.samples for p in partition.pipelines)
    block = UnitCost(
        name="block",
        forward_s=((1e-3, 1e-3 * batch), (3e-3, 3e-3 * batch)),
        backward_s=((2e-3, 2e-3 * batch), (6e-3, 6e-3 * batch)),
        optimizer_s=(1e-3, 3e-3),
        weight_bytes=2**20,
        gradient_bytes=2**20 if training else 0.0,
        optimizer_bytes=2**21 if training else 0.0,
        saved_bytes=(1e5, 1e5 * batch),
        working_bytes=(5e4, 5e4 * batch),
    )
    nodes = {d: d.split("s")[0] for d in devices} | {"spare/0": "spare"}
    return CostTable(
        batch=batch,
        training=training,
        sizes=(1, batch) if batch > 1 else (1,),
        units=(0, *(1 for _ in range(num_units - 2)), 0),
        unit_names=("embed", *(f"h.{i}" for i in range(num_units - 2)), "head"),
        costs=(replace(block, name="end", weight_bytes=2**19), block)
        if batch > 1
        else (_at_one(replace(block, name="end")), _at_one(block)),
        edges=tuple(CutEdge(u, u + 1, 4096.0, 4096.0) for u in range(num_units - 1)),
        device_classes=(
            DeviceClass("fast", fast, 2**30, 1e-5, refills=True),
            DeviceClass("slow", slow, 2**28, 1e-5, refills=True),
        ),
        topology=Topology(
            node_of=nodes,
            inside=dict.fromkeys(nodes.values(), LinkCost(1e-6, 1e10)),
            network=LinkCost(1e-5, 1e8),
        ),
        max_microbatches=batch,
        max_replicas=batch,
    )


def _at_one(cost: UnitCost) -> UnitCost:
    """The same unit with a table of one size."""
    return replace(
        cost,
        forward_s=tuple(row[:1] for row in cost.forward_s),
        backward_s=tuple(row[:1] for row in cost.backward_s),
        saved_bytes=cost.saved_bytes[:1],
        working_bytes=cost.working_bytes[:1],
    )


CLUSTER = {"nodes": [{"name": "p0", "devices": [{"kind": "cpu", "count": 5}]}]}


def sample_partition(head_first: int = 5) -> Partition:
    """Three stages, the middle one on two unequal replicas."""
    return partition_of(
        (
            PipelineChoice(
                samples=16,
                microbatches=8,
                stages=(
                    StageChoice(0, 3, (Replica("p0s0/0", 8),)),
                    StageChoice(3, head_first, (Replica("p0s1/0", 3), Replica("p0s1/1", 5))),
                    StageChoice(head_first, 6, (Replica("p0s2/0", 8),)),
                ),
            ),
        )
    )


SAMPLE_LINKS = (
    StageLink(0, 1, 4096.0, 4096.0),
    StageLink(0, 2, 64.0, 0.0, 512.0),
    StageLink(1, 2, 4096.0, 4096.0),
)


def sample_plan(head_first: int = 5, *, training: bool = True) -> Plan:
    """A fixed small plan."""
    partition = sample_partition(head_first)
    table = table_for(partition, training=training)
    subject = PlanSubject(
        model="tiny-gpt",
        model_hash="ab" * 32,
        cluster=CLUSTER,
        cluster_hash=hash_of(CLUSTER),
        options={"gap": 0.01, "time_limit_s": 60.0},
    )
    return make_plan(
        subject,
        table,
        predict(table, partition, SAMPLE_LINKS),
        notes=["layer norms stay in float32"],
    )


def calibration(**rates: Grid) -> Calibration:
    """Made-up measurements of this machine; with rates of products by format if given."""
    rate = rates.pop("float32", Grid((1.0, 64.0), (8.0, 64.0), ((1e9, 2e9), (4e9, 8e9))))
    names = """pointwise accumulate copy fill reduce relu relu_backward view adamw sgd clip""".split()
    kinds = ("full", "causal", "full_backward", "causal_backward")
    return Calibration(
        fingerprint=Fingerprint("test", 2, "2.13.0", 1),
        curves={name: Curve((1.0, 1e6), (1e-6, 1e-3)) for name in names},
        matmul={"float32": rate, **rates},
        batched_matmul={"float32": rate},
        attention=dict.fromkeys(kinds, rate),
        loopback=LinkCost(5e-5, 1e9),
        sum_s_per_byte=2e-9,
        op_s=1e-6,
        node_s=2e-6,
        memory_bytes_per_s=1e10,
    )
