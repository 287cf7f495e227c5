"""Messages over emulated links carry when they are due, whatever they hold."""

import math
import time

import pytest
import torch
import torch.distributed as dist

from graphpar.runtime.emulate import Pace
from graphpar.runtime.program import EmulatedLink
from graphpar.runtime.transport import Transport


class Wire:
    """Stands for gloo: what is sent with a tag is what was posted for it."""

    def __init__(self) -> None:
        self.posted: dict[int, torch.Tensor] = {}

    def irecv(self, packet: torch.Tensor, src: int, tag: int) -> "Wire":
        self.posted[tag] = packet
        return self

    def isend(self, packet: torch.Tensor, dst: int, tag: int) -> "Wire":
        into = self.posted[tag]
        assert into.dtype == packet.dtype and into.shape == packet.shape
        assert not packet.is_conj() and not packet.is_neg(), "gloo sends bytes alone"
        into.copy_(packet)
        return self

    def wait(self) -> None:
        """Everything is there."""


@pytest.mark.parametrize("link", [(), (EmulatedLink(1, 0.01, 1e6),)])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.tensor([True, False, True]),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(5, dtype=torch.int64),
        torch.empty(0, 4),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
        torch.randn(4, 6).t(),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}-{t.is_conj()}-{t.is_neg()}",
)
def test_a_message_arrives_as_it_was_and_not_before_it_is_due(
    monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor, link: tuple[EmulatedLink, ...]
) -> None:
    wire = Wire()
    monkeypatch.setattr("graphpar.runtime.transport.dist", wire)
    pace = Pace(2.0, 1)
    ends = Transport(torch.device("cpu"), (0, 1), (), link, pace)
    arrival = ends.post(1, tuple(tensor.shape), tensor.dtype, 5)
    began_s = time.monotonic()
    pace.restart(began_s)
    ends.start_send(1, tensor, 5)
    found = arrival.wait()
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert torch.equal(found, tensor)
    if link:
        due_s = began_s + 0.01 + tensor.nbytes / 1e6
        assert time.monotonic() >= due_s
        assert pace.now_s() == pytest.approx(due_s, abs=1e-9), "lateness is not the device's"


class Meeting(Wire):
    """Collectives with a member that comes at another time by its own, though it is there already."""

    ReduceOp = dist.ReduceOp

    def __init__(self, begins_s: float, link_s: float) -> None:
        super().__init__()
        self.other = torch.tensor([begins_s, link_s], dtype=torch.float64)

    def new_group(self, ranks: list[int], backend: str) -> object:
        """A group is nothing but its name."""
        return tuple(ranks)

    def all_reduce(
        self, tensor: torch.Tensor, op: object = None, *, group: object, async_op: bool = False
    ) -> "Meeting":
        """The other member has the same gradients, and its own time."""
        if op is dist.ReduceOp.MAX:
            torch.maximum(tensor, self.other, out=tensor)
        else:
            tensor.mul_(2)
        return self


@pytest.mark.parametrize(("own", "other"), [(0.1, 0.0), (0.0, 0.1), (0.02, 0.1)])
def test_a_sum_begins_when_the_last_member_has_come_and_takes_what_the_slowest_link_does(
    own: float, other: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_s = time.monotonic()
    monkeypatch.setattr("graphpar.runtime.transport.dist", Meeting(began_s + 0.1, other))
    pace, links = Pace(2.0, 1), (EmulatedLink(1, own / 2, math.inf),) if own else ()
    member = Transport(torch.device("cpu"), (0, 1), [(0, 1)], links, pace, timed_groups=[0])
    pace.restart(began_s)
    assert torch.equal(member.sum(torch.ones(4), 0), torch.full((4,), 2.0))
    assert pace.now_s() >= began_s + 0.1 + max(own, other) - 1e-9, "a link carried it too early"
