"""Gradients divided among replicas: right sums, always the same bits, and nobody waits in a circle."""

import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import handmade
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphpar.errors import RunError
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.runtime.emulate import Pace
from graphpar.runtime.gradient_rows import GradientRows
from graphpar.runtime.program import Scatter
from graphpar.runtime.transport import Arrival
from graphpar.runtime.zero import Shards, rows_of
from graphpar.schedule import Schedule, StageLink, backward_order, build_schedule
from graphpar.schedule.check import Message, messages_awaited, messages_sent

Letter = tuple[torch.Tensor, threading.Event]
Mail = dict[tuple[int, int, int], "queue.Queue[Letter | None]"]


class _Awaited(Arrival):
    """A message of another thread."""

    def __init__(self, box: "queue.Queue[Letter | None]") -> None:
        self.box = box

    def wait(self) -> torch.Tensor:
        found = self.box.get(timeout=60)
        if found is None:
            raise ConnectionError("the other end is gone")
        found[1].set()
        return found[0]


class _Threads:
    """A transport between threads; a send is out when it was received, as late as can be."""

    device = torch.device("cpu")

    def __init__(self, rank: int, mail: Mail) -> None:
        self.rank, self.mail = rank, mail

    def start_send(self, rank: int, tensor: torch.Tensor, tag: int) -> Callable[[], None]:
        taken = threading.Event()
        self.mail[self.rank, rank, tag].put((tensor.clone(), taken))

        def wait() -> None:
            assert taken.wait(60)

        return wait

    def post(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, tag: int) -> Arrival:
        return _Awaited(self.mail[rank, self.rank, tag])


SHAPES = [(3,), (5, 2), (7, 1, 3), (300, 120)]


def _gradients(microbatch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(microbatch)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _rank(
    own: int, members: int, owners: Sequence[int], delays: Sequence[float], mail: Mail, late: bool
) -> Callable[[], list[torch.Tensor]]:
    """A replica's step; gives its rows."""
    tensors = {str(i): nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(SHAPES)}
    cuts = {k: rows_of(t.shape[0], members, int(k), own) for k, t in tensors.items()}
    transport: object = _Threads(own, mail)
    shards = Shards(tensors, cuts, dict.fromkeys(cuts, 0), transport)  # type: ignore[arg-type]
    units = ((("3",), ("2",)), (("1", "0"),))
    order = tuple(range(len(owners)))
    scatter = Scatter(tuple(range(members)), own, order, tuple(owners), units)
    rows = GradientRows(scatter, shards, transport, Pace(1.0, 1))  # type: ignore[arg-type]

    def run() -> list[torch.Tensor]:
        with rows.step():
            for microbatch in (m for m, owner in enumerate(owners) if owner == own):
                time.sleep(delays[microbatch])
                with rows.backward(microbatch):
                    # In another order than the parcels', and one of them is not reached at all.
                    given = _gradients(microbatch)
                    places = (0, 3, 1) if late else (3, 1, 0)
                    roots = [tensors[str(i)] for i in places]
                    torch.autograd.backward(roots, [given[i] for i in places])
            rows.finish()
        found = [shards.by_label[str(i)].rows.grad for i in range(len(SHAPES))]
        assert all(t.grad is None for t in tensors.values())
        return [g for g in found if g is not None]

    return run


def _run(members: int, owners: Sequence[int], delays: Sequence[float], late: bool) -> list[torch.Tensor]:
    """The whole sums, put together from everybody's rows."""
    mail: Mail = defaultdict(queue.Queue)
    results: dict[int, list[torch.Tensor]] = {}
    steps = [_rank(k, members, owners, delays, mail, late) for k in range(members)]

    def work(k: int) -> None:
        results[k] = steps[k]()

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == members, "somebody waits in a circle, or failed"
    return [torch.cat([results[k][i] for k in range(members)]) for i in range(len(SHAPES))]


@given(data=st.data(), members=st.integers(2, 3), late=st.booleans())
@settings(max_examples=8, deadline=None)
def test_sums_are_those_of_all_microbatches(data: st.DataObject, members: int, late: bool) -> None:
    owners = data.draw(st.lists(st.integers(0, members - 1), min_size=0, max_size=5))
    pauses = st.lists(st.sampled_from([0.0, 0.003]), min_size=len(owners), max_size=len(owners))
    found = _run(members, owners, data.draw(pauses), late)
    expected = [torch.zeros(shape) for shape in SHAPES]
    for microbatch in range(len(owners)):
        for i in (0, 1, 3):
            expected[i] = expected[i] + _gradients(microbatch)[i]
    # Bit by bit: they are added in the order of the microbatches, whoever is late.
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_lost_replica_ends_the_step() -> None:
    mail: Mail = defaultdict(queue.Queue)
    run = _rank(0, 2, (1, 0), (0.0, 0.0), mail, late=False)
    mail[1, 0, 2**28].put(None)
    with pytest.raises(RunError, match="the other end is gone"):
        run()


@given(
    widths=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3),
    name=st.sampled_from(["1f1b", "gpipe"]),
    times=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_backwards_of_a_stage_can_end_in_that_order(
    widths: list[list[int]], name: ScheduleName, times: int
) -> None:
    """Run without clocks, every backward waiting for all earlier ones of its stage."""
    microbatches = times * max(map(sum, widths))
    names = iter(range(100))
    stages = []
    for number, shares in enumerate(widths):
        dealt = [1 + (microbatches - len(shares)) * s // sum(shares) for s in shares]
        dealt[0] += microbatches - sum(dealt)
        replicas = tuple(Replica(f"d{next(names)}", n) for n in dealt)
        stages.append(StageChoice(number, number + 1, replicas))
    links = [StageLink(i, i + 1, 1.0, 1.0) for i in range(len(stages) - 1)]
    pipelines = (PipelineChoice(microbatches, microbatches, tuple(stages)),)
    partition = handmade(pipelines, name)
    schedule = build_schedule(partition, links, training=True)
    order = backward_order(schedule)
    assert all(sorted(found) == list(range(microbatches)) for found in order.values())
    assert _ends(schedule, {stage: deque(found) for stage, found in order.items()})


def _ends(schedule: Schedule, order: dict[int, "deque[int]"]) -> bool:
    position, sent = [0] * schedule.num_ranks, set[Message]()
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            while position[rank] < len(row):
                action = row[position[rank]]
                lacks = any(m not in sent for m in messages_awaited(schedule, action))
                if lacks or (action.kind == "B" and order[action.stage][0] != action.microbatch):
                    break
                if action.kind == "B":
                    order[action.stage].popleft()
                sent.update(messages_sent(schedule, action))
                position[rank] += 1
                moved = True
    return all(at == len(row) for at, row in zip(position, schedule.actions, strict=True))
