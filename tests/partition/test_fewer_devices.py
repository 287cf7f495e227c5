"""Unlike devices that are too many to search: which are left, how soon, what is answered in no time."""

import itertools
import time
from dataclasses import replace

import pytest
from all_plans import best_step_s
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, assume, given, settings

from graphpar.cost import CostTable, ModeCost
from graphpar.errors import InfeasibleError
from graphpar.partition import family, fewer_devices, staffings
from graphpar.partition.all_devices import CUT
from graphpar.partition.cells import Cells, find_cells
from graphpar.partition.chains import warm as chain_warm
from graphpar.partition.family import choose_family
from graphpar.partition.fewer_devices import first_devices
from graphpar.partition.handmade import simple_plans
from graphpar.partition.infeasible import some_plan_fits
from graphpar.partition.jit import COMPILED
from graphpar.partition.pipeline import partition


def named_costs(table: CostTable) -> dict[tuple[tuple[str, ...], object], tuple[ModeCost, ...]]:
    """What every mode costs, by the names of its members."""
    names = [c.name for c in table.device_classes]
    return {(tuple(names[k] for k in m.members), m.key[1:]): m.costs for m in table.every_mode}


def with_rows_by_class(table: CostTable) -> CostTable:
    """Whatever units may have for each class, another one for each."""
    each = tuple(map(float, range(len(table.device_classes))))
    rows = tuple((k + 1.0,) * len(table.sizes) for k in each)
    costs = tuple(
        replace(
            cost, weight_s=rows, split_s=rows, again_s=rows, weights_by_class=each,
            saved_by_class=rows, working_by_class=rows, deferred_by_class=rows,
        )
        for cost in table.costs
    )  # fmt: skip
    return replace(table, costs=costs)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(modes=True) | small_tables(modes=True).map(with_rows_by_class))
def test_those_that_are_left_cost_what_they_did(table: CostTable) -> None:
    whole = named_costs(table)
    for numbers in itertools.product(*(range(len(c.devices) + 1) for c in table.device_classes)):
        if not any(numbers):
            continue
        some = first_devices(table, numbers)
        pairs = zip(table.device_classes, numbers, strict=True)
        assert list(some.class_of) == [d for c, number in pairs for d in c.devices[:number]]
        left = {c.name for c in some.device_classes}
        kept = {key: costs for key, costs in whole.items() if left.issuperset(key[0])}
        assert named_costs(some) == kept


def check_some(table: CostTable) -> None:
    """Every plan of all devices, and every plan of those that are searched, against what is told."""
    some = choose_family(table, "auto", "auto").table
    best_s, some_s = best_step_s(table), best_step_s(some)
    if best_s is None:
        with pytest.raises(InfeasibleError, match="searched were") as told:
            partition(table, explain_s=0.0)
        assert told.value.need is None
        return
    try:
        found = partition(table, gap=0.0, explain_s=0.0)
    except InfeasibleError:
        found = None
    if found is None:
        assert some_s is None
        return
    beyond = not set(some.class_of).issuperset(found.used_devices)
    assert found.bound_s <= (best_s if beyond or some_s is None else some_s) * (1 + 1e-9)
    assert all(p.physical_bound_s <= best_s * (1 + 1e-9) for p in (found, *found.runners_up))
    if found.objective_s > best_s * (1 + 1e-9):
        assert found.status == "feasible" and CUT in found.truncated_by


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(max_units=3, modes=True))
def test_what_is_proven_of_some_devices_is_told_of_these_alone(table: CostTable) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (fewer_devices, staffings):
            patch.setattr(module, "MOST_STATES", 3)
        assume(choose_family(table, "auto", "auto").partial)
        check_some(table)


def test_the_best_of_some_devices_is_not_told_to_be_the_best_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slow device is left out that would halve the step."""
    for module in (fewer_devices, staffings):
        monkeypatch.setattr(module, "MOST_STATES", 3)
    check_some(make_table([1.0, 0.5, 1.0], (2.0, 2.0, 1.1), (1, 1, 1), batch=2))


def unlike(number: int, memory_bytes: float = 1e12) -> CostTable:
    """Devices no two of which are equal, the last one fastest, and units without repetition."""
    seconds = [1 + i / 100 for i in range(30)]
    return make_table(
        seconds, [1 + i / 40 for i in range(number)], (1,) * number, memory_bytes=memory_bytes
    )


def test_most_are_left_out_without_looking_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def looked_at(table: CostTable) -> Cells:
        looks.append(len(table.class_of))
        return find_cells(table)

    monkeypatch.setattr(family, "find_cells", looked_at)
    found = choose_family(unlike(160), "auto", "auto")
    assert looks[0] == 160 and all(number <= 12 for number in looks[1:])
    used = [c.devices[0] for c in found.cells.cells]
    assert used == [f"{i}.0" for i in range(160 - len(used), 160)]
    assert "among the faster devices only" in found.staffing


def test_saying_why_nothing_fits_ends_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on whenever somebody looks at it."""
    looks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(looks) / 20)
    with pytest.raises(InfeasibleError):
        partition(unlike(40, memory_bytes=0.5), time_limit_s=0.5)
    # The limit, a fifth of a second at least for why, and one look by each of those who stop.
    assert next(looks) <= 10 + 4 + 16


@pytest.mark.skipif(not COMPILED, reason="memory is asked by compiled loops")
def test_a_plan_that_fits_is_there_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device holds six units, the others one each: no simple plan fits."""
    table = make_table([1.0] * 10, (1.0, 1.1, 1.2, 1.3, 1.4), (1,) * 5, weight_bytes=10.0)
    sizes = [65.0, 15.0, 15.0, 15.0, 15.0]
    classes = [replace(c, memory_bytes=m) for c, m in zip(table.device_classes, sizes, strict=True)]
    table = replace(table, device_classes=tuple(classes))
    assert chain_warm.loops_are_ready(float("inf"))
    monkeypatch.setattr(chain_warm, "LOOPS_PAY", 0)
    found = partition(table, time_limit_s=1e-9)
    assert len(found.used_devices) == 5 and found.truncated_by
    assert found.bound_s <= partition(table).objective_s <= found.objective_s


def test_more_units_than_can_be_searched_have_the_best_plan_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As 5,478 unlike units are on any device."""
    for name in ("BY_LOOPS", "BY_ARRAYS", "ON_REAL_LINKS"):
        monkeypatch.setattr(family, name, staffings.Effort(10, 10))
    table = make_table([1.0, 2.0, 3.0, 4.0], (1.0, 1.5), (1, 1))
    found = partition(table)
    assert found.truncated_by == ("units: 4 unlike units are too many to search",)
    assert found.objective_s == min(p.objective_s for p in simple_plans(table))
    assert found.bound_s == found.physical_bound_s < found.objective_s
    small = make_table([1.0, 2.0, 3.0, 4.0], (1.0, 1.5), (1, 1), weight_bytes=2.0, memory_bytes=1.0)
    with pytest.raises(InfeasibleError, match="none of the plans at hand fits, and 4 unlike units"):
        partition(small)
    assert not some_plan_fits(small, "auto", "auto", float("inf"))
