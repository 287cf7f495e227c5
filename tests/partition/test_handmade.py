"""Simple plans: what is left out unpriced could not have been the best."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from all_plans import fitting_plans
from amounts import examples
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition import handmade, pipeline
from graphpar.partition.all_devices import CUT
from graphpar.partition.certificate import BEYOND
from graphpar.partition.family import Family, choose_family
from graphpar.partition.handmade import Tried, even_split, one_device, simple_plans
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.partition.pipeline import partition
from graphpar.partition.types import PipelineChoice, StageChoice


def steps_of(table: CostTable, *devices: str) -> list[float]:
    """What a step takes the best one of some devices, or of all; nothing where none holds the model."""
    try:
        return [one_device(table, Tried(devices=devices)).objective_s]
    except InfeasibleError:
        return []


@settings(max_examples=examples(60), deadline=None)
@given(small_tables(max_units=4, max_devices=4, max_batch=6))
def test_settings_are_left_out_only_where_others_are_better(table: CostTable) -> None:
    found = [(p.pipelines, p.objective_s) for p in simple_plans(table)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handmade, "_least_s", lambda *_: -math.inf)
        assert found == [(p.pipelines, p.objective_s) for p in simple_plans(table)]
    alone = [step for device in table.class_of for step in steps_of(table, device)]
    assert steps_of(table) == ([min(alone)] if alone else [])
    for one in found:
        below = Tried(below_s=one[1] * (1 + 1e-9) + 1e-12)
        assert one in [(p.pipelines, p.objective_s) for p in simple_plans(table, below)]


def test_settings_that_are_too_slow_are_not_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table([1.0] * 6, (1.0, 2.0), (2, 1), batch=16)
    best_s = min(p.objective_s for p in simple_plans(table))
    monkeypatch.setattr(handmade, "priced_plan", lambda *_: pytest.fail("it was priced"))
    assert list(simple_plans(table, Tried(below_s=best_s / 3))) == []
    with pytest.raises(InfeasibleError, match=r"the even split takes 0\.1 s or more"):
        even_split(table, Tried(below_s=0.1))


def test_one_device_is_the_fastest_that_holds_the_model_at_any_size_of_microbatches() -> None:
    table = make_table([1.0] * 4, (2.0, 1.0), (1, 1), batch=4, training=False)
    assert one_device(table).used_devices == ("0.0",)
    small = replace(table.device_classes[0], memory_bytes=3.0)
    few = replace(table, device_classes=(small, table.device_classes[1]))
    assert one_device(few).used_devices == ("1.0",)
    # One is faster with a sample at a time, the other with all at once, which is best.
    rows, none = ((0.5, 2.0), (1.0, 1.2)), ((0.0, 0.0),) * 2
    costs = tuple(replace(c, forward_s=rows, backward_s=none) for c in table.costs)
    unlike = replace(table, costs=costs)
    assert one_device(unlike).used_devices == ("1.0",)
    assert one_device(unlike, Tried(microbatches=4)).used_devices == ("0.0",)
    with pytest.raises(InfeasibleError, match="one device does not fit"):
        one_device(replace(few, device_classes=(small, replace(small, name="b", devices=("1.0",)))))


def unlike(units: int) -> CostTable:
    """Sixteen devices with room for one unit, no two equal: no search is over all of them."""
    speeds = tuple(1 + 0.01 * i for i in range(16))
    return make_table([1.0] * units, speeds, (1,) * 16, weight_bytes=10.0, memory_bytes=15.0)


def test_what_fits_over_all_devices_is_found_where_only_some_are_searched() -> None:
    table = replace(unlike(16), in_step_reason="samples meet")
    found = partition(table, gap=0.01)
    assert any("samples meet" in note for note in found.notes)
    assert len(found.used_devices) == 16
    assert found.objective_s == min(p.objective_s for p in simple_plans(table))
    assert found.bound_s == physical_bound_s(table) and found.status == "feasible"
    assert found.truncated_by == (CUT,) and "among the faster devices" in found.family
    again = partition(table, incumbent=(found.pipelines, found.schedule), compare_simple=False)
    assert again.pipelines == found.pipelines and again.truncated_by == (CUT,)


def test_a_search_over_some_devices_does_not_say_that_nothing_fits() -> None:
    with pytest.raises(InfeasibleError) as told:
        partition(unlike(17))
    assert "no plan was found that fits" in str(told.value) and "among the faster" in str(told.value)
    assert told.value.need is None and "least demanding" not in str(told.value)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(max_units=3), st.data())
def test_a_plan_beyond_what_was_searched_has_no_bound_of_it(
    table: CostTable, data: st.DataObject
) -> None:
    """One pipeline with a part of the ways to staff stages: simple plans may be shorter, or alone fit."""
    whole = choose_family(table, "auto", "auto")
    kept = data.draw(st.lists(st.sampled_from(whole.options), min_size=1, unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "choose_family", lambda *_: replace(whole, options=tuple(kept)))
        patch.setattr(pipeline, "groupings", lambda _: [])
        try:
            found = partition(table, gap=0.0)
        except InfeasibleError:
            return
    takes = {o.take for o in kept}

    def is_searched(plan: Sequence[PipelineChoice]) -> bool:
        return len(plan) == 1 and all(_take(whole, stage) in takes for stage in plan[0].stages)

    beyond = BEYOND in found.truncated_by
    steps = [step_s for plan, step_s in fitting_plans(table) if beyond or is_searched(plan)]
    least_s = min(steps, default=math.inf)
    assert found.bound_s <= least_s * (1 + 1e-9)
    if found.bound_s > found.physical_bound_s * (1 + 1e-9):
        assert found.objective_s >= least_s * (1 - 1e-9) and not beyond


def _take(family: Family, stage: StageChoice) -> tuple[int, ...]:
    devices = {d for r in stage.replicas for d in r.devices}
    return tuple(len(devices.intersection(cell.devices)) for cell in family.cells.cells)
