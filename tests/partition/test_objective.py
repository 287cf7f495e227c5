"""The formula of the planner against the simulator, which plays the very action lists that run."""

import pytest
from cost_tables import make_table
from hypothesis import given, settings
from hypothesis import strategies as st

from graphpar.partition.handmade import evaluate
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.simulated import simulated

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
