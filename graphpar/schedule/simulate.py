"""Predict the timeline and the peak memory of a schedule without running it.

Rules of the model: a rank does its compute actions one after another; a receive blocks until its
data are there; a send leaves at once and, with overlap, costs the rank no time, but a rank sends
one message at a time, in order. Every rank's actions are already ordered, so no event queue is
needed: a rank runs until it must wait for a message, and is taken up again when that message has a
time. The work is linear in the number of actions and messages. Where ranks are processes on the
same cores, what they cost each other is found by playing the schedule several times
(`graphpar.schedule.crowding`).
"""

from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graphpar.cost import LinkCost
from graphpar.errors import VerifyError
from graphpar.schedule import Action, Schedule
from graphpar.schedule.crowding import ROUNDS, is_crowded, longer_times
from graphpar.schedule.team_timing import timing_of_leaders
from graphpar.schedule.teams import collapsed, leaders_of
from graphpar.schedule.timing import SizeTiming, Timing

SUM_BYTES = 32 * 2**20
"""Gradients that are summed together, so that the copy they are gathered in stays small."""


@dataclass(frozen=True)
class Event:
    """An action with its times; that of a receive is the time the rank waits for it."""

    rank: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, repr=False)
class Timeline:
    """When everything happens in one step.

    Attributes:
        schedule: What was simulated.
        starts_s: For each rank the start of each of its actions.
        ends_s: For each rank the end of each of its actions.
        step_s: The end of the last action.
        compute_s: For each rank the time of its forwards, backwards and optimiser step.
        collective_s: For each rank what of that it spends in collectives of its tensor group.
        send_s: For each rank the time its messages are on their way.
        reduce_s: For each rank the time of its gradient all-reduces.
        peak_bytes: For each rank the most memory in use at any time.
    """

    schedule: Schedule
    starts_s: tuple[Sequence[float], ...] = field(repr=False)
    ends_s: tuple[Sequence[float], ...] = field(repr=False)
    step_s: float
    compute_s: tuple[float, ...]
    collective_s: tuple[float, ...]
    send_s: tuple[float, ...]
    reduce_s: tuple[float, ...]
    peak_bytes: tuple[float, ...]

    def events(self, rank: int) -> Iterator[Event]:
        """The events of one rank in the order of its schedule."""
        row = self.schedule.actions[rank]
        for action, start, end in zip(row, self.starts_s[rank], self.ends_s[rank], strict=True):
            yield Event(rank, action, start, end)

    @property
    def busy_share(self) -> tuple[float, ...]:
        """For each rank the share of the step in which it computes."""
        return tuple(s / self.step_s if self.step_s > 0 else 0.0 for s in self.compute_s)

    @property
    def bubble_share(self) -> float:
        """Share of all ranks' time in which they neither compute nor reduce gradients."""
        used = sum(self.compute_s) + sum(self.reduce_s)
        total = self.step_s * len(self.compute_s)
        return max(0.0, 1 - used / total) if total > 0 else 0.0

    def __repr__(self) -> str:
        return f"Timeline({self.step_s:.6g} s, {len(self.compute_s)} ranks)"


def simulate(schedule: Schedule, timing: Timing) -> Timeline:
    """Predict when every action of a valid schedule happens.

    Raises:
        ValueError: The timing is for another number of ranks, or lacks a microbatch size.
        VerifyError: The schedule deadlocks.
    """
    if len(timing.ranks) != schedule.num_ranks:
        raise ValueError(
            f"the timing has {len(timing.ranks)} ranks and the schedule {schedule.num_ranks}; "
            "make both from the same partition"
        )
    if schedule.teams:
        alone = simulate(collapsed(schedule), timing_of_leaders(schedule, timing))
        return _of_members(alone, schedule, timing)
    found = _play(schedule, timing, {})
    if is_crowded(timing):
        spent: dict[tuple[int, int], float] = {}
        for _ in range(ROUNDS):
            spent = longer_times(schedule, timing, found.starts_s, found.ends_s, spent)
            found = _play(schedule, timing, spent)
    return found


def _play(schedule: Schedule, timing: Timing, spent: Mapping[tuple[int, int], float]) -> Timeline:
    """Play a schedule through once; `spent` are seconds of single actions by rank and place."""
    simulation = _Simulation(schedule, timing, spent)
    simulation.run_microbatches()
    simulation.reduce_gradients()
    simulation.run_optimizers()
    return simulation.timeline()


def _of_members(leaders: Timeline, schedule: Schedule, timing: Timing) -> Timeline:
    """The timeline of all ranks from that of their tensor groups' leaders; memory is each rank's own."""
    number = {leader: i for i, leader in enumerate(leaders_of(schedule))}
    own = [number[team[0]] for team in schedule.team_of]
    return Timeline(
        schedule=schedule,
        starts_s=tuple(leaders.starts_s[i] for i in own),
        ends_s=tuple(leaders.ends_s[i] for i in own),
        step_s=leaders.step_s,
        compute_s=tuple(leaders.compute_s[i] for i in own),
        collective_s=tuple(leaders.collective_s[i] for i in own),
        send_s=tuple(leaders.send_s[i] for i in own),
        reduce_s=tuple(leaders.reduce_s[i] for i in own),
        peak_bytes=tuple(_peak_bytes(schedule, timing, rank) for rank in range(schedule.num_ranks)),
    )


class _Simulation:
    """The clocks of all ranks while a schedule is played through."""

    def __init__(
        self, schedule: Schedule, timing: Timing, spent: Mapping[tuple[int, int], float]
    ) -> None:
        self.schedule = schedule
        self.timing = timing
        self.spent = spent
        ranks = range(schedule.num_ranks)
        self.clock = [0.0 for _ in ranks]
        self.egress = [0.0 for _ in ranks]
        self.starts = [array("d") for _ in ranks]
        self.ends = [array("d") for _ in ranks]
        self.compute_s = [0.0 for _ in ranks]
        self.send_s = [0.0 for _ in ranks]
        self.reduce_s = [0.0 for _ in ranks]
        self.arrival_s: dict[tuple[int, int, int], float] = {}
        self.waiting: dict[tuple[int, int, int], int] = {}
        self.links: dict[tuple[int, int], LinkCost] = {}
        self.late_s = timing.shared.late_s if timing.shared is not None else 0.0
        self.numbers = [_numbers_by_size(schedule, timing, rank) for rank in ranks]
        self.ready = deque(ranks)

    def run_microbatches(self) -> None:
        while self.ready:
            self._run(self.ready.popleft())
        for rank, row in enumerate(self.schedule.actions):
            at = len(self.ends[rank])
            if at < len(row) and row[at].microbatch is not None:
                raise VerifyError(f"schedule: deadlock, rank {rank} waits forever at {row[at]}")

    def _run(self, rank: int) -> None:
        """Advance one rank until it must wait or its microbatches are done."""
        row = self.schedule.actions[rank]
        sizes = self.schedule.microbatch_sizes
        numbers = self.numbers[rank]
        starts, ends = self.starts[rank], self.ends[rank]
        for at in range(len(ends), len(row)):
            kind, stage, microbatch = row[at]
            if microbatch is None:
                return
            start = end = self.clock[rank]
            if kind in "FBIW":
                alone_s = numbers[stage, sizes[microbatch]].seconds(kind)
                end += self.spent.get((rank, at), alone_s) if self.spent else alone_s
                self.compute_s[rank] += end - start
                self.clock[rank] = end
            elif kind == "R" or kind == "G":
                arrived = self._arrival(kind, stage, microbatch, rank)
                if arrived is None:
                    return
                self.clock[rank] = end = max(start, arrived) + self._handling_s(
                    kind, stage, microbatch, rank
                )
            else:
                self.clock[rank] += self._handling_s(kind, stage, microbatch, rank)
                start, end = self._send(kind, stage, microbatch, rank)
                if not self.timing.overlap:
                    self.clock[rank] = end
            starts.append(start)
            ends.append(end)

    def _arrival(self, kind: str, stage: int, microbatch: int, rank: int) -> float | None:
        """When all messages of a receive are there; None, and a note to wake us, if unknown."""
        latest = 0.0
        schedule = self.schedule
        links = schedule.incoming[stage] if kind == "R" else schedule.outgoing[stage]
        for link in links:
            if kind == "R":
                message = link.source, stage, microbatch
            elif link.has_gradient:
                message = link.target, stage, microbatch
            else:
                continue
            arrived = self.arrival_s.get(message)
            if arrived is None:
                self.waiting[message] = rank
                return None
            latest = max(latest, arrived)
        return latest

    def _send(self, kind: str, stage: int, microbatch: int, rank: int) -> tuple[float, float]:
        """Send to all neighbours, one message after another, and wake those who wait."""
        schedule, size = self.schedule, self.schedule.microbatch_sizes[microbatch]
        start = end = max(self.clock[rank], self.egress[rank])
        for link in schedule.outgoing[stage] if kind == "S" else schedule.incoming[stage]:
            if kind == "S":
                other, num_bytes = link.target, link.forward_bytes(size)
            elif link.has_gradient:
                other, num_bytes = link.source, link.backward_bytes(size)
            else:
                continue
            receiver = schedule.rank_of(other, microbatch)
            if receiver != rank:
                end += self._link(rank, receiver).seconds(num_bytes)
            message = stage, other, microbatch
            late_s = self.late_s if receiver != rank and self._is_charged(receiver) else 0.0
            self.arrival_s[message] = end + late_s
            waiting = self.waiting.pop(message, None)
            if waiting is not None:
                self.ready.append(waiting)
        self.send_s[rank] += end - start
        self.egress[rank] = end
        return start, end

    def _is_charged(self, rank: int) -> bool:
        """Whether messages cost a rank what was measured between workers of this machine.

        It is such a worker, and has no pauses in which it makes up for that.
        """
        shared = self.timing.shared
        use = shared.workers.get(self.timing.ranks[rank].device) if shared is not None else None
        return use is not None and use.slowdown <= 1

    def _handling_s(self, kind: str, stage: int, microbatch: int, rank: int) -> float:
        """What the rank itself spends on the messages of an action, where that was measured."""
        shared, schedule = self.timing.shared, self.schedule
        if shared is None or not shared.send_s or not self._is_charged(rank):
            return 0.0
        ahead = kind in "RS"
        links = schedule.incoming[stage] if kind in "RD" else schedule.outgoing[stage]
        others = [k.source if kind in "RD" else k.target for k in links if ahead or k.has_gradient]
        away = sum(schedule.rank_of(other, microbatch) != rank for other in others)
        return away * (shared.receive_s if kind in "RG" else shared.send_s)

    def _link(self, source: int, target: int) -> LinkCost:
        pair = source, target
        cost = self.links.get(pair)
        if cost is None:
            cost = self.links[pair] = self.timing.link(source, target)
        return cost

    def reduce_gradients(self) -> None:
        """Groups reduce one after another; a group starts when its last rank is there."""
        if not self.schedule.training:
            return
        for rank in range(self.schedule.num_ranks):
            self.clock[rank] = max(self.clock[rank], self.egress[rank])
            self.starts[rank].append(self.clock[rank])
        for group in self.timing.gradient_groups:
            end = max(self.clock[rank] for rank in group.ranks) + group.seconds
            for rank in group.ranks:
                self.reduce_s[rank] += group.seconds
                self.clock[rank] = end
        for rank in range(self.schedule.num_ranks):
            self.ends[rank].append(self.clock[rank])

    def run_optimizers(self) -> None:
        if not self.schedule.training:
            return
        for rank, numbers in enumerate(self.timing.ranks):
            self.starts[rank].append(self.clock[rank])
            took_s = self.spent.get((rank, len(self.ends[rank])), numbers.optimizer_s)
            self.clock[rank] += took_s
            self.compute_s[rank] += took_s
            self.ends[rank].append(self.clock[rank])

    def _collective_s(self, rank: int) -> float:
        sizes, schedule = self.schedule.microbatch_sizes, self.schedule
        return sum(
            self.numbers[rank][stage, sizes[m]].collective_s
            for stage in schedule.stages_of[rank]
            for m in schedule.microbatches_of(rank, stage)
        )

    def timeline(self) -> Timeline:
        ranks = range(self.schedule.num_ranks)
        return Timeline(
            schedule=self.schedule,
            starts_s=tuple(self.starts),
            ends_s=tuple(self.ends),
            step_s=max(max(self.clock), max(self.egress)),
            compute_s=tuple(self.compute_s),
            collective_s=tuple(self._collective_s(rank) for rank in ranks),
            send_s=tuple(self.send_s),
            reduce_s=tuple(self.reduce_s),
            peak_bytes=tuple(_peak_bytes(self.schedule, self.timing, r) for r in ranks),
        )


def _peak_bytes(schedule: Schedule, timing: Timing, rank: int) -> float:
    """The most bytes in use: what stays, what forwards saved, what is being worked on."""
    return sum(peak_parts(schedule, timing, rank))


def resident_bytes(timing: Timing, rank: int) -> float:
    """What stays for the whole step, with all gradients and the copy that they are gathered in.

    Gradients are gathered for their sum when all has been given back, but between gradients that stay:
    a process on a CPU finds no hole for the copy, grows by it, and keeps that. Sums by rows take a few
    megabytes at a time, for which there are holes.
    """
    own, shared = timing.ranks[rank], timing.shared
    if shared is None or own.device not in shared.workers:
        return own.resident_bytes
    groups = (g for g in timing.gradient_groups if rank in g.ranks and not g.by_rows)
    summed = [group.num_bytes for group in groups]
    return own.resident_bytes + min(max(summed, default=0.0), SUM_BYTES)


def peak_parts(schedule: Schedule, timing: Timing, rank: int) -> tuple[float, float, float]:
    """Bytes that stay, are saved for backwards or as results, and are worked on, at their largest sum.

    A stage's gradients come with its first backward, with the first half of that if it has two: those of
    tables, norms and biases do. In the optimiser's update nothing is saved any more, and what it takes is
    worked on.
    """
    numbers = _numbers_by_size(schedule, timing, rank)
    resident = resident_bytes(timing, rank)
    missing = {stage: costs.gradient_bytes for (stage, _), costs in numbers.items()}
    saved, best = 0.0, (resident, 0.0, timing.ranks[rank].update_bytes)
    for kind, stage, microbatch in schedule.actions[rank]:
        if microbatch is None or kind not in "FBIW":
            continue
        costs = numbers[stage, schedule.microbatch_sizes[microbatch]]
        results = kind == "F" and not schedule.training
        if kind == "F" and not results:
            saved += costs.saved_bytes
        if kind in "BI" and missing[stage]:
            missing[stage] = costs.spared_bytes if kind == "B" else 0.0
        # While input gradients are made, what was saved gives way to what their weights still need.
        later = saved + costs.deferred_bytes - costs.saved_bytes if kind == "I" else saved
        there = resident - sum(missing.values())
        if kind != "F" or not missing[stage]:  # else a first backward is to come, which needs more
            best = max(best, (there, max(saved, later), costs.working_bytes), key=sum)
        # While they are made, results are among what is worked on.
        saved = later + (costs.saved_bytes if results else 0.0)
        if kind == "B":
            saved -= costs.saved_bytes
            missing[stage] = 0.0
        if kind == "W":
            saved -= costs.deferred_bytes
    return best


def _numbers_by_size(schedule: Schedule, timing: Timing, rank: int) -> dict[tuple[int, int], SizeTiming]:
    """The rank's numbers for its stages and the sizes of the microbatches it runs there."""
    return {
        (stage, schedule.microbatch_sizes[m]): timing.ranks[rank].at_size(
            schedule.microbatch_sizes[m], stage
        )
        for stage in schedule.stages_of[rank]
        for m in schedule.microbatches_of(rank, stage)
    }
