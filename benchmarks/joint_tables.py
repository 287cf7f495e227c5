"""Small clusters with every option, for `joint_exact.py`.

Clusters, chains and ways to share ops are those of `joint_loss.py`: four devices of two kinds in two
nodes. Stages may besides compute in a second format (faster on some kinds, slower on others, half of
what is kept), compute again what they do not keep, and divide state (ZeRO 1) or gradients as well (2).
Half of every backward makes gradients of weights, which may come later.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from graphpar.cost import CostTable, Mode, UnitCost
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions

sys.path.insert(0, str(Path(__file__).parent))

from joint_loss import Way, drawn, leanest, with_ways


def with_deferral(table: CostTable) -> CostTable:
    """Half of every backward makes gradients of weights, which may come later; little is kept for it."""

    def halved(cost: UnitCost) -> UnitCost:
        return replace(
            cost,
            weight_s=tuple(tuple(s / 2 for s in row) for row in cost.backward_s),
            deferred_bytes=tuple(b / 4 for b in cost.saved_bytes),
            split_s=tuple((0.0,) * len(row) for row in cost.backward_s),
        )

    return replace(table, costs=tuple(map(halved, table.costs)))


def in_second_format(mode: Mode, factor: float) -> Mode:
    """The mode with half the bytes and other seconds."""

    def times(row: tuple[float, ...], by: float) -> tuple[float, ...]:
        return tuple(v * by for v in row)

    costs = tuple(
        replace(
            c,
            forward_s=times(c.forward_s, factor),
            backward_s=times(c.backward_s, factor),
            weight_s=times(c.weight_s, factor),
            saved_bytes=tuple(times(row, 0.5) for row in c.saved_bytes),
            working_bytes=tuple(times(row, 0.5) for row in c.working_bytes),
            deferred_bytes=tuple(times(row, 0.5) for row in c.deferred_bytes),
        )
        for c in mode.costs
    )
    return replace(mode, costs=costs, precision="bfloat16")


def tables(seed: int, blocks: int) -> tuple[CostTable, CostTable]:
    """The planner's table and one with every way of a tensor group that no other one outdoes."""
    table, every = drawn(seed)
    draw = random.Random(seed + 1000)
    table = with_deferral(_shorter(table, blocks))
    factors = [draw.choice((0.6, 1.2)) for _ in table.device_classes]
    number = len(every) // 2
    ways = [every[:2], every[number : number + 2]]
    fastest = [[[own[0]] for own in row] for row in ways]
    lean = [[[leanest(own)] for own in row] for row in ways]
    small = tuple(m for chosen in (fastest, lean) for m in _groups(table, chosen))
    found = []
    for groups in (small, tuple(_groups(table, ways))):
        modes = {m.key: m for m in _told_apart(groups)}
        whole = replace(table, modes=tuple(modes.values()))
        lower = tuple(in_second_format(m, factors[m.members[0]]) for m in whole.every_mode)
        whole = replace(whole, modes=(*whole.modes, *lower))
        found.append(with_modes(whole, StageOptions(recompute=True, zero=(1, 2))))
    return found[0], found[1]


def _shorter(table: CostTable, blocks: int) -> CostTable:
    """The first blocks; equal ones share their costs."""
    return replace(
        table,
        units=tuple(i % 2 for i in range(blocks)),
        unit_names=table.unit_names[:blocks],
        costs=table.costs[:2],
        edges=table.edges[: blocks - 1],
    )


def _groups(table: CostTable, chosen: Sequence[Sequence[list[Way]]]) -> Iterator[Mode]:
    """Modes of groups, half of whose backward may come later as well."""
    for mode in with_ways(table, chosen).modes:
        costs = tuple(
            replace(
                c,
                weight_s=tuple(s / 2 for s in c.backward_s),
                deferred_bytes=tuple(tuple(b / 4 for b in row) for row in c.saved_bytes),
            )
            for c in mode.costs
        )
        yield replace(mode, costs=costs)


def _told_apart(modes: Sequence[Mode]) -> Iterator[Mode]:
    """Shares only tell modes apart here; they are equal to a hair."""
    for number, mode in enumerate(modes):
        hair = number * 1e-9
        yield replace(mode, shares=(0.5 - hair, 0.5 + hair))
