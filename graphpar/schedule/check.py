"""Proof that a schedule is complete, well ordered and free of deadlock.

`validate` runs the schedule without clocks. Sends are asynchronous and receives block, as in the
runtime. The run is linear in the number of messages: a rank that waits is looked at again only when what
it waits for has happened.
"""

from collections import Counter, deque
from collections.abc import Iterator

from graphpar.errors import VerifyError
from graphpar.schedule.actions import Action, PipelineSpan, Schedule
from graphpar.schedule.teams import collapsed

Message = tuple[int, int, int, str]
"""Source stage, target stage, microbatch, `S` for activations or `D` for gradients."""

_CONTEXT = 5
"""Actions shown before and after the one an error is about."""


def validate(schedule: Schedule) -> None:
    """Prove the schedule right, or say which rule it breaks and where.

    Raises:
        VerifyError: An action is missing, doubled, out of place or out of order, or ranks wait for
            each other in a circle.

    The members of a tensor group do the same things, so the proof is about the first of each; ranks in
    messages are then numbered without the others.
    """
    schedule = collapsed(schedule)
    _check_shape(schedule)
    for rank in range(schedule.num_ranks):
        _check_completeness(schedule, rank)
        _check_order(schedule, rank)
    _check_no_deadlock(schedule)


def _fail(schedule: Schedule, rule: str, rank: int, position: int) -> VerifyError:
    row = schedule.actions[rank]
    around = row[max(0, position - _CONTEXT) : position + _CONTEXT + 1]
    return VerifyError(
        f"schedule: {rule}; rank {rank} (stage {', '.join(map(str, schedule.stages_of[rank]))}), "
        f"around action {position}: {' '.join(map(str, around))}"
    )


def _check_shape(schedule: Schedule) -> None:
    """Spans cover stages and microbatches without gaps; routes visit the stages they should."""
    stage = microbatch = 0
    for span in schedule.pipelines:
        if (span.first_stage, span.first_microbatch) != (stage, microbatch):
            raise VerifyError(f"schedule: pipelines leave a gap or overlap at {span}")
        stage, microbatch = span.last_stage, span.last_microbatch
        for m in range(span.first_microbatch, min(span.last_microbatch, len(schedule.routes))):
            _check_route(schedule, span, m)
    if not microbatch == len(schedule.routes) == len(schedule.microbatch_sizes):
        raise VerifyError(
            f"schedule: {microbatch} microbatches in pipelines, {len(schedule.routes)} routes, "
            f"{len(schedule.microbatch_sizes)} sizes; they must be equal"
        )
    if len(schedule.actions) != len(schedule.stages_of) or not all(schedule.stages_of):
        raise VerifyError("schedule: the numbers of action rows and of ranks differ")
    for link in schedule.links:
        if not any(p.first_stage <= link.source < link.target < p.last_stage for p in schedule.pipelines):
            raise VerifyError(f"schedule: {link} does not lead to a later stage of one pipeline")


def _check_route(schedule: Schedule, span: PipelineSpan, microbatch: int) -> None:
    """A microbatch visits all stages of its pipeline; a rank has it in all its stages or in none."""
    route, stages = schedule.routes[microbatch], range(span.first_stage, span.last_stage)
    own = [schedule.stages_of[r] if 0 <= r < schedule.num_ranks else () for r in route]
    if len(route) != len(stages) or not all(s in held for s, held in zip(stages, own, strict=True)):
        visited = [",".join(map(str, held)) for held in own]
        raise VerifyError(
            f"schedule: the route of microbatch {microbatch} visits stages [{' '.join(visited)}], not "
            f"{span.first_stage} to {span.last_stage - 1} in order"
        )
    for rank, held in zip(route, own, strict=True):
        if route.count(rank) != len(held):
            raise VerifyError(
                f"schedule: microbatch {microbatch} visits rank {rank} in some of its stages only"
            )


def _expected(schedule: Schedule, rank: int) -> Iterator[Action]:
    row = set(schedule.actions[rank])
    for stage in schedule.stages_of[rank]:
        into, out = schedule.incoming[stage], schedule.outgoing[stage]
        for m in schedule.microbatches_of(rank, stage):
            yield Action("F", stage, m)
            if into:
                yield Action("R", stage, m)
            if out:
                yield Action("S", stage, m)
            if not schedule.training:
                continue
            halves = row & {Action("I", stage, m), Action("W", stage, m)}
            for kind in ("I", "W") if halves else ("B",):
                yield Action(kind, stage, m)
            if any(link.has_gradient for link in out):
                yield Action("G", stage, m)
            if any(link.has_gradient for link in into):
                yield Action("D", stage, m)
    if schedule.training:
        yield Action("A", schedule.stages_of[rank][0])
        yield Action("O", schedule.stages_of[rank][0])


def _check_completeness(schedule: Schedule, rank: int) -> None:
    row = schedule.actions[rank]
    have, want = Counter(row), Counter(_expected(schedule, rank))
    if have == want:
        return
    for position, action in enumerate(row):
        if action not in want:
            raise _fail(schedule, f"action {action} does not belong to this rank", rank, position)
        if have[action] > 1:
            raise _fail(schedule, f"action {action} occurs {have[action]} times", rank, position)
    missing = next(a for a in want if a not in have)
    raise _fail(schedule, f"action {missing} is missing", rank, len(row))


_RANKING = {"R": 0, "F": 1, "S": 2, "G": 3, "B": 4, "I": 4, "W": 5, "D": 5}


def _check_order(schedule: Schedule, rank: int) -> None:
    """Receive, forward, send, receive gradients, backward, send gradients; at the end A, then O.

    Gradients of weights come at any time after those of inputs.
    """
    reached: dict[tuple[int, int], int] = {}
    row = schedule.actions[rank]
    for position, action in enumerate(row):
        if action.microbatch is None:
            if position != len(row) - (2 if action.kind == "A" else 1):
                raise _fail(schedule, f"{action} must stand at the end", rank, position)
            continue
        step = _RANKING[action.kind]
        key = action.stage, action.microbatch
        if step < reached.get(key, 0):
            raise _fail(schedule, f"{action} comes too late for its microbatch", rank, position)
        reached[key] = step


def messages_sent(schedule: Schedule, action: Action) -> Iterator[Message]:
    """The messages that are on their way once an action is done."""
    stage, m = action.stage, action.microbatch
    if m is None:
        return
    if action.kind == "S":
        for link in schedule.outgoing[stage]:
            yield stage, link.target, m, "S"
    elif action.kind == "D":
        for link in schedule.incoming[stage]:
            if link.has_gradient:
                yield stage, link.source, m, "D"


def messages_awaited(schedule: Schedule, action: Action) -> Iterator[Message]:
    """The messages without which an action cannot be done."""
    stage, m = action.stage, action.microbatch
    if m is None:
        return
    if action.kind == "R":
        for link in schedule.incoming[stage]:
            yield link.source, stage, m, "S"
    elif action.kind == "G":
        for link in schedule.outgoing[stage]:
            if link.has_gradient:
                yield link.target, stage, m, "D"


def _check_no_deadlock(schedule: Schedule) -> None:
    """Run with asynchronous sends; whoever cannot finish waits in a circle."""
    position = [0] * schedule.num_ranks
    sent: set[Message] = set()
    waiting: dict[Message, int] = {}
    ready = deque(range(schedule.num_ranks))
    while ready:
        rank = ready.popleft()
        row = schedule.actions[rank]
        while position[rank] < len(row):
            action = row[position[rank]]
            lacking = next((x for x in messages_awaited(schedule, action) if x not in sent), None)
            if lacking is not None:
                waiting[lacking] = rank
                break
            for message in messages_sent(schedule, action):
                sent.add(message)
                if message in waiting:
                    ready.append(waiting.pop(message))
            position[rank] += 1
    for rank, row in enumerate(schedule.actions):
        if position[rank] < len(row):
            stuck = _describe_stuck(schedule, position)
            raise _fail(schedule, f"deadlock: {stuck}", rank, position[rank])


def _describe_stuck(schedule: Schedule, position: list[int]) -> str:
    stuck = [
        f"rank {rank} waits at {row[at]}"
        for rank, (row, at) in enumerate(zip(schedule.actions, position, strict=True))
        if at < len(row)
    ]
    more = f" and {len(stuck) - _CONTEXT} more" if len(stuck) > _CONTEXT else ""
    return ", ".join(stuck[:_CONTEXT]) + more
