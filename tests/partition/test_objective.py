"""The formula of the planner against the simulator, which plays the very action lists that run."""

from dataclasses import replace

import pytest
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cores import CoreUse, SharedCores
from graphpar.cost import CostTable, LinkCost, Topology
from graphpar.errors import InfeasibleError
from graphpar.partition.check import check_partition
from graphpar.partition.handmade import evaluate
from graphpar.partition.pipeline import partition
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.schedule.simulated import simulated

SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 8),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from(SCHEDULES),
)
def test_equal_replicas_take_what_their_samples_take(
    width: int, microbatches: int, more: int, seconds: float, schedule: ScheduleName
) -> None:
    """One stage: also where microbatches are unequal and do not divide evenly among replicas."""
    microbatches = max(width, microbatches)
    samples = microbatches + min(more, microbatches - 1)
    table = make_table([seconds], (1.0,), (width,), batch=samples)
    stage = StageChoice(0, 1, tuple(Replica(f"0.{i}", 0) for i in range(width)))
    plan = evaluate(table, [PipelineChoice(samples, microbatches, (stage,))], schedule)
    assert plan.objective_s == pytest.approx(simulated(table, plan.pipelines, schedule).step_s)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(3, 12),
    st.integers(0, 20),
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=3, max_size=3),
    st.sampled_from(SCHEDULES),
)
def test_stages_take_no_longer_than_said_and_one_way_through(
    widths: list[int], microbatches: int, more: int, seconds: list[float], schedule: ScheduleName
) -> None:
    """What the formula leaves out, replicas that start one after another, is less than a passage."""
    samples = microbatches + more
    table = make_table(seconds[: len(widths)], (1.0,), (sum(widths),), batch=samples)
    names = iter(table.class_of)
    stages = tuple(
        StageChoice(i, i + 1, tuple(Replica(next(names), 0) for _ in range(width)))
        for i, width in enumerate(widths)
    )
    plan = evaluate(table, [PipelineChoice(samples, microbatches, stages)], schedule)
    largest = 3 * sum(seconds[: len(widths)]) * -(-samples // microbatches)
    step_s = simulated(table, plan.pipelines, schedule).step_s
    assert step_s <= plan.objective_s + largest + 1e-9


def grid_table(pipelines: int, stages: int, network: LinkCost) -> CostTable:
    """A node for every stage with a device for every pipeline, far faster inside than across."""
    # Some hair of a byte crosses the cuts: a backward waits only for what it is sent.
    table = make_table(
        [1.0] * stages,
        (1.0,),
        (pipelines * stages,),
        cut_bytes=1e-9,
        gradient_bytes=2.0,
        optimizer_s=0.1,
    )
    node_of = {f"0.{i}": f"node{i // pipelines}" for i in range(pipelines * stages)}
    inside = dict.fromkeys(node_of.values(), LinkCost(0.0, 100.0))
    return replace(table, topology=Topology(node_of, inside, network), batch=4 * pipelines)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.01, 100.0), st.sampled_from(SCHEDULES))
def test_an_even_grid_takes_what_is_said(
    pipelines: int, stages: int, bytes_per_s: float, schedule: ScheduleName
) -> None:
    """Copies in one node sum over its link, whatever the links between nodes are."""
    table = grid_table(pipelines, stages, LinkCost(0.0, bytes_per_s))
    chosen = [
        PipelineChoice(
            4,
            4,
            tuple(StageChoice(s, s + 1, (Replica(f"0.{s * pipelines + p}", 0),)) for s in range(stages)),
        )
        for p in range(pipelines)
    ]
    plan = evaluate(table, chosen, schedule)
    assert plan.objective_s == pytest.approx(simulated(table, plan.pipelines, schedule).step_s)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_messages_cost_workers_of_this_machine_what_is_said(
    stages: int, microbatches: int, training: bool, late_s: float
) -> None:
    """One after another exactly, and where a stage is between others while transfers overlap."""
    table = make_table(
        [1.0] * stages, (1.0,), (stages,), batch=microbatches, cut_bytes=1e-9, training=training
    )
    workers = {device: CoreUse() for device in table.class_of}
    shared = SharedCores(stages, (1.0,), workers, send_s=0.1, receive_s=0.2, late_s=late_s)
    table = replace(table, shared=shared)
    row = tuple(StageChoice(s, s + 1, (Replica(f"0.{s}", 0),)) for s in range(stages))
    for schedule in SCHEDULES:
        plan = evaluate(table, [PipelineChoice(microbatches, microbatches, row)], schedule)
        check_partition(table, plan)
        step_s = simulated(table, plan.pipelines, schedule).step_s
        stalls = training and schedule == "1f1b"
        if microbatches == 1 or (stages != 2 and not stalls):
            assert plan.objective_s == pytest.approx(step_s)
            continue
        # In a row of two each handles half of the messages, and more of those in one direction.
        assert step_s <= plan.objective_s + 0.1 * microbatches * (not stalls) + 1e-6
        assert plan.objective_s <= step_s + 0.3 * stages + 2 * late_s * microbatches + 1e-6
    # Workers that are slowed down make up for it while they would wait.
    slow = replace(shared, workers=dict.fromkeys(workers, CoreUse(slowdown=2.0)))
    assert evaluate(replace(table, shared=slow), plan.pipelines).objective_s == pytest.approx(
        evaluate(replace(table, shared=None), plan.pipelines).objective_s
    )


@st.composite
def layouts(draw: st.DrawFn) -> tuple[CostTable, tuple[PipelineChoice, ...]]:
    """Pipelines of unlike cuts and widths over nodes, whose stages sum gradients and do nothing else."""
    sizes = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3))
    number = sum(map(sum, sizes))
    link = st.builds(LinkCost, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([1.0, 5.0, 50.0]))
    units = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.0]), min_size=4, max_size=4))
    table = make_table([0.0] * 4, (1.0,), (number,), batch=3 * len(sizes), optimizer_s=0.3)
    costs = tuple(replace(c, gradient_bytes=g) for c, g in zip(table.costs, units, strict=True))
    node_of = {f"0.{i}": draw(st.sampled_from("abc")) for i in range(number)}
    between = {("a", "b"): draw(link)} if draw(st.booleans()) else {}
    topology = Topology(node_of, {n: draw(link) for n in "abc"}, draw(link), between)
    table = replace(
        table, costs=costs, topology=topology, sum_s_per_byte=draw(st.sampled_from([0.0, 0.2]))
    )
    names, chosen = iter(table.class_of), []
    for widths in sizes:
        cuts = sorted(
            draw(st.sets(st.integers(1, 3), min_size=len(widths) - 1, max_size=len(widths) - 1))
        )
        ends = zip([0, *cuts], [*cuts, 4], widths, strict=True)
        stages = (StageChoice(a, b, tuple(Replica(next(names), 0) for _ in range(w))) for a, b, w in ends)
        chosen.append(PipelineChoice(3, 3, tuple(stages)))
    return table, tuple(chosen)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(SCHEDULES))
def test_sums_take_what_is_said(
    layout: tuple[CostTable, tuple[PipelineChoice, ...]], schedule: ScheduleName
) -> None:
    table, chosen = layout
    plan = evaluate(table, chosen, schedule)
    assert plan.objective_s == pytest.approx(simulated(table, plan.pipelines, schedule).step_s)
    check_partition(table, plan)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(), st.sampled_from([1.5, 10.0]), st.booleans())
def test_faster_links_are_never_worse(table: CostTable, factor: float, everywhere: bool) -> None:
    def faster(link: LinkCost) -> LinkCost:
        return LinkCost(link.latency_s / factor, link.bytes_per_s * factor)

    topology = replace(table.topology, network=faster(table.topology.network))
    if everywhere:
        topology = replace(topology, inside={n: faster(k) for n, k in topology.inside.items()})
    try:
        slow = partition(table, gap=0.0)
    except InfeasibleError:
        return
    fast = partition(replace(table, topology=topology), gap=0.0)
    assert fast.bound_s <= slow.objective_s * (1 + 1e-9)
    assert fast.objective_s * (1 - fast.gap) <= slow.objective_s * (1 + 1e-9)
    assert fast.status == "optimal" or fast.truncated_by
