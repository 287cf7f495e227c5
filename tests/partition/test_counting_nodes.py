"""Rows of nodes and the order of stages in them."""

from itertools import combinations_with_replacement, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphpar.partition.cells import Cells
from graphpar.partition.counting.columns import BODY, FIRST, LAST, WHOLE, Columns
from graphpar.partition.counting.nodes import node_shares, packed_rows
from graphpar.partition.counting.order import Placed, line_up
from graphpar.partition.counting.runs import BOTH, Limits, Stages, join_runs


@pytest.mark.parametrize("size", range(1, 17))
def test_what_fits_into_a_node_counts_as_no_more_than_it_has(size: int) -> None:
    for share in node_shares(size):
        for number in range(1, min(size, 6) + 1):
            for held in combinations_with_replacement(range(1, size + 1), number):
                if sum(held) <= size:
                    assert share[list(held)].sum() <= share[sum(held)] + 1e-12
        assert share[size] == 1.0


def test_three_of_eight_count_as_half_a_node() -> None:
    assert max(share[3] for share in node_shares(8)) == 0.5


def test_stages_that_fit_into_a_node_need_one() -> None:
    """Two nodes of four have room for two stages of three devices, not for one of four beside them."""
    cells = Cells((), (), node_sizes=(4,), rooms=((4, 4),), alone=(True,))

    def packed(*devices: int) -> bool:
        rows, least = packed_rows(cells, np.array(devices)[:, None])
        return bool((rows.sum(axis=1) >= least - 1e-9).all())

    assert packed(3, 3)
    assert packed(5, 2)
    assert packed(8)
    assert not packed(3, 3, 2)
    assert not packed(6, 3)


def keeps_memory(stages: list[Placed], order: list[int]) -> bool:
    behind = np.cumsum([stages[i].width for i in reversed(order)])
    return all(stages[i].due >= b for i, b in zip(reversed(order), behind.tolist(), strict=True))


@given(st.data())
def test_stages_are_lined_up_within_memory_and_nodes(data: st.DataObject) -> None:
    number = data.draw(st.integers(2, 7))
    roles = [FIRST, *(BODY,) * (number - 2), LAST]
    stages = [
        Placed(
            role=role,
            cell=data.draw(st.integers(0, 1)),
            devices=data.draw(st.integers(1, 4)),
            width=data.draw(st.integers(1, 3)),
            due=data.draw(st.integers(1, 14)),
            inside=data.draw(st.integers(0, 2 if role == BODY else 1)),
            room=4,
        )
        for role in roles
    ]
    rank = np.lexsort(([-s.due for s in stages], [s.role for s in stages]))
    order, joined = line_up(stages, rank)
    assert sorted(order) == list(range(number))
    assert (order[0], order[-1]) == (0, number - 1)
    inner = [list(p) for p in permutations(range(1, number - 1))]
    if any(keeps_memory(stages, [0, *p, number - 1]) for p in inner):
        assert keeps_memory(stages, order)
    held = 0
    for place, index in enumerate(order):
        held = stages[index].devices + (held if joined[place] else 0)
        assert held <= 4
        if joined[place]:
            assert stages[index].cell == stages[order[place - 1]].cell
            assert stages[index].inside > 0
            assert stages[order[place - 1]].inside > 0


@st.composite
def some_stages(draw: st.DrawFn) -> Stages:
    """Up to eight stages in nodes of four devices, with one boundary inside or two."""
    number = draw(st.integers(2, 8))

    def ints(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=number, max_size=number)), np.intp)

    arm = ints(0, BOTH)
    # The first stage of a pipeline has no boundary before it, the last none after it.
    role = np.where(
        (arm == 1) & (ints(0, 3) == 0), FIRST, np.where((arm == 2) & (ints(0, 3) == 0), LAST, BODY)
    )
    width, nothing = ints(1, 2), np.zeros(number)
    due = width + ints(0, 6)
    below = due.astype(np.float64)
    columns = Columns(role, ints(0, 9), ints(1, 2), arm, nothing, nothing, nothing, below)
    cost, rise = ints(0, 9).astype(np.float64), ints(0, 4).astype(np.float64)
    return Stages(columns, cost, width, due, ints(1, 3)[:, None], rise)


@settings(max_examples=60, deadline=None)
@given(some_stages(), st.sampled_from([12.0, 100.0]), st.sampled_from([5.0, 100.0]))
def test_every_run_in_a_node_is_stood_for(stages: Stages, spend: float, slack: float) -> None:
    """Whatever row of stages fits into a node: one that is no worse in any respect was found."""
    joined = join_runs(stages, (4,), (True,), Limits(5, spend, slack))
    by, columns = stages.columns, joined.columns
    rows = [members[members >= 0] for members in joined.members]
    assert [int(r[0]) for r in rows if len(r) == 1] == np.flatnonzero(by.arm == BOTH).tolist()
    found: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for place, used in enumerate(rows):
        if len(used) > 1:
            told, own = _of_run(stages, used)
            assert (columns.role[place], joined.take[place, 0], joined.width[place]) == told[:3]
            assert (columns.blocks[place], joined.cost[place], columns.most_below[place]) == (
                told[3],
                *own,
            )
            found.setdefault(told, []).append(own)
    ends, inner, heads = (np.flatnonzero(by.arm == arm).tolist() for arm in (2, 0, 1))
    for between in range(3):
        for row in product(ends, *[inner] * between, heads):
            used = np.array(row)
            key, (cost, due) = _of_run(stages, used)
            fits = key[1] <= 4 and due >= key[2] and (key[3] == 5 if key[0] == WHOLE else key[3] <= 5)
            if fits and cost < spend and stages.rise[used].sum() < slack:
                assert any(c <= cost and d >= due for c, d in found.get(key, ()))


def _of_run(stages: Stages, used: np.ndarray) -> tuple[tuple[int, ...], tuple[float, float]]:
    """Role, devices, replicas and blocks of stages in a row, the last one first; their cost and due."""
    by, width = stages.columns, stages.width[used]
    is_last, is_first = by.role[used[0]] == LAST, by.role[used[-1]] == FIRST
    role = WHOLE if is_last and is_first else LAST if is_last else FIRST if is_first else BODY
    # With so many replicas behind the run each of its stages keeps its memory, one of them just so.
    behind = int((stages.due[used] - np.cumsum(width)).min())
    key = role, int(stages.take[used].sum()), int(width.sum()), int(by.blocks[used].sum())
    return key, (float(stages.cost[used].sum()), float(behind + width.sum()))
