"""Whether anything fits into memory, by memory alone, and what would, against every plan there is."""

import math
import re
import time
from dataclasses import replace

import pytest
from all_plans import best_step_s
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition import infeasible, pipeline
from graphpar.partition.counting.programme import CountingLimits
from graphpar.partition.family import Family, choose_family
from graphpar.partition.memory_fit import larger_hold_more
from graphpar.partition.pipeline import partition
from graphpar.partition.programs import Programs
from graphpar.partition.relaxed_tables import with_batch, with_options
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.unit_arrays import Setting


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(max_units=3, modes=True), st.sampled_from([0.1, 0.3, 0.6, 1.0]))
def test_memory_alone_and_remedies_say_what_every_plan_says(table: CostTable, part: float) -> None:
    """What it excludes no plan has, what it finds is one; what would fit does, a step less does not."""
    table = infeasible.scale_memory(table, part)
    family = choose_family(table, "auto", "auto")
    programs = Programs(family, CountingLimits(0.5, "highs"))
    known = infeasible._by_memory_alone(programs, family.cells.counts, table.batch, 1, math.inf)
    some = best_step_s(table) is not None
    assert known is None or known == some
    if some:
        return
    with pytest.raises(InfeasibleError) as caught:
        partition(table)
    text = str(caught.value)
    for factor in map(float, re.findall(r"plan needs ([0-9.]+) times", text)):
        assert _holds(infeasible.scale_memory(table, factor))
        assert not _holds(infeasible.scale_memory(table, factor / 1.04))
    for number, name in re.findall(r"(\d+) more of kind(\d)", text):
        if int(number) + len(table.class_of) <= 4:  # Of more devices there are too many plans.
            assert _holds(infeasible.more_devices(table, int(name), int(number)))
            assert not _holds(infeasible.more_devices(table, int(name), int(number) - 1))
    for batch in map(int, re.findall(r"a batch of (\d+) instead", text)):
        assert _holds(with_batch(table, batch))
        assert not _holds(with_batch(table, batch + 1))
    for again, level in re.findall(r"(recomputation)?(?: with )?(?:ZeRO level (\d))?(?:;|$)", text):
        if again or level:
            assert _holds(with_options(table, recompute=bool(again), zero=int(level or 0)))
        if level:
            assert not _holds(with_options(table, recompute=bool(again), zero=int(level) - 1))


@pytest.mark.parametrize("too_few", [0, 10, 63])
def test_no_fewer_further_devices_would_do(too_few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the fewest is, up to the most that are proposed; beyond that none are."""
    table, most = make_table(), infeasible._MOST_DEVICES
    family = choose_family(table, "auto", "auto")
    monkeypatch.setattr(infeasible, "_too_few", lambda *_: [too_few])
    for least in range(too_few + 1, most + 2):

        def fits(more: CostTable, *_: object, least: int = least) -> bool:
            return len(more.class_of) - len(table.class_of) >= least

        monkeypatch.setattr(infeasible, "_fits_table", fits)
        told = list(infeasible._further_devices(table, family, math.inf))
        assert told == [f"{least} more of kind0"] * (least <= most)


def test_a_search_that_found_nothing_is_over_with_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table([1.0] * 4, (1.0,), (2,), batch=2, weight_bytes=10.0, memory_bytes=5.0)
    asked_s: list[float] = []

    def fits(_: Family, deadline_s: float) -> None:
        asked_s.append(deadline_s - time.monotonic())

    monkeypatch.setattr(infeasible, "fits", fits)
    monkeypatch.setattr(pipeline, "held_by_memory", lambda _: (True, None))
    with pytest.raises(InfeasibleError, match="in the time given"):
        partition(table, time_limit_s=1e-9)
    assert len(asked_s) == 1 and asked_s[0] <= 0.2


def _holds(table: CostTable) -> bool:
    return best_step_s(table) is not None


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


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(modes=True), st.sampled_from([0.05, 0.1, 0.3, 1.0]), st.sets(st.integers(1, 3)))
def test_what_is_cut_at_some_units_is_excluded_by_memory(
    table: CostTable, part: float, cuts: set[int]
) -> None:
    """A pipeline that is found among these stages is never denied."""
    table = infeasible.scale_memory(table, part)
    family = choose_family(table, "auto", "auto")
    counts = family.cells.counts
    some = sorted(cut for cut in cuts if cut < table.num_units)
    programs = Programs(family, CountingLimits(0.5, "highs")).with_cuts(some)
    tasks = programs.tasks(counts, table.batch, family.schedules)
    fits = any(t.build().solve(StageLimits(), float("inf")) is not None for t in tasks)
    assert infeasible.one_may_fit(programs) or not fits


def test_memory_tells_cuts_apart() -> None:
    """Four units of 10 bytes; the second device has room for one of them."""
    table = make_table([1.0] * 4, (1.0, 1.0), (1, 1), weight_bytes=10.0, memory_bytes=35.0)
    classes = table.device_classes[0], replace(table.device_classes[1], memory_bytes=15.0)
    table = replace(table, device_classes=classes)
    programs = Programs(choose_family(table, "auto", "auto"), CountingLimits(0.5, "highs"))
    cut = {c: infeasible.one_may_fit(programs.with_cuts([c])) for c in (1, 2, 3)}
    assert cut == {1: True, 2: False, 3: True}


def test_devices_without_memory_are_told() -> None:
    """No multiple of nothing is proposed."""
    with pytest.raises(InfeasibleError, match="2 devices have 0 B together, 0 B at most on one") as told:
        partition(make_table(memory_bytes=0.0))
    assert "times" not in str(told.value)
