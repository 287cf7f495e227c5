"""Bounds on lines of columns and on patterns of kinds, and the beam, against every line there is."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphpar.partition.counting import lines as counting_lines
from graphpar.partition.counting.among import best_among, solve_lines
from graphpar.partition.counting.beam import grow_lines
from graphpar.partition.counting.columns import BODY, FIRST, LAST, WHOLE, Columns
from graphpar.partition.counting.kinds import Harvest, Rows, Stocks, judge_kinds
from graphpar.partition.counting.lines import Line, Lines
from graphpar.partition.counting.segments import Prices, grow_segments
from graphpar.partition.solver_matrix import Patience

BLOCKS = 4
FOREVER = float("inf")


@st.composite
def some_lines(draw: st.DrawFn) -> Lines:
    """Up to nine columns with three sums, the last of which (nodes) may fall along a line."""
    number = draw(st.integers(1, 9))

    def ints(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=number, max_size=number)))

    role = ints(WHOLE, LAST)
    blocks = np.where(role == WHOLE, BLOCKS, np.maximum(ints(0, BLOCKS), role == BODY))
    # Devices of two kinds, then nodes.
    kind, devices = ints(0, 1), ints(1, 6)
    sums = np.stack([devices * (kind == 0) / 10, devices * (kind == 1) / 10, ints(-3, 4) / 10])
    # A stage alone has both ends outside its node.
    sums[2, role == WHOLE] = -1.0
    odd = np.where(role == WHOLE, 0, ints(0, 1))
    nothing, width = np.zeros(number), ints(1, 3)
    columns = Columns(
        role=role.astype(np.intp),
        option=np.arange(number),
        blocks=blocks.astype(np.intp),
        arm=np.where(odd, 1, 3 * ints(0, 1)).astype(np.intp),
        fill_s=nothing,
        extra_s=nothing,
        post_s=nothing,
        most_below=(width + ints(0, 5)).astype(np.float64),
    )
    constant = np.array([0.0, 0.0, draw(st.integers(0, 10)) / 10])
    return Lines(
        columns=columns,
        cost=ints(0, 20).astype(np.float64),
        width=width.astype(np.intp),
        sums=sums,
        constant=constant,
        blocks=BLOCKS,
        devices=8,
        nodes=(np.zeros((0, number)), np.zeros(0)),
        odd=np.stack([odd * (kind == k) for k in (0, 1)]).astype(np.intp),
        take=np.stack([devices * (kind == k) for k in (0, 1)], axis=1).astype(np.intp),
    )


def every_line(lines: Lines) -> Iterator[Line]:
    """All lines from last to first stage, whether they keep anything or not."""
    columns = lines.columns
    by_role = {r: np.flatnonzero(columns.role == r).tolist() for r in (WHOLE, FIRST, BODY, LAST)}
    started: list[tuple[int, ...]] = [(c,) for c in by_role[LAST]]
    whole: list[tuple[int, ...]] = [(c,) for c in by_role[WHOLE]]
    while started:
        begun = started.pop()
        held = int(columns.blocks[list(begun)].sum())
        whole += [(*begun, c) for c in by_role[FIRST] if held + columns.blocks[c] == BLOCKS]
        started += [(*begun, c) for c in by_role[BODY] if held + columns.blocks[c] <= BLOCKS]
    for found in whole:
        used = list(found)
        yield Line(found, float(lines.cost[used].sum()), lines.sums[:, used].sum(axis=1) + lines.constant)


def bound_by_kinds(lines: Lines, spend: float) -> Harvest:
    """What the patterns of two kinds of ten devices each say."""
    devices = np.round(lines.sums[:2] * 10).astype(np.intp)
    stocks = Stocks((10, 10), devices.argmax(axis=0), devices.max(axis=0), lines.odd.sum(axis=0))
    nodes = Rows(lines.sums[2:], 1 - lines.constant[2:], np.zeros(1))
    return judge_kinds(lines, stocks, nodes, spend, 1e-3, FOREVER)


@settings(max_examples=60, deadline=None)
@given(some_lines(), st.sampled_from([4.0, 15.0, 60.0]), st.sampled_from([0.0, 3.0]))
def test_no_line_beats_the_bound_or_the_beam(lines: Lines, spend: float, start: float) -> None:
    held = [line for line in every_line(lines) if lines.holds(line)]
    best = min((line.cost for line in held), default=FOREVER)
    several = min((line.cost for line in held if len(line.columns) > 1), default=FOREVER)
    verdict = lines.judge(spend, 1e-3, np.full(3, start), [], FOREVER)
    assert verdict.cost <= best + 1e-6
    with pytest.MonkeyPatch.context() as patch:
        prices = lines.priced(np.full(4, 1.0), spend)
        compiled = lines.to_go(prices)
        patch.setattr(counting_lines, "COMPILED", False)
        np.testing.assert_array_equal(compiled, lines.to_go(prices))
    kinds = bound_by_kinds(lines, spend)
    assert kinds.cost <= best + 1e-6
    if kinds.line is not None:
        assert lines.holds(kinds.line)
        assert best - 1e-9 <= kinds.line.cost < spend
    devices = np.round(lines.sums[:2] * 10).astype(np.intp)
    stocks = Stocks((10, 10), devices.argmax(axis=0), devices.max(axis=0), lines.odd.sum(axis=0))
    stretch = grow_segments(lines, stocks, (8, 8), Prices(0.0, np.zeros(2)), spend, FOREVER)
    if stretch is not None:
        assert lines.holds(stretch)
        assert best - 1e-9 <= stretch.cost < spend
    among = best_among(lines, np.arange(len(lines.cost)), spend, 0.0, Patience(FOREVER))
    if among is not None:
        assert lines.holds(among)
        assert several - 1e-9 <= among.cost < spend
    if not lines.odd.any():
        # What must be even is all that its rows do not say.
        assert several >= spend - 1e-6 if among is None else among.cost == pytest.approx(several)
    assert solve_lines(lines, spend, 0.0, Patience(FOREVER)).cost <= several + 1e-6
    if verdict.excludes(spend):
        assert best > spend
        return
    harvest = grow_lines(lines, verdict.shares(spend), spend, 50, FOREVER)
    if harvest.line is not None:
        assert lines.holds(harvest.line)
        assert harvest.line.cost >= best - 1e-9
    if harvest.complete:
        assert best >= spend - 1e-9 or (harvest.line is not None and harvest.line.cost == best)
