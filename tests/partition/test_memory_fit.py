"""Whether anything fits into memory, by memory alone, against every plan there is."""

from dataclasses import replace

from all_plans import best_step_s
from cost_tables import small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable
from graphpar.partition import infeasible
from graphpar.partition.counting import CountingLimits
from graphpar.partition.family import choose_family
from graphpar.partition.memory_fit import larger_hold_more
from graphpar.partition.programs import Programs
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import Setting


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(max_units=3, modes=True), st.sampled_from([0.1, 0.3, 0.6, 1.0]))
def test_memory_alone_says_what_every_plan_says(table: CostTable, part: float) -> None:
    """What it excludes no plan has, and what it finds is one."""
    table = infeasible.scale_memory(table, part)
    family = choose_family(table, "auto", "auto")
    programs = Programs(family, CountingLimits(0.5, "highs"))
    known = infeasible._by_memory_alone(programs, family.cells.counts, table.batch, 1)
    some = best_step_s(table) is not None
    assert known is None or known == some


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(max_batch=4, modes=True), st.sampled_from([0.02, 0.1, 0.3, 0.6, 1.0]))
def test_every_number_of_microbatches_is_excluded(table: CostTable, part: float) -> None:
    table = infeasible.scale_memory(table, part)
    family = choose_family(table, "auto", "auto")
    programs = Programs(family, CountingLimits(0.5, "highs"))
    fit = programs.memory_fit(family.cells.counts, table.max_replicas)
    schedule = family.schedules[0]
    for microbatches in range(1, table.max_microbatches + 1):
        setting = Setting(table.batch, microbatches, schedule)
        tasks = programs.tasks(family.cells.counts, table.batch, (schedule,))
        (task,) = (t for t in tasks if t.setting == setting)
        fits = task.build().solve(StageLimits(), float("inf")) is not None
        if fit.witness(setting) is not None:
            assert fits
        if not fits:
            continue
        assert fit.may_fit(setting)
        if larger_hold_more(table):
            for finer in range(microbatches, table.max_microbatches + 1):
                assert fit.may_fit(replace(setting, microbatches=finer))
