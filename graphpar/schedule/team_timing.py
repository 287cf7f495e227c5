"""Timing of tensor groups: their members work in step, so a group is simulated as one rank."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from graphpar.cores import SharedCores
from graphpar.cost import LinkCost
from graphpar.schedule import Schedule
from graphpar.schedule.teams import leaders_of
from graphpar.schedule.timing import GradientGroup, RankTiming, SizeTiming, Timing


@dataclass(frozen=True)
class TeamTiming(Timing):
    """The timing of a schedule's leaders; `pairs` holds what a message between two replicas takes."""

    pairs: dict[tuple[int, int], LinkCost] = field(default_factory=dict)

    def link(self, source: int, target: int) -> LinkCost:
        """The link from one replica to another."""
        return self.pairs.get((source, target)) or super().link(source, target)


def timing_of_leaders(schedule: Schedule, timing: Timing) -> TeamTiming:
    """The timing with every tensor group as one rank."""
    leaders = leaders_of(schedule)
    teams = [schedule.team_of[rank] for rank in leaders]
    pairs = {
        (i, j): message_cost(timing, a, b)
        for i, a in enumerate(teams)
        for j, b in enumerate(teams)
        if i != j and (len(a) > 1 or len(b) > 1)
    }
    return TeamTiming(
        ranks=tuple(_together([timing.ranks[rank] for rank in team]) for team in teams),
        links=timing.links,
        network=timing.network,
        gradient_groups=_groups_of_leaders(schedule, timing, leaders),
        overlap=timing.overlap,
        shared=_shared_by_leaders(timing, teams),
        pairs=pairs,
    )


def _shared_by_leaders(timing: Timing, teams: Sequence[Sequence[int]]) -> SharedCores | None:
    """The cores that groups share; a group whose members differ goes at the slowest one's pace."""
    shared = timing.shared
    if shared is None:
        return None
    workers = dict(shared.workers)
    for team in teams:
        names = [timing.ranks[rank].device for rank in team]
        uses = [shared.workers[name] for name in names if name in shared.workers]
        if uses and len(team) > 1:
            slowest = max(uses, key=lambda use: use.slowdown)
            workers[names[0]] = replace(slowest, members=len(uses))
    return replace(shared, workers=workers)


def message_cost(timing: Timing, senders: Sequence[int], receivers: Sequence[int]) -> LinkCost:
    """One value from a replica to another: sender k serves every receiver whose place is k modulo width.

    A sender serves its receivers one after another; the slowest sender counts.
    """
    latency_s, s_per_byte = 0.0, 0.0
    for place, sender in enumerate(senders):
        links = [timing.link(sender, receiver) for receiver in receivers[place :: len(senders)]]
        latency_s = max(latency_s, sum(link.latency_s for link in links))
        s_per_byte = max(s_per_byte, sum(1 / link.bytes_per_s for link in links))
    return LinkCost(latency_s, 1 / s_per_byte)


def _together(members: Sequence[RankTiming]) -> RankTiming:
    first = members[0]
    if len(members) == 1:
        return first
    sizes = []
    for row in first.sizes:
        rows = [member.at_size(row.size, row.stage) for member in members]
        sizes.append(
            SizeTiming(
                row.size, max(r.forward_s for r in rows), max(r.backward_s for r in rows),
                max(r.saved_bytes for r in rows), max(r.working_bytes for r in rows),
                max(r.weight_s for r in rows), max(r.deferred_bytes for r in rows),
                max(r.split_s for r in rows), row.stage, max(r.collective_s for r in rows),
                min(r.gradient_bytes for r in rows), min(r.spared_bytes for r in rows),
            )
        )  # fmt: skip
    return RankTiming(
        first.device,
        first.node,
        tuple(sizes),
        max(m.optimizer_s for m in members),
        max(m.resident_bytes for m in members),
        max(m.update_bytes for m in members),
    )


def _groups_of_leaders(
    schedule: Schedule, timing: Timing, leaders: Sequence[int]
) -> tuple[GradientGroup, ...]:
    """Groups of members in unlike places reduce at the same time: the slowest place counts."""
    number = {rank: i for i, leader in enumerate(leaders) for rank in schedule.team_of[leader]}
    seconds: dict[tuple[int, ...], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    num_bytes: dict[tuple[int, ...], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for group in timing.gradient_groups:
        key = tuple(sorted({number[rank] for rank in group.ranks}))
        for rank in group.ranks:
            seconds[key][rank] += group.seconds
            num_bytes[key][rank] += group.num_bytes
    return tuple(
        GradientGroup(key, max(num_bytes[key].values()), max(by_rank.values()))
        for key, by_rank in seconds.items()
    )
