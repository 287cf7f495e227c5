"""The counting programme against the dynamic programme, which places every stage."""

import time
from dataclasses import replace
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
from amounts import examples
from cost_tables import make_table, mode_costs, unit_costs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpar.cost import CostTable, CutEdge, DeviceClass, LinkCost, Mode, Topology
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.errors import InfeasibleError
from graphpar.partition import pipeline
from graphpar.partition.assign import groups_hold, name_devices
from graphpar.partition.cells import (
    Cell,
    Cells,
    class_cells,
    count_vectors,
    find_cells,
    make_option,
    pareto,
)
from graphpar.partition.chains.limits import NotSolvedError
from graphpar.partition.counting import dive, judging, kinds
from graphpar.partition.counting import search as counting_search
from graphpar.partition.counting.among import Among
from graphpar.partition.counting.beam import Harvest
from graphpar.partition.counting.columns import price_columns
from graphpar.partition.counting.floors import Least
from graphpar.partition.counting.options import counting_options, widths
from graphpar.partition.counting.programme import CountingLimits, CountingProgram
from graphpar.partition.counting.segments import grow_segments
from graphpar.partition.family import Family, _counted_family, _homes, _multisets
from graphpar.partition.infeasible import fits
from graphpar.partition.pipeline import partition
from graphpar.partition.pipeline_price import pairs, price
from graphpar.partition.pipeline_search import search
from graphpar.partition.programs import Programs
from graphpar.partition.repeats import Repeats, find_repeats
from graphpar.partition.search import Asked, SearchResult, Task
from graphpar.partition.solver import Backend
from graphpar.partition.stage_costs import StageLimits
from graphpar.partition.types import SearchedSchedule
from graphpar.partition.unit_arrays import Setting

BACKENDS: tuple[Backend, ...] = ("highs", "cbc")
LIMITS = CountingLimits(0.0, "highs")


@st.composite
def block_tables(draw: st.DrawFn) -> CostTable:
    """A head, equal blocks and a tail on up to six devices of two classes in one node."""
    batch, classes, sizes = 4, 2, (1, 4)
    blocks = draw(st.integers(2, 6))
    kinds = tuple(draw(unit_costs(classes, len(sizes), True)) for _ in range(3))
    units = (0, *(1,) * blocks, 2)
    counts = draw(st.sampled_from([(1, 1), (2, 1), (3, 2), (3, 3)]))
    names = [tuple(f"{k}.{i}" for i in range(n)) for k, n in enumerate(counts)]
    memory = [draw(st.sampled_from([1e6, 400.0, 150.0, 100.0])) for _ in counts]
    update = draw(st.sampled_from([0.0, 1.0, 3.0]))
    cut = draw(st.sampled_from([0.0, 3.0]))
    link = draw(st.sampled_from([LinkCost(0.0, 1e4), LinkCost(0.1, 20.0)]))
    return CostTable(
        batch=batch,
        training=True,
        sizes=sizes,
        units=units,
        unit_names=tuple(map(str, range(len(units)))),
        costs=kinds,
        edges=tuple(CutEdge(i, i + 1, cut, cut) for i in range(len(units) - 1)),
        device_classes=tuple(
            DeviceClass(f"kind{k}", n, m, 0.01, update)
            for k, (n, m) in enumerate(zip(names, memory, strict=True))
        ),
        topology=Topology({d: "a" for n in names for d in n}, {"a": link}, link),
        max_microbatches=batch,
        max_replicas=batch,
    )


def best(family: Family, schedule: SearchedSchedule, limits: CountingLimits = LIMITS) -> SearchResult:
    """The best single pipeline of a family."""
    programs = Programs(family, limits)
    tasks = programs.tasks(family.cells.counts, family.table.batch, (schedule,))
    return programs.search(tasks, cutoff_s=float("inf"), gap=0.0, deadline_s=float("inf"))


def by_integers(family: Family, limits: CountingLimits) -> SearchResult:
    """The same, every box by an integer programme."""
    programs = Programs(family, limits)
    tasks = programs.tasks(family.cells.counts, family.table.batch, family.schedules)
    return search(tasks, Asked(cutoff_s=float("inf"), gap=0.0, deadline_s=float("inf")))


def counted(table: CostTable, repeats: Repeats, schedule: SearchedSchedule) -> Family:
    """The family of the counting programme."""
    cells = class_cells(table)
    options = tuple(counting_options(table, cells, table.max_replicas))
    return Family(table, cells, False, options, (schedule,), "auto", "", repeats)


def placed(table: CostTable, schedule: SearchedSchedule) -> Family:
    """All chains whose stages have replicas of one class."""
    cells = find_cells(table)
    takes = [
        take
        for take in count_vectors(cells.counts, table.max_replicas)
        if len({c.device_class for c, n in zip(cells.cells, take, strict=True) if n}) == 1
    ]
    groups = [tuple((i,) for i, n in enumerate(take) for _ in range(n)) for take in takes]
    options = [make_option(cells, g, [cells.cells[i].device_class for (i,) in g]) for g in groups]
    for number, mode in enumerate(table.modes, len(table.device_classes)):
        # ZeRO needs somebody to share with.
        homes = list(_homes(cells, mode))
        for chosen in _multisets(cells.counts, homes, table.max_replicas):
            if len(chosen) > 1 or mode.zero == 0:
                options.append(make_option(cells, chosen, (number,) * len(chosen)))
    return Family(table, cells, True, tuple(options), (schedule,), "auto", "")


def test_solvers_agree() -> None:
    table = many_devices(12, 8)
    family = counted(table, Repeats(1, 1, 10), "1f1b")
    found = [by_integers(family, CountingLimits(0.0, backend)) for backend in BACKENDS]
    steps = [f.best.step_s for f in (*found, best(family, "1f1b")) if f.best is not None]
    assert len(steps) == 3
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)
    assert steps[0] == pytest.approx(steps[2], rel=1e-6)


def test_places_of_equal_members_are_listed_without_their_orders() -> None:
    """Of 20 members over two nodes there are 13 ways, in half a million orders."""
    link = LinkCost(0.0, 1e9)
    nodes = [Cell(0, place, tuple(f"{place}/{i}" for i in range(16))) for place in (0, 1)]
    homes = _homes(Cells(tuple(nodes), ((link, link), (link, link))), Mode((0,) * 20, ()))
    assert list(homes) == [(0,) * n + (1,) * (20 - n) for n in range(16, 3, -1)]


def many_devices(units: int, devices: int, batch: int = 8) -> CostTable:
    """A head, equal units and a tail over many devices of four kinds in nodes of four."""
    table = make_table(
        [1.0] * units,
        (1.0, 1.3, 2.0, 3.1),
        (devices,) * 4,
        batch=batch,
        cut_bytes=1.0,
        memory_bytes=8.0,
        saved_bytes=0.25,
    )
    costs = (table.costs[0], table.costs[1], replace(table.costs[2], weight_bytes=2.0))
    node_of = {d: f"{d[0]}{int(d[2:]) // 4}" for d in table.class_of}
    inside = {node: LinkCost(1e-6, 1e4) for node in node_of.values()}
    return replace(
        table,
        costs=costs,
        units=(0, *(1,) * (units - 2), 2),
        topology=Topology(node_of, inside, LinkCost(1e-5, 1e3)),
    )


def test_hundreds_of_devices_within_the_gap() -> None:
    table = many_devices(64, 64, batch=256)
    found = partition(table, gap=0.02, time_limit_s=60.0)
    assert found.gap <= 0.02
    assert not found.truncated_by
    assert "replicas of one kind" in found.family


def test_counting_says_when_nothing_fits() -> None:
    table = many_devices(64, 64, batch=8)
    small = tuple(replace(c, memory_bytes=0.5) for c in table.device_classes)
    with pytest.raises(InfeasibleError) as caught:
        partition(replace(table, device_classes=small))
    assert caught.value.limit == "memory"


def test_a_cut_search_over_many_devices_says_so() -> None:
    found = partition(many_devices(64, 64, batch=64), gap=0.0, time_limit_s=1e-9)
    assert found.truncated_by
    assert found.gap > 0.01


def test_repeats_are_found() -> None:
    table = many_devices(12, 2)
    assert find_repeats(table) == Repeats(1, 1, 10)
    pairs = replace(table, units=(0, *(1, 2) * 5, 0))
    assert find_repeats(pairs) == Repeats(1, 2, 5)
    assert find_repeats(replace(table, units=(0, 1, 2) * 4)) is not None


def test_blocks_with_unlike_traffic_are_no_repeats() -> None:
    table = many_devices(12, 2)
    loud = tuple(replace(e, bytes_per_sample=9.0) if e.source > 5 else e for e in table.edges)
    found = find_repeats(replace(table, edges=loud))
    assert found is not None
    assert found.number < 10


def test_widths_grow_by_at_most_a_half() -> None:
    found = widths(1000)
    assert found[:6] == (1, 2, 3, 4, 6, 8)
    assert all(b <= 1.5 * a for a, b in pairwise(found[1:]))


@st.composite
def mode_tables(draw: st.DrawFn) -> CostTable:
    """Block tables with modes of one class each: recomputation, ZeRO, groups of two."""
    table = draw(block_tables())
    found: dict[object, Mode] = {}
    for _ in range(draw(st.integers(1, 3))):
        members = (draw(st.integers(0, 1)),) * draw(st.integers(1, 2))
        costs = tuple(draw(mode_costs(len(members), len(table.sizes))) for _ in table.costs)
        recompute, zero = draw(st.booleans()), draw(st.sampled_from([0, 1, 2, 3]))
        link = LinkCost(1.0, 1.0) if len(members) == 2 else None
        # ZeRO with one replica is the same without: the counting programme relies on that.
        for level in {0, zero}:
            mode = Mode(members, costs, recompute=recompute, zero=level, link=link)
            if len(members) == 2 or recompute or level:
                found.setdefault(mode.key, mode)
    return replace(table, modes=tuple(found.values()))


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mode_tables(), st.sampled_from(["1f1b", "gpipe"]))
def test_counting_is_as_good_as_placing_in_all_modes(
    table: CostTable, schedule: SearchedSchedule
) -> None:
    count = best(counted(table, Repeats(1, 1, table.num_units - 2), schedule), schedule)
    place = best(placed(table, schedule), schedule)
    assert (count.best is None) == (place.best is None)
    if count.best is not None and place.best is not None:
        assert count.best.step_s == pytest.approx(place.best.step_s, rel=1e-6, abs=1e-9)
        assert count.bound_s <= place.best.step_s * (1 + 1e-6) + 1e-9


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mode_tables(), st.sampled_from([4, 7, 12]), st.floats(0.0, 1.0), st.sampled_from([1.0, 1.3]))
def test_tasks_together_cost_no_more_than_each(
    table: CostTable, batch: int, part: float, most: float
) -> None:
    """What bounds several microbatch counts and both schedules at once bounds them one by one."""
    table = replace(table, batch=batch, max_microbatches=batch)
    programs = Programs(counted(table, Repeats(1, 1, table.num_units - 2), "1f1b"), LIMITS)
    tasks = programs.tasks(programs.family.cells.counts, batch, ("1f1b", "gpipe"))
    for team in (tasks, [t for t in tasks if 2 <= t.setting.microbatches <= 5]):
        joint = programs._together(team)
        assert (joint is None) == (not programs.larger_need_more)
        if joint is None:
            continue
        for task in team:
            program, all_of = task.build(), joint.build()
            assert isinstance(program, CountingProgram)
            assert isinstance(all_of, CountingProgram)
            if len(program.extras_s) == 0:
                continue
            extra_s = part * float(program.extras_s[-1])
            limits = StageLimits(most * float(program.extras_s[-1]) - extra_s * (most > 1))
            own = program.relaxed(limits, Least(extra_s, 0.0, 1.0), np.inf)
            least = all_of.relaxed(limits, Least(extra_s, 0.0, 1.0), np.inf)
            if own is not None:
                assert least is not None
                assert least <= own * (1 + 1e-9) + 1e-9


@settings(max_examples=examples(15, 4), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mode_tables(), st.sampled_from([4, 7, 12]), st.floats(1.001, 2.0))
def test_a_search_with_tasks_together_finds_the_same(table: CostTable, batch: int, above: float) -> None:
    table = replace(table, batch=batch, max_microbatches=batch)
    programs = Programs(counted(table, Repeats(1, 1, table.num_units - 2), "1f1b"), LIMITS)
    tasks = programs.tasks(programs.family.cells.counts, batch, ("1f1b", "gpipe"))
    alone = [search_task(programs, t, 0.0).best for t in tasks]
    least_s = min((f.step_s for f in alone if f is not None), default=None)
    if least_s is None:
        return
    found = programs.search(
        tasks, cutoff_s=above * least_s + 1e-9, gap=0.0, deadline_s=np.inf, aim="proof"
    )
    assert found.best is not None
    assert found.best.step_s == pytest.approx(least_s, rel=1e-9)
    assert found.bound_s <= least_s * (1 + 1e-9)


@st.composite
def spread_tables(draw: st.DrawFn) -> CostTable:
    """Mode tables with devices in up to three nodes, kinds mixed, some nodes closer than others.

    Prices of groups hold for any link, or for the fast one alone.
    """
    table = draw(mode_tables())
    mixed = draw(st.booleans())
    # Either may hold devices of both classes, or nodes a and b are of the one and c of the other.
    homes = {d: "abc" if mixed else ("ab", "c")[table.class_of[d]] for d in table.class_of}
    node_of = {d: draw(st.sampled_from(home)) for d, home in homes.items()}
    fast, slow, slower = LinkCost(0.0, 1e4), LinkCost(0.05, 40.0), LinkCost(0.3, 5.0)
    inside = {n: draw(st.sampled_from([fast, slow])) for n in "abc"}
    between = draw(st.sampled_from([{}, {("a", "b"): slow}]))
    network = draw(st.sampled_from([slow, slower]))
    joined = draw(st.sampled_from([LinkCost(1.0, 1.0), LinkCost(0.01, 100.0)]))
    modes = tuple(m if m.link is None else replace(m, link=joined) for m in table.modes)
    return replace(table, topology=Topology(node_of, inside, network, between), modes=modes)


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spread_tables(), st.sampled_from(["1f1b", "gpipe"]))
def test_counting_bounds_what_stands_in_real_nodes(table: CostTable, schedule: SearchedSchedule) -> None:
    family = counted(table, Repeats(1, 1, table.num_units - 2), schedule)
    count, place = best(family, schedule), best(placed(table, schedule), schedule)
    if place.best is None:
        return
    assert count.best is not None
    assert count.bound_s <= place.best.step_s * (1 + 1e-6) + 1e-9
    named = name_devices(table, family.cells, (count.best,))
    if groups_hold(table, named):
        assert price(table, named, schedule).objective_s >= count.bound_s * (1 - 1e-9)


def search_task(programs: Programs, task: Task, gap: float) -> SearchResult:
    return programs.search([task], cutoff_s=float("inf"), gap=gap, deadline_s=float("inf"))


def test_whether_anything_fits_is_not_priced_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    family = counted(make_table([1.0] * 8, (1.0, 2.0), (3, 3)), Repeats(1, 1, 6), "1f1b")
    assert fits(family, np.inf)
    monkeypatch.setattr(CountingProgram, "solve", lambda *_: pytest.fail("columns were priced"))
    assert fits(family, time.monotonic()) is None


def test_rounding_excludes_nothing_that_meets_a_bound() -> None:
    """One device takes exactly what tasks say at least, but for the order of sums."""
    table = make_table([0.1] * 8, devices_per_class=(1,), batch=8, optimizer_s=0.1)
    programs = Programs(counted(table, Repeats(1, 1, 6), "1f1b"), LIMITS)
    for task in programs.tasks((1,), 8, ("1f1b",)):
        above = replace(task, post_s=float(np.nextafter(task.post_s, np.inf)))
        for found in (search_task(programs, t, 0.0) for t in (task, above)):
            assert found.best is not None, task.setting
            assert found.bound_s <= found.best.step_s


def test_a_late_first_plan_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the box in which it is found still counts, though it may miss the new target."""
    monkeypatch.setattr(counting_search._CountedSearch, "_start", lambda _: None)
    table = make_table([1.0] * 4, (1.0, 1.7), (3, 3), batch=64, memory_bytes=1e9)
    family = counted(table, Repeats(1, 1, 2), "1f1b")
    programs = Programs(family, LIMITS)
    tasks = programs.tasks(family.cells.counts, 64, ("1f1b",))
    (task,) = (t for t in tasks if t.setting.microbatches == 32)
    rough, exact = (search_task(programs, task, gap) for gap in (0.2, 0.0))
    assert exact.best is not None
    assert rough.bound_s <= exact.best.step_s * (1 + 1e-9)


def test_pipelines_side_by_side_are_searched_where_none_fits_alone() -> None:
    """One microbatch of 16 samples keeps 17 bytes in each unit's device; half as many keep 9."""
    table = make_table([1.0] * 16, (1.0,), (80,), batch=16, saved_bytes=1.0, memory_bytes=10.0)
    family = replace(counted(table, Repeats(0, 1, 16), "1f1b"), microbatches=1)
    began_s = time.monotonic()
    run = pipeline._Run(family, CountingLimits(0.5, "highs"), began_s, began_s + 60.0, 0.0)
    run.work()
    assert run.best is not None
    assert [p.samples for p in run.best.pipelines] in ([8] * 2, [4] * 4)
    assert "to run kinds side by side" in run.answer().family


def test_neighbours_stand_on_close_nodes() -> None:
    # Two racks of nodes, fast links inside a rack: a pipeline of whole nodes changes racks once.
    table = make_table([1.0] * 16, (1.0,), (16,), batch=32, cut_bytes=10.0, memory_bytes=1.5)
    node_of = {d: f"n{int(d[2:]) // 2}" for d in table.class_of}
    nodes = sorted(set(node_of.values()))
    # Rack of a node: every other one, so that the order of names does not help.
    pairs = [(a, b) for a in nodes for b in nodes if a < b and (int(a[1]) - int(b[1])) % 2 == 0]
    between = dict.fromkeys(pairs, LinkCost(1e-6, 1e4))
    inside = {n: LinkCost(1e-6, 1e5) for n in nodes}
    racked = replace(table, topology=Topology(node_of, inside, LinkCost(1e-4, 1e2), between))
    family = counted(racked, Repeats(0, 1, 16), "1f1b")
    found = best(family, "1f1b", CountingLimits(0.01, "highs"))
    assert found.best is not None
    (pipeline,) = name_devices(racked, family.cells, (found.best,))
    racks = [int(node_of[s.replicas[0].device][1]) % 2 for s in pipeline.stages]
    assert len(pipeline.stages) == 16
    assert sum(a != b for a, b in pairwise(racks)) == 1


@pytest.mark.parametrize(("memory_bytes", "worse"), [(8.0, 1.01), (3.5, 1.05)])
def test_stretches_of_kinds_find_good_pipelines(memory_bytes: float, worse: float) -> None:
    """Also where memory is so tight that stages stand in the order of what they hold."""
    table = many_devices(12, 8)
    kinds = tuple(replace(c, memory_bytes=memory_bytes) for c in table.device_classes)
    programs = Programs(counted(replace(table, device_classes=kinds), Repeats(1, 1, 10), "1f1b"), LIMITS)
    tasks = programs.tasks(programs.family.cells.counts, 8, ("1f1b",))
    (task,) = (t for t in tasks if t.setting.microbatches == 8)
    found = search_task(programs, task, 0.0).best
    program = task.build()
    assert found is not None
    assert isinstance(program, CountingProgram)
    limits, least = StageLimits(found.answer.extra_s), Least(found.answer.extra_s, 0.0, 1.0)
    assert program.relaxed(limits, least, np.inf) is not None
    lines = program.lines(limits, least)
    assert lines is not None
    stocks, _ = program.kinds(lines)
    line = grow_segments(lines, stocks, program.node_sizes, program.worth(), np.inf, np.inf)
    assert line is not None
    assert lines.holds(line)
    step_s = least.step_s + line.cost
    assert found.step_s * (1 - 1e-9) <= step_s + found.answer.post_s
    assert step_s <= worse * found.step_s


@pytest.mark.slow
def test_what_the_solver_gives_up_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beams nor integer programmes find a pipeline that others promise."""
    monkeypatch.setattr(CountingProgram, "solve", Mock(side_effect=NotSolvedError(0.0)))
    nothing = kinds.Harvest(0.0, None, np.zeros(0, dtype=np.intp))
    monkeypatch.setattr(judging, "judge_kinds", lambda *_: nothing)
    monkeypatch.setattr(judging, "best_among", lambda *_, **__: None)
    monkeypatch.setattr(judging, "solve_lines", lambda *_: Among(None, 0.0))
    monkeypatch.setattr(dive, "grow_segments", lambda *_: None)
    monkeypatch.setattr(dive, "grow_lines", lambda *_: Harvest(None, complete=False))
    monkeypatch.setattr(counting_search, "grow_lines", lambda *_: Harvest(None, complete=False))
    monkeypatch.setattr(counting_search._CountedSearch, "_best_met", lambda *_: None)
    found = partition(many_devices(12, 8), schedule="1f1b", microbatches=4, time_limit_s=60.0)
    assert found.gap > 0.01
    assert any("integer programmes" in reason for reason in found.truncated_by)


def in_nodes(size: int, inside: LinkCost, network: LinkCost, memory_bytes: float) -> CostTable:
    """Twelve equal units over eight devices in nodes of a size, with tensor groups of two."""
    table = make_table([1.0] * 12, devices_per_class=(8,), batch=8, memory_bytes=memory_bytes)
    node_of = {d: f"n{int(d[2:]) // size}" for d in table.class_of}
    topology = Topology(node_of, dict.fromkeys(node_of.values(), inside), network)
    return with_modes(replace(table, topology=topology), StageOptions(tensor_widths=(2,)))


@pytest.mark.parametrize(("size", "network_bytes_per_s"), [(1, 1e4), (2, 1e4), (3, 1e4), (2, 1e2)])
def test_groups_stand_in_several_nodes_where_links_allow_it(
    size: int, network_bytes_per_s: float
) -> None:
    """Devices alone hold eight of the units; in groups, of one node or of two, they hold them all."""
    table = in_nodes(size, LinkCost(1e-6, 1e4), LinkCost(1e-6, network_bytes_per_s), 1.5)
    family = counted(table, Repeats(0, 1, 12), "1f1b")
    found = best(family, "1f1b").best
    assert found is not None
    (pipeline,) = name_devices(table, family.cells, (found,))
    assert groups_hold(table, (pipeline,))
    assert len(pipeline.stages) == 4


def test_replicas_that_share_a_node_exchange_inside_it() -> None:
    """Where links inside nodes are slower than the network, wide stages are held up by them."""
    slow, fast = LinkCost(1e-3, 1e2), LinkCost(1e-6, 1e4)
    table = in_nodes(4, slow, fast, 1e9)
    options = [o for o in counting_options(table, class_cells(table), 8) if o.staff[0] == 0]
    rings = {o.num_devices: o.ring for o in options}
    assert rings[8] == pareto(pairs(table, list(table.class_of), list(table.class_of)))
    assert rings[2] == {slow}
    # Two replicas in two nodes would exchange faster, which is not looked at, and said.
    words = _counted_family(table, ("1f1b",), "auto", Repeats(0, 1, 12)).staffing
    assert "inside a node where they fit" in words
    level = in_nodes(4, fast, fast, 1e9)
    assert "inside a node" not in _counted_family(level, ("1f1b",), "auto", Repeats(0, 1, 12)).staffing


def test_a_mode_that_is_faster_on_average_need_not_end_first() -> None:
    """Five samples in four microbatches: of two replicas one has half a sample more than the mean."""
    table = make_table([1.0] * 8, devices_per_class=(2,), batch=5)
    rows = {"even": (2.0, 2.8), "steep": (1.0, 9.0)}
    costs = {
        name: tuple(
            replace(c, forward_s=(row,), backward_s=((0.0, 0.0),), name=name) for c in table.costs
        )
        for name, row in rows.items()
    }
    plain = replace(table, costs=costs["even"])
    steep = replace(replace(table, costs=costs["steep"]).every_mode[0], precision="bfloat16")
    both = replace(plain, modes=(steep,))
    cells, setting = class_cells(both), Setting(5, 4, "1f1b")
    options = counting_options(both, cells, 2)
    columns = price_columns(both, cells, options, setting, Repeats(0, 1, 8))
    wide = columns.pick(np.flatnonzero([options[i].width == 2 for i in columns.option]))
    kinds = {options[i].staff[0] for i in wide.option}
    assert kinds == {0, 1}
    fastest, first = int(wide.fill_s.argmin()), int(wide.extra_s.argmin())
    assert [options[wide.option[i]].staff[0] for i in (fastest, first)] == [1, 0]


def test_many_blocks_begin_with_several_at_once() -> None:
    table = many_devices(132, 8, batch=32)
    found = partition(replace(table, device_classes=roomy(table, 60.0)), gap=0.03, time_limit_s=60.0)
    assert found.gap <= 0.03
    assert not found.truncated_by


def roomy(table: CostTable, memory_bytes: float) -> tuple[DeviceClass, ...]:
    return tuple(replace(c, memory_bytes=memory_bytes) for c in table.device_classes)
