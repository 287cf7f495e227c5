"""Unlike devices that are too many to search: which are left, how soon, what is answered in no time."""

import itertools
import time
from dataclasses import replace

import pytest
from cost_tables import make_table, small_tables
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable, ModeCost
from graphpar.errors import InfeasibleError
from graphpar.partition import chain_warm, family
from graphpar.partition.cells import Cells, find_cells
from graphpar.partition.family import choose_family
from graphpar.partition.fewer_devices import first_devices
from graphpar.partition.jit import COMPILED
from graphpar.partition.pipeline import partition


def named_costs(table: CostTable) -> dict[tuple[tuple[str, ...], object], tuple[ModeCost, ...]]:
    """What every mode costs, by the names of its members."""
    names = [c.name for c in table.device_classes]
    return {(tuple(names[k] for k in m.members), m.key[1:]): m.costs for m in table.every_mode}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_tables(modes=True), st.data())
def test_those_that_are_left_cost_what_they_did(table: CostTable, data: st.DataObject) -> None:
    numbers = [data.draw(st.integers(0, len(c.devices))) for c in table.device_classes]
    assume(any(numbers))
    some = first_devices(table, numbers)
    pairs = zip(table.device_classes, numbers, strict=True)
    assert list(some.class_of) == [d for c, number in pairs for d in c.devices[:number]]
    whole, left = named_costs(table), {c.name for c in some.device_classes}
    kept = {key: costs for key, costs in whole.items() if left.issuperset(key[0])}
    assert named_costs(some) == kept


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
