"""Tensor groups in a schedule: their members do the same things at the same time.

A schedule is made, proven and simulated for *leaders*, the first member of each replica, as if every
replica were one device. `spread` then gives each member a rank of its own with its leader's row, and
`collapsed` is the way back.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from graphpar.errors import VerifyError
from graphpar.schedule.actions import Schedule


def spread(schedule: Schedule, widths: Sequence[int]) -> Schedule:
    """A schedule of replicas as one of ranks.

    Args:
        schedule: One rank for each replica.
        widths: Members of each replica.
    """
    if all(width == 1 for width in widths):
        return schedule
    leader = [0, *accumulate(widths)]
    own = [replica for replica, width in enumerate(widths) for _ in range(width)]
    return replace(
        schedule,
        stages_of=tuple(schedule.stages_of[r] for r in own),
        routes=tuple(tuple(leader[r] for r in route) for route in schedule.routes),
        actions=tuple(schedule.actions[r] for r in own),
        teams=tuple(
            tuple(range(leader[r], leader[r] + width)) for r, width in enumerate(widths) if width > 1
        ),
    )


def collapsed(schedule: Schedule) -> Schedule:
    """The schedule of the leaders alone, numbered anew.

    Raises:
        VerifyError: Members of a tensor group do not do the same things, or a team makes no sense.
    """
    if not schedule.teams:
        return schedule
    _check_teams(schedule)
    leaders = leaders_of(schedule)
    number = {rank: i for i, rank in enumerate(leaders)}
    try:
        routes = tuple(tuple(number[r] for r in route) for route in schedule.routes)
    except KeyError as error:
        raise VerifyError(
            f"schedule: a route goes through rank {error}, which is not the first of its tensor group"
        ) from None
    return replace(
        schedule,
        stages_of=tuple(schedule.stages_of[r] for r in leaders),
        routes=routes,
        actions=tuple(schedule.actions[r] for r in leaders),
        teams=(),
    )


def leaders_of(schedule: Schedule) -> tuple[int, ...]:
    """The first rank of every tensor group, and all ranks that are in none."""
    followers = {rank for team in schedule.teams for rank in team[1:]}
    return tuple(rank for rank in range(schedule.num_ranks) if rank not in followers)


def _check_teams(schedule: Schedule) -> None:
    seen: set[int] = set()
    for team in schedule.teams:
        inside = all(0 <= rank < schedule.num_ranks for rank in team)
        if len(team) < 2 or not inside or seen.intersection(team) or list(team) != sorted(set(team)):
            raise VerifyError(
                f"schedule: tensor group {team} is no increasing list of ranks that are in no other group"
            )
        seen.update(team)
        rows = {(schedule.stages_of[rank], schedule.actions[rank]) for rank in team}
        if len(rows) > 1:
            raise VerifyError(
                f"schedule: the ranks of tensor group {team} do not do the same things; they would wait "
                "for each other inside a layer"
            )
