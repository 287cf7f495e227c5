"""In which order the backwards of a stage can end, over all of its replicas."""

from collections import deque
from heapq import heappop, heappush

from graphpar.schedule.actions import Schedule
from graphpar.schedule.check import Message, messages_awaited, messages_sent
from graphpar.schedule.teams import collapsed


def backward_order(schedule: Schedule) -> dict[int, tuple[int, ...]]:
    """For each stage its microbatches in an order in which their backwards can end one after another.

    Even if every backward waits for all earlier ones of its stage, on whichever replica, nobody waits in
    a circle: the schedule is run without clocks, everything but backwards as soon as it can be, and of
    the backwards that can be next always the one of the first microbatch.

    >>> from graphpar.schedule import Action, PipelineSpan
    >>> rows = [tuple(Action.parse(t) for t in row.split()) for row in ("0F0 0F2 0B0 0B2", "0F1 0B1")]
    >>> span, routes = (PipelineSpan(0, 1, 0, 3),), ((0,), (1,), (0,))
    >>> backward_order(Schedule("gpipe", True, span, (), ((0,), (0,)), (1, 1, 1), routes, tuple(rows)))
    {0: (0, 1, 2)}
    """
    return _Run(collapsed(schedule)).order()


class _Run:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.position = [0] * schedule.num_ranks
        self.sent: set[Message] = set()
        self.waiting: dict[Message, int] = {}
        self.able: list[tuple[int, int]] = []

    def order(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        self._advance(range(self.schedule.num_ranks))
        while self.able:
            microbatch, rank = heappop(self.able)
            stage = self.schedule.actions[rank][self.position[rank]].stage
            found.setdefault(stage, []).append(microbatch)
            self.position[rank] += 1
            self._advance((rank,))
        return {stage: tuple(microbatches) for stage, microbatches in found.items()}

    def _advance(self, ranks: "range | tuple[int, ...]") -> None:
        """Do what can be done without a backward."""
        ready = deque(ranks)
        while ready:
            rank = ready.popleft()
            row = self.schedule.actions[rank]
            while self.position[rank] < len(row):
                action = row[self.position[rank]]
                if action.kind in "BI":
                    assert action.microbatch is not None
                    heappush(self.able, (action.microbatch, rank))
                    break
                lacking = next(
                    (m for m in messages_awaited(self.schedule, action) if m not in self.sent), None
                )
                if lacking is not None:
                    self.waiting[lacking] = rank
                    break
                for message in messages_sent(self.schedule, action):
                    self.sent.add(message)
                    if message in self.waiting:
                        ready.append(self.waiting.pop(message))
                self.position[rank] += 1
