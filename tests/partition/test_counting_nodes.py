"""Rows of nodes and the order of stages in them."""

from itertools import combinations_with_replacement, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpar.partition.counting_columns import BODY, FIRST, LAST
from graphpar.partition.counting_nodes import node_shares
from graphpar.partition.counting_order import Placed, line_up


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
