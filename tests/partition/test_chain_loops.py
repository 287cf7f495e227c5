"""The search by compiled loops and labels finds what the search by limits and arrays finds."""

import time
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from all_plans import best_step_s
from cost_tables import FAST, make_table, small_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_samples import sample_partition, table_for

from graphpar.cost import CostTable, LinkCost, Topology
from graphpar.errors import InfeasibleError
from graphpar.partition import cuts, memory_fit
from graphpar.partition.chains import crew_loops, crews, labels, path_loops, set_loops, swept
from graphpar.partition.chains import limits as chain
from graphpar.partition.chains import loops as chain_loops
from graphpar.partition.chains import warm as chain_warm
from graphpar.partition.chains.columns import Columns, StagePrices
from graphpar.partition.chains.example import run_example
from graphpar.partition.chains.hopeful import Hopeful, all_allowed
from graphpar.partition.chains.labels import not_outdone
from graphpar.partition.chains.relaxed import Relaxation
from graphpar.partition.chains.swept import SweptProgram
from graphpar.partition.counting.programme import CountingLimits
from graphpar.partition.family import choose_family
from graphpar.partition.jit import COMPILED
from graphpar.partition.option_rows import OptionRows
from graphpar.partition.pipeline import partition
from graphpar.partition.programs import Programs
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.types import Partition, SearchedSchedule
from graphpar.partition.unit_arrays import Cache, Setting, run_ranges

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def planned(table: CostTable, gap: float, *, loops: bool) -> Partition | None:
    """The plan by either search, None where nothing fits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_warm, "LOOPS_PAY", 0 if loops else 10**18)
        # Everything is bounded, however few columns there are.
        for limit in ("MANY_FOR_LOOPS", "_FEW_FOR_LOOPS", "_FEW_COLUMNS"):
            patch.setattr(chain, limit, 0)
        patch.setattr(crews, "FEW_FOR_SETS", 0)
        patch.setattr(swept, "_MANY_LABELS", 2)
        patch.setattr(cuts, "PARTS", 2)
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


@st.composite
def on_own_links(draw: st.DrawFn) -> CostTable:
    """Every device is a node, and every two nodes have a link of their own."""
    table = draw(small_tables(max_units=3, max_batch=3, modes=True))
    nodes = {d: d for d in table.class_of}
    links = st.builds(LinkCost, st.sampled_from([0.0, 0.1]), st.sampled_from([1e4, 100.0, 20.0, 5.0]))
    between = {pair: draw(links) for pair in combinations(nodes, 2)}
    inside = dict.fromkeys(nodes, FAST)
    return replace(table, topology=Topology(nodes, inside, draw(links), between))


@settings(max_examples=15, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=3, max_batch=4, modes=True) | on_own_links())
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
    monkeypatch.setattr(chain_warm, "loops_are_ready", lambda deadline_s, steps: False)
    found = partition(table_for(sample_partition()), gap=0.0, time_limit_s=60.0)
    assert any("slower form" in note for note in found.notes)


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
@pytest.mark.parametrize(
    ("kept", "steps", "left_s", "most_s"),
    [
        (True, 20_000, 100.0, 2.0),
        (True, 999_999, 100.0, 2.0),
        (True, 1_000_000, 100.0, 30.0),
        (False, 1_000_000, 100.0, 70.0),
    ],
)
def test_few_steps_wait_for_loops_to_load_and_many_for_the_compiler(
    kept: bool, steps: int, left_s: float, most_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited_s: list[float] = []
    compiler = chain_warm._Compiler()
    monkeypatch.setattr(compiler, "start", lambda: None)
    monkeypatch.setattr(compiler.ready, "wait", lambda seconds: waited_s.append(seconds))
    monkeypatch.setattr(chain_warm, "_COMPILER", compiler)
    monkeypatch.setattr(chain_warm, "is_kept", lambda _: kept)
    assert not chain_warm.loops_are_ready(time.monotonic() + left_s, steps)
    assert most_s - 1.0 <= waited_s[0] <= most_s


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_searches_that_are_short_together_have_nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []
    compiler = chain_warm._Compiler()
    monkeypatch.setattr(compiler, "start", lambda: begun.append(True))
    monkeypatch.setattr(chain_warm, "_COMPILER", compiler)
    monkeypatch.setattr(chain_warm, "is_kept", lambda _: False)
    for known in ([], [], [True]):
        assert not chain_warm.loops_are_ready(time.monotonic() + 1.2, 1e9)
        assert begun == known


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
@pytest.mark.parametrize(
    ("loaded", "kept", "left_s", "least"),
    [
        (True, True, 0.4, 1_000),
        (False, True, 100.0, 20_000),
        (False, True, 0.4, 1_000_000),  # it would end before they are loaded
        (False, False, 100.0, 1_000_000),
    ],
)
def test_loops_are_loaded_and_compiled_for_longer_searches_alone(
    loaded: bool, kept: bool, left_s: float, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = chain_warm._Compiler()
    if loaded:
        compiler.ready.set()
    monkeypatch.setattr(chain_warm, "_COMPILER", compiler)
    monkeypatch.setattr(chain_warm, "is_kept", lambda _: kept)
    pays = [chain_warm.loops_pay(time.monotonic() + left_s, steps) for steps in (least - 1, least)]
    assert pays == [False, True]


def test_links_of_their_own_count_as_columns_do() -> None:
    plain = make_table((1.0, 2.0, 1.0), (1.0, 2.0, 3.0), (1, 1, 1))
    nodes = {device: device for device in plain.class_of}
    between = {
        pair: LinkCost(0.0, 10.0 + number) for number, pair in enumerate(combinations(sorted(nodes), 2))
    }
    alike = replace(plain, topology=Topology(nodes, {}, LinkCost(0.0, 10.0)))
    unlike = replace(plain, topology=Topology(nodes, {}, LinkCost(0.0, 10.0), between))

    def steps(table: CostTable) -> int:
        limits = CountingLimits(0.0, "highs")
        return Programs(choose_family(table, "auto", "auto"), limits, float("inf"))._most_steps()

    assert steps(unlike) == 4 * steps(alike)


Key = tuple[int, int]
"""An option or crew, and a slot."""


def by_place(columns: Columns) -> dict[Key, tuple[float, float, float, float]]:
    """What columns cost, cost with their extra, their post, and the replicas they may have below."""
    rows = zip(
        columns.option.tolist(),
        columns.slot.tolist(),
        columns.cost_s.tolist(),
        (columns.cost_s + columns.extra_s).tolist(),
        columns.post_s.tolist(),
        columns.most_below.tolist(),
        strict=True,
    )
    return {(o, s): (cost, whole, post, below) for o, s, cost, whole, post, below in rows}


def stage_prices(table: CostTable, setting: Setting) -> StagePrices:
    """Of all stages in all modes, with compiled loops."""
    family = choose_family(table, "auto", "auto")
    runs = run_ranges(table.num_units)
    cache: Cache = {}
    rows = OptionRows(table, family.cells, family.options, setting, runs, cache)
    return StagePrices(table, rows, setting, runs, cache, loops=True)


def assert_never_better(exact: Columns, relaxed: Columns, crews: OptionRows | None = None) -> None:
    """Every stage is there among those that stand for it, at no more and with as much room."""
    known = by_place(relaxed)
    for (option, slot), (cost, whole, post, below) in by_place(exact).items():
        own = (option, slot) if crews is None else (crews.crew_of[option], crews.slots.every.run[slot])
        least = known[own]
        assert all(a <= b * (1 + 1e-9) + 1e-12 for a, b in zip(least, (cost, whole, post), strict=False))
        assert least[3] >= below


def on_runs(columns: Columns, prices: StagePrices) -> Columns:
    """The same on slots that leave open which links are beside them."""
    return replace(columns, slot=prices.rows.slots.at(columns.slot).run)


def assert_room(prices: StagePrices) -> None:
    """Compiled loops count the microbatches that array operations count; of a team the most."""
    rows, units, (alone, fits) = prices.rows, prices._units, prices._rooms
    best = np.full((*alone.shape, rows.widths[-1] + 1), -1.0)
    for i, mode in enumerate(rows.modes):
        most = units.in_flight_by_width(mode, rows.widths).T
        assert (prices._flight_by_run[:, i, rows.widths] == most.astype(np.float32)).all()
        team = rows.team_of_mode[i]
        best[:, team, rows.widths] = np.maximum(best[:, team, rows.widths], most)
    assert (alone == best[:, :, 1].astype(np.float32)).all()
    assert (fits == (best >= 1) @ (1 << np.arange(best.shape[2]))).all()


@settings(max_examples=25, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=3, max_batch=6, modes=True))
def test_what_stands_for_a_stage_is_at_least_as_good(table: CostTable) -> None:
    schedules: tuple[SearchedSchedule, ...] = ("1f1b", "gpipe") if table.training else ("gpipe",)
    for microbatches in range(1, table.max_microbatches + 1):
        for schedule in schedules:
            prices = stage_prices(table, Setting(table.batch, microbatches, schedule))
            exact = prices.exact(prices.relaxed(StageLimits()))[0]
            assert_room(prices)
            for spread in (False, True):
                assert_never_better(exact, prices.relaxed(StageLimits(), spread=spread))
            assert_never_better(on_runs(exact, prices), prices.on_any_links(StageLimits()))


@settings(max_examples=12, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=3, max_batch=6, modes=True), st.sampled_from([1.1, 1.5, 3.0, np.inf]))
def test_crews_leave_every_stage_that_a_bound_leaves(table: CostTable, factor: float) -> None:
    """At the same prices whatever a bound on a mode and its links leaves, that on its devices leaves."""
    schedules: tuple[SearchedSchedule, ...] = ("1f1b", "gpipe") if table.training else ("gpipe",)
    for microbatches in range(1, table.max_microbatches + 1):
        for schedule in schedules:
            prices = stage_prices(table, Setting(table.batch, microbatches, schedule))
            rows, exact = prices.rows, prices.exact(prices.relaxed(StageLimits()))[0]
            counts = tuple(choose_family(table, "auto", "auto").cells.counts)
            of_rows, of_crews = (
                Relaxation(
                    slots, table.num_units, rows.take[i], rows.width[i],
                    counts, np.arange(len(counts), dtype=np.float64) + 1, 1.0, loops=True,
                )
                for i, slots in (
                    (np.arange(len(rows.width)), rows.slots),
                    (rows.first_rows, rows.whole_slots),
                )
            )  # fmt: skip
            whole = of_rows.bound(exact, np.inf, rounds=1, deep=True)
            target_s = factor * whole.bound_s
            bound_s, ideal = of_crews.first_look(prices, StageLimits(all_s=target_s), deep=True)
            own_s = (
                exact.cost_s
                + exact.extra_s
                + exact.post_s
                + prices._beside[rows.slots.every.run[exact.slot]]
            )
            some = exact.pick(own_s < target_s * (1 - 1e-9))
            bounded = of_rows.bound(some, np.inf, rounds=1, deep=True)
            assert bound_s <= bounded.bound_s * (1 + 1e-9)
            left = bounded.bound_s + bounded.reduced_s < target_s * (1 - 1e-9)
            assert_never_better(some.pick(left), ideal, rows)


@settings(max_examples=25, deadline=None, suppress_health_check=RELAXED)
@given(small_tables(max_units=3, max_batch=4))
def test_no_crew_is_left_where_nothing_fits(table: CostTable) -> None:
    """In one mode a crew has room where its stage has, in training and in inference."""
    prices = stage_prices(table, Setting(table.batch, table.batch, "gpipe"))
    rows, counts = prices.rows, tuple(choose_family(table, "auto", "auto").cells.counts)
    bound = Relaxation(
        rows.whole_slots, table.num_units, rows.take[rows.first_rows], rows.width[rows.first_rows],
        counts, np.ones(len(counts)), 1.0, loops=True,
    )  # fmt: skip
    crews = bound.first_look(prices, StageLimits(), deep=True)[1]
    left = set(zip(crews.option.tolist(), crews.slot.tolist(), strict=True))
    stages = prices.on_any_links(StageLimits())
    assert left <= set(zip(rows.crew_of[stages.option].tolist(), stages.slot.tolist(), strict=True))


def test_a_stage_that_memory_keeps_at_the_end_is_not_excluded() -> None:
    """Two devices share the first unit; one has the second, of which it holds one microbatch alone."""
    table = make_table(
        (2.0, 1.0), (1.0,), (3,), weight_bytes=3.0, saved_bytes=1.0, memory_bytes=5.0, batch=4
    )
    found = planned(table, 0.0, loops=True)
    assert found is not None
    assert [len(s.replicas) for s in found.pipelines[0].stages] == [2, 1]
    assert found.objective_s == pytest.approx(best_step_s(table))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 1)] * 2, *[st.integers(0, 3)] * 4), max_size=12))
def test_columns_are_outdone_by_others_on_the_same_slot(rows: list[tuple[int, ...]]) -> None:
    """Whoever is left out has one that is left: no dearer, whatever extra and post the others have."""
    table = np.array(sorted(rows), dtype=np.float64).reshape(-1, 6).T
    team, slot = (row.astype(np.intp) for row in table[:2])
    cost, extra, post, below = (np.ascontiguousarray(row) for row in table[2:])
    kept = not_outdone(team, slot, (cost, extra, post, below), 1.0)

    def costs(column: int, most: int, last: int) -> float:
        return float(cost[column] + max(extra[column], most) + max(post[column], last))

    for left_out in np.flatnonzero(~kept).tolist():
        alike = kept & (team == team[left_out]) & (slot == slot[left_out]) & (below >= below[left_out])
        assert any(
            all(costs(c, m, p) <= costs(left_out, m, p) for m in range(4) for p in range(4))
            for c in np.flatnonzero(alike).tolist()
        )
    for column, other in permutations(np.flatnonzero(kept).tolist(), 2):
        same = (team[column], slot[column]) == (team[other], slot[other])
        dearer = any(costs(other, m, p) > costs(column, m, p) for m in range(4) for p in range(4))
        assert not same or dearer or below[other] < below[column]


def test_waiting_leaves_a_fast_replica_fewer_microbatches() -> None:
    """Without transfers the fast one has three of four and no room for them, with transfers two."""
    table = make_table(
        (1.0, 1.0),
        (3.0, 0.3),
        (1, 1),
        link=LinkCost(20.0, 1e12),
        cut_bytes=1.0,
        saved_bytes=1.0,
        memory_bytes=3.5,
    )
    prices = stage_prices(table, Setting(4, 4, "1f1b"))
    exact = prices.exact(prices.relaxed(StageLimits()))[0]
    wide = exact.pick(
        (prices.rows.width[exact.option] == 2) & (prices.rows.slots.every.before[exact.slot] > 0)
    )
    assert len(wide) and (wide.most_below > 4).all()
    assert_never_better(on_runs(exact, prices), prices.on_any_links(StageLimits()))


def test_where_nobody_is_hopeful_there_is_no_stage() -> None:
    prices = stage_prices(make_table(), Setting(4, 4, "1f1b"))
    none = np.zeros(0, dtype=np.intp)
    hopeful = Hopeful(none, np.zeros(1, dtype=np.intp), none, all_allowed(0))
    for find in (prices.relaxed, prices.on_any_links):
        assert len(find(StageLimits()))
        assert len(find(StageLimits(), hopeful=hopeful)) == 0


def test_microbatches_that_are_faster_when_larger_are_nobodys_gain() -> None:
    """Three samples in two microbatches: nobody knows who has the larger one, which is faster."""
    table = make_table((1.0,), (1.0, 1.1), (1, 1), batch=3)
    none = (0.0,) * 3
    rows = ((4.0, 2.0, 3.0), (4.4, 2.2, 3.3))
    costs = tuple(
        replace(c, forward_s=rows, backward_s=(none, none), saved_bytes=none, working_bytes=none)
        for c in table.costs
    )
    table = replace(table, sizes=(1, 2, 3), costs=costs)
    prices = stage_prices(table, Setting(3, 2, "1f1b"))
    relaxed = prices.relaxed(StageLimits())
    assert_never_better(prices.exact(relaxed)[0], relaxed)
    found, best = partition(table, gap=0.0), best_step_s(table)
    assert found.objective_s == pytest.approx(best)
    assert found.bound_s <= found.objective_s


def test_bounds_with_and_without_post_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MANY_FOR_LOOPS", "_FEW_FOR_LOOPS"):
        monkeypatch.setattr(chain, limit, 0)
    table = make_table((1.0, 1.0), optimizer_s=50.0)
    family = choose_family(table, "1f1b", 4)
    prices = stage_prices(table, Setting(4, 4, "1f1b"))
    program = SweptProgram(prices, family.cells.counts, 2, np.ones(len(family.cells.counts)))
    inf = float("inf")

    def best(weight: float) -> float:
        bound = program.tighten(inf, inf, weight)
        answer = program.best(inf, inf, weight, inf)
        assert answer is not None
        takes = answer.fill_s + answer.extra_s + weight * answer.post_s
        assert bound <= takes * (1 + 1e-9)
        return takes

    with_post, without = best(1.0), best(0.0)
    assert without < 20.0 < with_post
    # What is asked of larger shares on the way changes nothing.
    program.none_from(with_post, inf)
    assert program.tighten(2 * without, inf, 0.0) <= without * (1 + 1e-9)
    assert program.best(2 * without, inf, 0.0, inf) is not None


@pytest.mark.parametrize("compiled", [True, False])
def test_of_many_unlike_devices_none_is_left_out_but_for_want_of_a_compiler(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve kinds of one device each and units without repetition: kinds cannot be counted."""
    seconds, speeds = [1 + i / 100 for i in range(50)], [1 + i / 4 for i in range(12)]
    table = make_table(seconds, speeds, (1,) * 12)
    classes = list(table.device_classes)
    classes[0] = replace(classes[0], memory_bytes=3e12)
    nodes = {d: d[0] for d in table.class_of}
    table = replace(
        table,
        device_classes=tuple(classes),
        topology=Topology(nodes, dict.fromkeys(nodes.values(), FAST), LinkCost(1e-3, 1e9)),
    )
    monkeypatch.setattr("graphpar.partition.family.COMPILED", compiled)
    found = choose_family(table, "auto", "auto")
    if compiled:
        assert found.cells.counts == (1,) * 12
        assert "any three devices" in found.staffing
    else:
        # The slowest stays: it has most memory.
        assert len(found.cells.counts) >= 8
        assert found.cells.cells[0].devices == table.device_classes[0].devices
        assert "among the faster devices only" in found.staffing


@pytest.mark.skipif(not COMPILED, reason="needs numba")
def test_a_search_needs_no_loop_for_other_arguments_than_were_compiled() -> None:
    modules = crew_loops, labels, chain_loops, path_loops, set_loops, memory_fit
    loops = [f for module in modules for f in vars(module).values() if hasattr(f, "signatures")]
    assert len(loops) > 15

    def compiled() -> dict[str, list[str]]:
        return {f.__name__: [str(s) for s in f.signatures] for f in loops}

    run_example()
    known = compiled()
    table = make_table((1.0, 2.0, 4.0), (1.0, 2.0), (1, 2), cut_bytes=1.0)
    first, *others = table.class_of
    nodes = {first: "a", **dict.fromkeys(others, "b")}
    compare(table)
    compare(replace(table, topology=Topology(nodes, {"a": FAST, "b": FAST}, LinkCost(0.1, 1.0))))
    assert compiled() == known
    assert "Literal" not in str(known)
