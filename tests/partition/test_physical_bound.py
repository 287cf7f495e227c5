"""No plan of whatever kind beats the physical bound, played through under every order of work."""

from dataclasses import replace
from itertools import islice
from random import Random

import pytest
from all_plans import all_plans
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable, CutEdge, LinkCost, Mode, ModeCost, Topology
from graphpar.errors import VerifyError
from graphpar.partition.cells import find_cells, links_to_others, make_option
from graphpar.partition.gradient_sums import worst_finish_s
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.stage_costs import cached_post
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.partition.unit_arrays import Setting, UnitArrays, some_ranges
from graphpar.schedule.simulated import simulated

SCHEDULES: tuple[ScheduleName, ...] = ("zero-bubble", "1f1b", "gpipe")
PLANS = 300
PLAYED = 6


def halved(table: CostTable, share: float) -> CostTable:
    """The table with such a share of every backward for gradients of weights."""
    costs = tuple(
        replace(c, weight_s=tuple(tuple(share * t for t in row) for row in c.backward_s))
        for c in table.costs
    )
    modes = tuple(
        replace(
            m,
            costs=tuple(replace(c, weight_s=tuple(share * t for t in c.backward_s)) for c in m.costs),
        )
        for m in table.modes
    )
    return replace(table, costs=costs, modes=modes)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(small_tables(modes=True), st.sampled_from([0.0, 0.4, 0.9]), st.randoms(use_true_random=False))
def test_no_plan_in_any_order_is_faster(table: CostTable, share: float, random: Random) -> None:
    table = halved(table, share)
    bound_s = physical_bound_s(table)
    plans = list(islice(all_plans(table, "1f1b"), PLANS))
    for pipelines in random.sample(plans, min(PLAYED, len(plans))):
        for schedule in SCHEDULES if table.training else SCHEDULES[-1:]:
            try:
                step_s = simulated(table, pipelines, schedule).step_s
            except VerifyError:
                continue
            assert bound_s <= step_s * (1 + 1e-9) + 1e-12, (pipelines, schedule)


def two_stages(samples: int, microbatches: int) -> PipelineChoice:
    stages = (
        StageChoice(0, 1, (Replica("0.0", microbatches),)),
        StageChoice(1, 2, (Replica("0.1", microbatches),)),
    )
    return PipelineChoice(samples, microbatches, stages)


@pytest.mark.parametrize("edge", [CutEdge(0, 1, 1.0, 1.0), CutEdge(0, 1, 0.0, 0.0, 1.0, 1.0)])
def test_gradients_of_weights_are_not_waited_for(edge: CutEdge) -> None:
    table = halved(replace(make_table((1.0, 1.0), batch=1), edges=(edge,)), 0.5)
    step_s = simulated(table, (two_stages(1, 1),), "zero-bubble").step_s
    # Two forwards, two gradients of results, the first weights; the last ones run beside.
    assert step_s == pytest.approx(5.0, rel=1e-3)
    assert physical_bound_s(table) == pytest.approx(4.0)


def test_efficient_microbatches_are_too_long_to_keep_all_devices_busy() -> None:
    table = make_table((1.0,), devices_per_class=(4,), batch=4, cut_bytes=1.0)
    # One sample takes 3, four samples together 6: half as long each, but one device does them all.
    row = (1.0, 2.0)
    costs = (replace(table.costs[0], forward_s=(row,), backward_s=(tuple(2 * t for t in row),)),)
    table = replace(table, costs=costs)
    work_s = 4 * (6.0 / 4) / 4
    assert work_s < 3.0 <= physical_bound_s(table) <= 3.0 + 1e-9


def zero_table(steps: tuple[float, float], devices: tuple[int, int], gradients: float) -> CostTable:
    """One unit on two kinds of devices, both also under ZeRO."""
    table = make_table((1.0,), (1.0, 1.0), devices, batch=4, gradient_bytes=gradients)
    times = ((1.0, 4.0), (3.0, 12.0))
    nothing = ((0.0, 0.0),)
    unit = replace(table.costs[0], forward_s=times, backward_s=nothing * 2, optimizer_s=steps)
    modes = tuple(
        Mode(
            (k,),
            (ModeCost(times[k], nothing[0], steps[k], (1.0,), (gradients,), (0.0,), nothing, nothing),),
            zero=1,
        )
        for k in range(2)
    )
    return replace(table, costs=(unit,), modes=modes)


def test_zero_divides_the_optimizer_otherwise_than_the_samples() -> None:
    table = zero_table((1.0, 0.5), (1, 1), 0.0)
    replicas = (Replica("0.0", 3), Replica("1.0", 1))
    plan = PipelineChoice(4, 4, (StageChoice(0, 1, replicas, zero=1),))
    # Three samples and half a slow optimiser there, one sample and half a fast one here.
    step_s = simulated(table, (plan,), "1f1b").step_s
    assert step_s == pytest.approx(3.5, rel=1e-3)
    assert 3.0 < physical_bound_s(table) <= step_s


def test_whoever_speaks_with_other_pipelines_need_not_be_the_slowest() -> None:
    table = zero_table((8.0, 0.0), (1, 2), 1.0)
    far = LinkCost(0.0, 1.0)
    table = replace(table, topology=Topology({d: d for d in table.class_of}, {}, far))
    cells = find_cells(table)
    place = {cell.device_class: k for k, cell in enumerate(cells.cells)}
    option = make_option(cells, [(place[1],), (place[0],)], [3, 2])
    groups = tuple(tuple(int(k in own) for k in range(2)) for own in ((0, 1), (place[1],)))
    setting = Setting(2, 2, "gpipe", 2, links_to_others(cells, groups, groups[0]))
    units = UnitArrays(table, setting, some_ranges([(0, 1)]))
    stage = StageChoice(0, 1, (Replica("1.0", 1), Replica("0.0", 1)), zero=1)
    other = PipelineChoice(2, 2, (StageChoice(0, 1, (Replica("1.1", 2),)),))
    finish_s = sum(worst_finish_s(table, (PipelineChoice(2, 2, (stage,)), other)))
    # The slow one ends after half its optimiser and what the two exchange; the other one sums as well.
    assert float(cached_post(table, units, option, setting).min()) == pytest.approx(finish_s)
