"""Stages that stand in a node one after another, as one column of a line.

A column of `columns` says of each of its boundaries whether it stays inside a node, not who is
on the other side. Rows of the counting programme see to it that such boundaries may match on average;
whether they do is a matter of the order of stages and of what fits into a node. So for lines all stages
that share a node one after another, a *run*, are one column with two boundaries to the outside:

    devices, replicas, blocks, cost   the sums over its stages
    due    the most replicas from the run on with which each of its stages keeps its memory,
           due(stage ahead + run) = min(due(run) + replicas of the stage, due of the stage)

A pipeline whose devices stand in nodes of one kind is a line of runs and single stages: its boundaries
inside nodes are those inside runs. Of runs with equal devices, replicas and blocks one that costs no more
and has no earlier due stands for another. Runs grow stage by stage from their last one, so this holds for
parts of runs as well. One that would lead to more than may be spent, or whose stages' reduced costs come
to more than that together, is left out.
"""

from dataclasses import dataclass, replace

import numpy as np

from graphpar.partition.counting.columns import FIRST, LAST, WHOLE, Columns, undominated
from graphpar.partition.unit_arrays import FloatArray, IntArray

_MOST_RUNS, _MOST_PAIRS = 1000, 60_000
"""So many runs are extended at once at most, by stages to so many pairs: some hundredths of a second."""

_FEW_RUNS = 400
"""Where they are more and not all are asked for, so many with the least reduced costs are extended."""

_BEFORE, _AFTER, BOTH = 1, 2, 3
"""Arms of columns with a boundary outside before, after, and on either side."""


@dataclass(frozen=True, eq=False)
class Stages:
    """Single stages: columns with cost, replicas, due, what they take of each kind [column, kind].

    `rise` is what a pipeline that uses the column costs more than `spend` less `slack`, at least.
    """

    columns: Columns
    cost: FloatArray
    width: IntArray
    due: IntArray
    take: IntArray
    rise: FloatArray


@dataclass(frozen=True, eq=False)
class Limits:
    """Blocks of a pipeline, what may be spent, and how much more than the least that is."""

    blocks: int
    spend: float
    slack: float


@dataclass(frozen=True, eq=False)
class Runs:
    """Stages in a row in a node; `members` are [run, place], the last stage first, -1 for none."""

    devices: IntArray
    width: IntArray
    blocks: IntArray
    due: IntArray
    cost: FloatArray
    rise: FloatArray
    role: IntArray
    members: IntArray

    def pick(self, index: IntArray) -> "Runs":
        """Only some runs."""
        return Runs(
            self.devices[index],
            self.width[index],
            self.blocks[index],
            self.due[index],
            self.cost[index],
            self.rise[index],
            self.role[index],
            self.members[index],
        )


def find_runs_of(
    stages: Stages, kind: int, size: int, limits: Limits, *, exact: bool = True
) -> list[Runs] | None:
    """The runs of a kind in a node of a size, by number of stages.

    Where they are too many None, or if they need not be `exact` only some of them.
    """
    mine, arm = stages.take[:, kind] > 0, stages.columns.arm
    ends = np.flatnonzero(mine & (arm == _AFTER))
    inner, heads = np.flatnonzero(mine & (arm == 0)), np.flatnonzero(mine & (arm == _BEFORE))
    begun, found = _begin(stages, kind, ends), []
    while len(begun.devices):
        pairs = max(_number(stages, kind, size, begun, index) for index in (heads, inner))
        if len(begun.devices) > _MOST_RUNS or pairs > _MOST_PAIRS:
            if exact:
                return None
            begun = begun.pick(np.argsort(begun.rise, kind="stable")[:_FEW_RUNS])
        found.append(_grow(stages, kind, size, limits, begun, heads))
        begun = _grow(stages, kind, size, limits, begun, inner)
    return [runs for runs in found if len(runs.devices)]


def _number(stages: Stages, kind: int, size: int, begun: Runs, ahead: IntArray) -> int:
    """How many pairs of a run and a stage there are that fit into a node."""
    runs = np.bincount(begun.devices, minlength=size + 1).cumsum()
    taken = np.bincount(stages.take[ahead, kind], minlength=size + 1)[: size + 1]
    return int(taken @ runs[::-1])


def _begin(stages: Stages, kind: int, index: IntArray) -> Runs:
    return Runs(
        stages.take[index, kind],
        stages.width[index],
        stages.columns.blocks[index],
        stages.due[index],
        stages.cost[index],
        stages.rise[index],
        stages.columns.role[index],
        index[:, None],
    )


def _grow(stages: Stages, kind: int, size: int, limits: Limits, begun: Runs, ahead: IntArray) -> Runs:
    """Runs with one stage more ahead of them."""
    one = _begin(stages, kind, ahead)
    pairs: list[IntArray] = []
    for devices in np.unique(one.devices).tolist():
        behind, own = begun.devices <= size - devices, one.devices == devices
        part, same = begun.pick(np.flatnonzero(behind)), one.pick(np.flatnonzero(own))
        fits = part.blocks[:, None] + same.blocks[None] <= limits.blocks
        fits &= part.cost[:, None] + same.cost[None] < limits.spend
        fits &= part.rise[:, None] + same.rise[None] < limits.slack
        left, right = np.nonzero(fits)
        pairs.append(np.stack([np.flatnonzero(behind)[left], np.flatnonzero(own)[right]]))
    run, stage = np.concatenate([np.zeros((2, 0), dtype=np.intp), *pairs], axis=1)
    due = np.minimum(begun.due[run] + one.width[stage], one.due[stage])
    width = begun.width[run] + one.width[stage]
    holds = due >= width
    run, stage = run[holds], stage[holds]
    end, front = begun.role[run], one.role[stage]
    # A run with both ends of the pipeline is all of it.
    whole = (end == LAST) & (front == FIRST)
    role = np.where(whole, WHOLE, np.where(end == LAST, LAST, front))
    return _best(
        Runs(
            begun.devices[run] + one.devices[stage],
            width[holds],
            begun.blocks[run] + one.blocks[stage],
            due[holds],
            begun.cost[run] + one.cost[stage],
            begun.rise[run] + one.rise[stage],
            role,
            np.concatenate([begun.members[run], one.members[stage]], axis=1),
        ),
        size,
        limits,
    )


def _best(runs: Runs, size: int, limits: Limits) -> Runs:
    """Runs but those that another one stands for; whole pipelines need all blocks."""
    key = ((runs.role * (size + 1) + runs.devices) * (size + 1) + runs.width) * (limits.blocks + 1)
    kept = undominated(key + runs.blocks, runs.cost, runs.due)
    kept = kept[(runs.role[kept] != WHOLE) | (runs.blocks[kept] == limits.blocks)]
    return runs.pick(kept)


@dataclass(frozen=True, eq=False)
class Joined:
    """Columns of lines: single stages and runs; `members` are the stages of each, the last one first."""

    columns: Columns
    cost: FloatArray
    rise: FloatArray
    width: IntArray
    take: IntArray
    members: IntArray


def join_runs(
    stages: Stages,
    sizes: tuple[int, ...],
    alone: tuple[bool, ...],
    limits: Limits,
    *,
    exact: bool = True,
) -> Joined:
    """Single stages, and in nodes that hold one kind alone runs in place of stages that share one.

    Where runs of a kind are too many its stages stay single, or unless `exact` some runs are left out.
    """
    arm = stages.columns.arm
    single = np.ones(len(arm), dtype=np.bool_)
    found: list[tuple[int, Runs]] = []
    for kind, size in enumerate(sizes):
        shares = (stages.take[:, kind] > 0) & (arm != BOTH)
        wanted = alone[kind] and bool(shares.any())
        runs = find_runs_of(stages, kind, size, limits, exact=exact) if wanted else None
        if runs is not None:
            single &= ~shares
            found += [(kind, r) for r in runs]
    index = np.flatnonzero(single)
    most = max((r.members.shape[1] for _, r in found), default=1)
    parts = [_of_stages(stages, index, most)]
    parts += [_of_runs(stages, kind, runs, most) for kind, runs in found]
    names = list(Columns.__dataclass_fields__)
    return Joined(
        Columns(*(np.concatenate([getattr(p.columns, n) for p in parts]) for n in names)),
        np.concatenate([p.cost for p in parts]),
        np.concatenate([p.rise for p in parts]),
        np.concatenate([p.width for p in parts]),
        np.concatenate([p.take for p in parts]),
        np.concatenate([p.members for p in parts]),
    )


def _padded(members: IntArray, most: int) -> IntArray:
    found = np.full((len(members), most), -1, dtype=np.intp)
    found[:, : members.shape[1]] = members
    return found


def _of_stages(stages: Stages, index: IntArray, most: int) -> Joined:
    return Joined(
        stages.columns.pick(index),
        stages.cost[index],
        stages.rise[index],
        stages.width[index],
        stages.take[index],
        _padded(index[:, None], most),
    )


def _of_runs(stages: Stages, kind: int, runs: Runs, most: int) -> Joined:
    last = runs.members[:, 0]
    columns = replace(
        stages.columns.pick(last),
        role=runs.role,
        blocks=runs.blocks,
        arm=np.full(len(last), BOTH, dtype=np.intp),
        fill_s=stages.columns.fill_s[runs.members].sum(axis=1),
        extra_s=stages.columns.extra_s[runs.members].max(axis=1),
        post_s=stages.columns.post_s[runs.members].max(axis=1),
        most_below=runs.due.astype(np.float64),
    )
    take = np.zeros((len(last), stages.take.shape[1]), dtype=np.intp)
    take[:, kind] = runs.devices
    return Joined(columns, runs.cost, runs.rise, runs.width, take, _padded(runs.members, most))


def sums_of(rows: FloatArray, members: IntArray) -> FloatArray:
    """[row, column]: sums over the members of columns of [row, stage].

    >>> sums_of(np.array([[1.0, 2.0, 4.0]]), np.array([[0, -1], [1, 2]])).tolist()
    [[1.0, 6.0]]
    """
    # The stage after the last one stands for none.
    filled = np.concatenate([rows, np.zeros((len(rows), 1))], axis=1)
    found = filled[:, members[:, 0]]
    for place in range(1, members.shape[1]):
        found += filled[:, members[:, place]]
    return found
