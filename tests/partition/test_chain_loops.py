"""The search by compiled loops and labels finds what the search by limits and arrays finds."""

import pytest
from cost_tables import small_tables
from hypothesis import HealthCheck, given, settings
from plan_samples import sample_partition, table_for

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition import chain, chain_warm
from graphpar.partition.pipeline import partition
from graphpar.partition.types import Partition

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def planned(table: CostTable, gap: float, *, loops: bool) -> Partition | None:
    """The plan by either search, None where nothing fits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_warm, "LOOPS_PAY", 0 if loops else 10**18)
        patch.setattr(chain, "MANY_FOR_LOOPS", 0)
        try:
            return partition(table, gap=gap, time_limit_s=600.0)
        except InfeasibleError:
            return None


def compare(table: CostTable) -> None:
    by_loops, by_arrays = planned(table, 0.0, loops=True), planned(table, 0.0, loops=False)
    assert (by_loops is None) == (by_arrays is None)
    if by_loops is None or by_arrays is None:
        return
    if by_loops.status != "optimal" or by_arrays.status != "optimal":
        # Sums between pipelines of several stages: either search says what it left open.
        assert by_loops.bound_s <= by_arrays.objective_s * (1 + 1e-9)
        assert by_arrays.bound_s <= by_loops.objective_s * (1 + 1e-9)
        told = (*by_loops.truncated_by, *by_arrays.truncated_by)
        assert told
        assert all(words.startswith("sums: ") for words in told)
    else:
        assert by_loops.objective_s == pytest.approx(by_arrays.objective_s, rel=1e-9, abs=1e-12)
        assert by_loops.bound_s == pytest.approx(by_arrays.bound_s, rel=1e-9, abs=1e-12)


@settings(max_examples=15, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=3, max_batch=4, modes=True))
def test_loops_find_the_best_plan(table: CostTable) -> None:
    compare(table)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=10, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=4, max_devices=4, max_batch=6, modes=True))
def test_loops_find_the_best_plan_on_four_devices(table: CostTable) -> None:
    compare(table)


def test_a_plan_says_that_it_was_searched_without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_warm, "LOOPS_PAY", 0)
    monkeypatch.setattr(chain_warm, "loops_are_ready", lambda deadline_s: False)
    found = partition(table_for(sample_partition()), gap=0.0, time_limit_s=60.0)
    assert any("slower form" in note for note in found.notes)
