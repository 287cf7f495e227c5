"""Ways to send between layouts, told apart in arrays."""

from itertools import product

import pytest

from graphpar.cost_models.sending import Sending
from graphpar.ir.mesh import Layouts, fit
from graphpar.ir.shards import Layout, Split

PLAIN: tuple[Layout, ...] = ("whole", "copied", "partial", "disjoint", "first")


def along(size: int) -> list[Layout]:
    """Layouts that differ in all that a route could look at: units, how many, runs, samples."""
    even, uneven, few = (4,) * size, (5, *(3,) * (size - 1)), (1,) * size
    of_batch = Split(0, few, 1, 4, True)
    return [*PLAIN, Split(0, even), Split(0, uneven), Split(0, few, 4), of_batch]


@pytest.mark.parametrize("axes", [(3,), (2, 3)])
def test_pairs_of_a_kind_send_the_same(axes: tuple[int, ...]) -> None:
    every: list[Layouts] = [each for each in product(*map(along, axes)) if fit(each, axes)]
    made = [layouts for layouts in every if "first" not in layouts]
    for has_gradient, is_weight in ((True, False), (True, True), (False, False)):
        sending, alone = Sending(axes), Sending(axes)
        ways, table = sending.table(made, every, has_gradient, is_weight)
        assert len(set(ways)) == len(ways) > 3
        for row, mine in zip(table.tolist(), made, strict=True):
            for number, wanted in zip(row, every, strict=True):
                assert ways[number] == alone.way(mine, wanted, has_gradient, is_weight)
