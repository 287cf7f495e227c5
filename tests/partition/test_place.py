"""Placement against brute force: the checker's rules, the throughput optimum, latency with a bound."""

import math
from dataclasses import replace

import networkx as nx
import pytest
from amounts import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_problems import best_placement, placement_problems

from graphpar.partition.answers import Progress
from graphpar.partition.clock import never
from graphpar.partition.placement import solve as place
from graphpar.partition.placement.check import Objective, check_placement
from graphpar.partition.placement.forks import forks
from graphpar.partition.placement.graph import contract, join_dominated
from graphpar.partition.placement.ideals import all_ideals, best_split, window_ideals
from graphpar.partition.placement.items import items_of
from graphpar.partition.placement.latency_bound import walk_ideals
from graphpar.partition.placement.paths import path_bound
from graphpar.partition.placement.reach import Reach
from graphpar.partition.placement.solve import solve_placement
from graphpar.partition.placement.split import best_split_of_all, ideals_of
from graphpar.partition.placement.units import units_of
from graphpar.partition.problems import NodeId, Operator, PlacementProblem, Transfer


def chain(work: list[float], *, accelerators: int = 2, memory: float = 100.0) -> PlacementProblem:
    """A chain of operators of size one that move one unit each, ten times slower on the CPUs."""
    operators = tuple(Operator(v, 10 * w, w, True, 1.0, f"own {v}", False) for v, w in enumerate(work))
    transfers = tuple(Transfer(v, v + 1, 1.0) for v in range(len(work) - 1))
    return PlacementProblem("chain", operators, transfers, accelerators, 1, memory)


@settings(max_examples=100, deadline=None)
@given(placement_problems())
def test_small_throughput_problems_are_solved(problem: PlacementProblem) -> None:
    best = best_placement(problem, "throughput", keep=lambda answer: in_order(problem, answer))
    solved = solve_placement(problem, time_limit_s=300)
    assert solved.status == ("infeasible" if best is None else "optimal")
    if best is not None:
        assert solved.objective == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(placement_problems())
def test_throughput_answers_lie_between_bound_and_optimum(problem: PlacementProblem) -> None:
    best = best_placement(problem, "throughput", keep=lambda answer: in_order(problem, answer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "_MOST_FREELY", -1)  # free blocks in windows, as in large problems
        solved = solve_placement(problem, time_limit_s=300)
    if solved.status == "infeasible":
        assert best is None
    if solved.objective is not None:
        assert best is not None
        assert solved.bound is not None
        assert solved.bound <= best + 1e-9 <= solved.objective + 2e-9
    if solved.status == "optimal":
        assert solved.objective == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(placement_problems(), st.sampled_from([math.inf, 12.0]))
def test_both_ways_over_all_ideals_agree(problem: PlacementProblem, cutoff: float) -> None:
    blocks = contract(problem, forward_only=True)
    every = ideals_of(blocks, 1_000, never)
    ideals = all_ideals(blocks, 1_000)
    assert every is not None
    assert ideals is not None
    assert len(every.found) == len(ideals.member)
    by_arrays = best_split(
        blocks,
        ideals,
        num_accelerators=problem.num_accelerators,
        num_cpu_pools=min(1, problem.num_cpus),
        memory_limit=problem.memory_limit,
        cutoff=cutoff,
    )
    split, finished = best_split_of_all(
        blocks,
        every,
        num_accelerators=problem.num_accelerators,
        num_cpu_pools=min(1, problem.num_cpus),
        memory_limit=problem.memory_limit,
        cutoff=cutoff,
        should_stop=never,
        threads=2,
    )
    assert finished
    assert (split is None) == (by_arrays is None)
    if split and by_arrays:
        assert split.load == pytest.approx(by_arrays.load)
        assert sorted(b for _, part in split.parts for b in part) == list(range(blocks.num_blocks))


def in_order(problem: PlacementProblem, answer: dict[NodeId, int]) -> bool:
    """Whether the devices can be put in an order in which no forward transfer goes back."""
    order: nx.DiGraph[int] = nx.DiGraph()
    for t in problem.transfers:
        ends = problem.operators[t.source], problem.operators[t.target]
        devices = answer[ends[0].node_id], answer[ends[1].node_id]
        if devices[0] != devices[1] and not ends[0].backward and not ends[1].backward:
            order.add_edge(*devices)
    return nx.is_directed_acyclic_graph(order)


@settings(max_examples=examples(100), deadline=None)
@given(placement_problems())
def test_latency_answers_and_bounds_are_true(problem: PlacementProblem) -> None:
    best = best_placement(problem, "latency")
    units = units_of(problem)
    assert path_bound(Reach(units)) <= (math.inf if best is None else best + 1e-6)
    if best is not None:
        walk = walk_ideals(Reach(units), best * 2 + 1, 60.0)
        assert walk.bound <= best + 1e-6
        assert walk.devices is None or units.latency(walk.devices) >= best - 1e-6
    solved = solve_placement(problem, objective="latency", time_limit_s=20)
    if solved.status == "infeasible":
        assert best is None
    if solved.bound is not None and best is not None:
        assert solved.bound <= best + 1e-6
    if solved.objective is not None:
        assert best is not None
        assert solved.objective >= best - 1e-9
    if solved.status == "optimal":
        assert solved.objective == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(placement_problems(), st.data())
def test_latency_of_classes_is_the_checkers(problem: PlacementProblem, data: st.DataObject) -> None:
    units = units_of(problem)
    device = st.integers(0, problem.num_accelerators)
    devices = [data.draw(device) for _ in range(units.num_classes)]
    verdict = check_placement(problem, units.placement(problem, devices), "latency")
    assert units.latency(devices) == pytest.approx(
        verdict.value if verdict.feasible and verdict.value is not None else math.inf
    )


def test_classes_that_wait_for_each_other_may_be_apart() -> None:
    """The outer layer runs on the CPUs, before and after the inner one on an accelerator."""
    operators = (
        Operator("f1", 1.0, 100.0, True, 1.0, "outer", False),
        Operator("f2", 100.0, 1.0, True, 1.0, "inner", False),
        Operator("b2", 100.0, 1.0, True, 1.0, "inner", True),
        Operator("b1", 1.0, 100.0, True, 1.0, "outer", True),
    )
    transfers = tuple(Transfer(v, v + 1, 0.125) for v in range(3))
    solved = solve_placement(
        PlacementProblem("u", operators, transfers, 2, 1, 100.0), objective="latency"
    )
    assert solved.status == "optimal"
    assert solved.objective == pytest.approx(4.25)


@pytest.mark.parametrize(
    ("work", "accelerators", "best"),
    [
        ([4.0, 4.0], 2, 5.0),
        ([4.0, 4.0, 4.0, 4.0], 2, 9.0),
        ([9.0, 0.1, 0.1], 2, 9.2),
        ([2.0, 2.0], 1, 4.0),
    ],
)
def test_chains_by_hand(work: list[float], accelerators: int, best: float) -> None:
    solved = solve_placement(chain(work, accelerators=accelerators))
    assert solved.status == "optimal"
    assert solved.objective == pytest.approx(best)


def test_memory_forces_more_devices() -> None:
    solved = solve_placement(chain([1.0] * 6, accelerators=3, memory=2.0), objective="latency")
    assert solved.objective == pytest.approx(6.0 + 4.0)
    assert solved.status == "optimal"


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_memory_binds_in_any_unit(unit: float) -> None:
    # Two classes that wait for each other share no accelerator, and one holds no more than either.
    operators = tuple(Operator(v, 1.0, 1.0, True, unit, "ab"[v % 3 > 0], False) for v in range(4))
    waits = (Transfer(0, 2, 0.0), Transfer(1, 3, 0.0))
    problem = PlacementProblem("circle", operators, waits, 2, 0, 2 * unit)
    assert solve_placement(problem, objective="latency").status == "infeasible"


def test_no_devices_no_answer() -> None:
    problem = chain([1.0, 1.0], accelerators=0)
    for objective in ("throughput", "latency"):
        solved = solve_placement(replace(problem, num_cpus=0), objective=objective)
        assert (solved.status, solved.answer) == ("infeasible", None)
        assert "no devices" in solved.note
    assert solve_placement(problem).objective == pytest.approx(20.0)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize(
    ("operators", "limit", "words"),
    [
        ([(True, 1.0, "a"), (False, 1.0, "b")], 9.0, "node 1 runs on CPUs only"),
        (
            [(True, 1.0, "a"), (True, 2.0, "b"), (True, 2.0, "b")],
            3.0,
            "node 1 and its colour class hold 4,",
        ),
        ([(True, 3.0, "a"), (True, 2.0, "b"), (True, 2.0, "c")], 3.0, "hold 7, above the 6 of 2"),
        ([(True, 2.0, "a"), (True, 2.0, "b"), (True, 2.0, "c")], 3.0, "all at once"),
    ],
)
def test_why_there_is_no_placement_is_said(
    operators: list[tuple[bool, float, str]], limit: float, words: str, objective: Objective
) -> None:
    made = tuple(Operator(v, 1.0, 1.0, *rest, backward=False) for v, rest in enumerate(operators))
    solved = solve_placement(PlacementProblem("none", made, (), 2, 0, limit), objective=objective)
    assert solved.status == "infeasible"
    assert words in solved.note


@pytest.mark.parametrize(
    ("accelerators", "last", "limit", "words"),
    [
        (0, True, 9.0, "there is none"),
        (2, False, 9.0, "node 2 cannot be there"),
        (2, True, 2.0, "they hold 3, above the memory limit 2"),
        (2, True, 3.0, ""),
    ],
)
def test_a_circle_that_no_accelerator_can_run_has_no_latency(
    accelerators: int, last: bool, limit: float, words: str
) -> None:
    operators = tuple(Operator(v, 1.0, 1.0, last or v < 2, 1.0, f"own {v}", v > 0) for v in range(3))
    circle = tuple(Transfer(v, (v + 1) % 3, 0.0) for v in range(3))
    problem = PlacementProblem("circle", operators, circle, accelerators, 1, limit)
    solved = solve_placement(problem, objective="latency")
    assert solved.status == ("infeasible" if words else "optimal")
    assert words in solved.note
    assert not words or "circle (" in solved.note
    assert solve_placement(problem).status == "optimal"


def test_a_cycle_becomes_one_block() -> None:
    operators = tuple(Operator(v, 2.0, 1.0, True, 0.0, f"own {v}", False) for v in range(3))
    circle = (Transfer(0, 1, 0.0), Transfer(1, 0, 0.0), Transfer(1, 2, 0.0))
    problem = PlacementProblem("circle", operators, circle, 2, 1, 1.0)
    assert contract(problem, forward_only=True).num_blocks == 2
    solved = solve_placement(problem)
    assert solved.objective == pytest.approx(2.0)
    assert solved.answer is not None
    assert solved.answer[0] == solved.answer[1]


def test_ideals_of_a_diamond() -> None:
    operators = tuple(Operator(v, 1.0, 1.0, True, 0.0, f"own {v}", False) for v in range(4))
    edges = ((0, 1), (0, 2), (1, 3), (2, 3))
    problem = PlacementProblem(
        "diamond", operators, tuple(Transfer(a, b, 1.0) for a, b in edges), 2, 1, 1.0
    )
    blocks = contract(problem, forward_only=True)
    ideals = all_ideals(blocks, 100)
    assert ideals is not None
    assert len(ideals.member) == 6
    assert all_ideals(blocks, 3) is None


def test_a_free_block_that_only_pays_elsewhere_joins_its_neighbour() -> None:
    """A backward operator that exchanges more with one other than its work is worth stays with it."""
    operators = (
        *(Operator(v, 50.0, 5.0, True, 1.0, f"own {v}", False) for v in range(4)),
        Operator(4, 10.0, 1.0, True, 1.0, "own 4", True),
    )
    transfers = (*(Transfer(v, v + 1, 0.5) for v in range(3)), Transfer(3, 4, 0.5), Transfer(4, 3, 9.0))
    problem = PlacementProblem("tail", operators, transfers, 2, 1, 100.0)
    kept = contract(problem, forward_only=True, free="keep")
    assert len(kept.free) == 1
    joined = join_dominated(kept, charged=True)
    assert joined.free == ()
    assert sorted(map(sorted, joined.operators)) == [[0], [1], [2], [3, 4]]
    assert solve_placement(problem).objective == pytest.approx(11.5)


def test_the_checker_names_what_is_wrong() -> None:
    problem = chain([1.0, 1.0, 1.0], memory=1.0)
    assert "device 3" in check_placement(problem, {0: 3, 1: 0, 2: 0}, "throughput").errors[0]
    assert "node 1" in check_placement(problem, {0: 0}, "throughput").errors[0]
    split = check_placement(problem, {0: 1, 1: 0, 2: 1}, "throughput")
    assert any("contiguous" in error for error in split.errors)
    assert any("holds" in error for error in split.errors)


@settings(max_examples=20, deadline=None)
@given(placement_problems())
def test_answers_name_every_operator(problem: PlacementProblem) -> None:
    solved = solve_placement(problem, time_limit_s=20)
    assume(solved.answer is not None)
    assert solved.answer is not None
    assert set(solved.answer) == {op.node_id for op in problem.operators}


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_no_limit_is_too_short_for_an_answer(objective: Objective) -> None:
    solved = solve_placement(chain([1.0] * 40), objective=objective, time_limit_s=1e-6)
    assert solved.answer is not None
    assert solved.bound is not None


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_ctrl_c_ends_the_search_with_the_best_answer_if_asked_to(objective: Objective) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    problem = chain([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    kept = solve_placement(problem, objective=objective, progress=interrupt, keep_on_interrupt=True)
    assert (kept.status, kept.truncated_by) == ("feasible", "interrupt")
    assert kept.answer is not None
    assert check_placement(problem, kept.answer, objective).value == kept.objective
    with pytest.raises(KeyboardInterrupt):
        solve_placement(problem, objective=objective, progress=interrupt)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="time_limit_s"):
        solve_placement(chain([1.0]), time_limit_s=-1.0)
    with pytest.raises(ValueError, match="objective"):
        solve_placement(chain([1.0]), objective="speed")  # type: ignore[arg-type]


def test_weights_join_what_they_multiply() -> None:
    """Of a product, its weight, its bias and a look at its result one item is left."""
    names = ("weight", "bias", "input", "product", "sum", "seen")
    times = (0.0, 0.0, 1.0, 5.0, 1.0, 0.0)
    operators = tuple(
        Operator(name, time, time / 4, True, 1.0, "in" if name == "input" else "layer", False)
        for name, time in zip(names, times, strict=True)
    )
    edges = ((0, 3), (2, 3), (1, 4), (3, 4), (4, 5))
    transfers = tuple(Transfer(a, b, 1.0) for a, b in edges)
    items = items_of(PlacementProblem("layer", operators, transfers, 1, 1, 100.0))
    assert [item.operators for item in items] == [(2,), (0, 1, 3, 4, 5)]
    assert [item.cpu_latency for item in items] == [1.0, 6.0]


def test_a_trained_chain_is_proven_optimal() -> None:
    """Layers hold forward and backward operators, so an accelerator takes the last ones of a chain."""
    count = 10
    operators = tuple(
        Operator(v, 10.0 + v % 3, 1.0 + v % 4, True, 1.0, str(min(v, 2 * count - 1 - v)), v >= count)
        for v in range(2 * count)
    )
    transfers = tuple(Transfer(v, v + 1, 0.5) for v in range(2 * count - 1))
    problem = PlacementProblem("trained", operators, transfers, 3, 1, 2.0 * 7)
    solved = solve_placement(problem, objective="latency", time_limit_s=60)
    on_cpu = sum(operators[v].cpu_latency for v in (0, 1, 2, 17, 18, 19))
    expected = on_cpu + sum(operators[v].accelerator_latency for v in range(3, 17)) + 2 * 0.5
    assert solved.status == "optimal"
    assert solved.objective == pytest.approx(expected)


@pytest.mark.parametrize("huge", [1e9, 1e18])
def test_amounts_that_play_no_part_change_no_bound(huge: float) -> None:
    """Operators that are no use on the CPUs, transfers that are no use at all, beside ordinary ones."""
    cpu, work = [3.6, 8.9, 3.7, 2.4, 8.8, 0.9, huge, 8.3], [2.9, 9.7, 5.8, 0.5, 6.2, 0.3, 5.5, 0.0]
    colours = "c2 c2 c3 c0 c3 c0 c1 c1".split()
    operators = tuple(
        Operator(v, cpu[v], work[v], True, 1.0, colour, False) for v, colour in enumerate(colours)
    )
    sent = {2: 300.3, 3: 4.5, 4: huge, 6: 5.8}
    ends = [(2, 1), (2, 7), (3, 2), (3, 4), (4, 0), (4, 5), (6, 1), (6, 4)]
    transfers = tuple(Transfer(a, b, sent[a]) for a, b in ends)
    problem = PlacementProblem("unlike", operators, transfers, 1, 1, 1e9)
    best = best_placement(problem, "latency")
    assert best is not None
    reach = Reach(units_of(problem))
    for known in (best * 1.001, best * 2, best * 1e6):
        assert walk_ideals(reach, known, 60.0).bound <= best * (1 + 1e-12)
    solved = solve_placement(problem, objective="latency")
    assert solved.status == "optimal"
    assert solved.objective == pytest.approx(best)


def test_cpus_may_leave_every_free_block_to_an_accelerator() -> None:
    """With the backward operator, too, the CPUs would take more than the known answer."""
    backward = Operator(2, 8.0, 5.0, True, 1.0, "free", True)
    forward = [Operator(v, 4.0, 50.0, True, 1.0, f"own {v}", False) for v in range(2)]
    transfers = (Transfer(0, 1, 1.0), Transfer(0, 2, 1.0), Transfer(1, 2, 1.0))
    problem = PlacementProblem("free", (*forward, backward), transfers, 1, 1, 100.0)
    blocks = contract(problem, forward_only=True, free="keep")
    ideals = window_ideals(blocks, 1_000)
    assert ideals is not None
    relaxed = best_split(
        blocks,
        ideals,
        num_accelerators=1,
        num_cpu_pools=1,
        memory_limit=100.0,
        cutoff=9.0,
        relaxed=True,
    )
    assert best_placement(problem, "throughput") == 8.0
    assert relaxed is not None
    assert relaxed.load <= 8.0


def test_what_nobody_can_run_on_the_cpus_drowns_no_load() -> None:
    """Sums that hold the one huge time tell nothing of the others."""
    times = [(5.8e18, 3.6), (83.9, 4.9), (0.0, 6.0), (80.2, 7.5)]
    operators = tuple(Operator(v, *pair, v != 2, 0.1, f"own {v}", v != 1) for v, pair in enumerate(times))
    sent = {1: 7.2, 2: 2.8, 3: 2.4}
    transfers = tuple(Transfer(a, b, sent[a]) for a, b in [(1, 2), (1, 3), (2, 0), (3, 0)])
    problem = PlacementProblem("unlike", operators, transfers, 3, 1, 4.0)
    best = best_placement(problem, "throughput", keep=lambda answer: in_order(problem, answer))
    solved = solve_placement(problem)
    assert solved.status == "optimal"
    assert solved.objective == pytest.approx(best)


def test_paths_side_by_side_go_to_accelerators_of_their_own() -> None:
    """Two paths of 10 s between two operators of 1 s; each way out and in takes 0.1 s."""
    work = [1.0, 5.0, 5.0, 5.0, 5.0, 1.0]
    operators = tuple(Operator(v, 1e3, t, True, 1.0, f"own {v}", False) for v, t in enumerate(work))
    edges = [(0, 1), (1, 2), (0, 3), (3, 4), (2, 5), (4, 5)]
    problem = PlacementProblem("fork", operators, tuple(Transfer(*e, 0.1) for e in edges), 4, 1, 9.0)
    units = units_of(problem)
    found = list(forks(units, [1] * units.num_classes))
    best = min(found, key=units.latency)
    assert units.latency([1] * units.num_classes) == 22.0
    assert units.latency(best) == pytest.approx(1.0 + 0.1 + 10.2 + 0.2 + 1.0)
    verdict = check_placement(problem, units.placement(problem, best), "latency")
    assert verdict.feasible and verdict.value == pytest.approx(units.latency(best))
    assert list(forks(units, [1, 2, 2, 2, 2, 1])) == [], "too few are unused"
