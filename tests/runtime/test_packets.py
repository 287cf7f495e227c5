"""Messages over emulated links carry when they are due, whatever they hold."""

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
    """Collectives with a member that comes later by its own time, though it is there already."""

    ReduceOp = dist.ReduceOp

    def __init__(self, other_s: float) -> None:
        super().__init__()
        self.other_s = other_s

    def new_group(self, ranks: list[int], backend: str) -> object:
        """A group is nothing but its name."""
        return tuple(ranks)

    def all_reduce(
        self, tensor: torch.Tensor, op: object = None, *, group: object, async_op: bool = False
    ) -> "Meeting":
        """The other member has the same gradients, and its own time."""
        if op is dist.ReduceOp.MAX:
            tensor.clamp_(min=self.other_s)
        else:
            tensor.mul_(2)
        return self


def test_a_sum_over_a_link_begins_when_the_last_member_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    began_s, link_s = time.monotonic(), 2 * 0.01
    meeting = Meeting(other_s=began_s + 0.3 + link_s)
    monkeypatch.setattr("graphpar.runtime.transport.dist", meeting)
    pace, link = Pace(2.0, 1), (EmulatedLink(1, 0.01, 1e12),)
    member = Transport(torch.device("cpu"), (0, 1), [(0, 1)], link, pace, timed_groups=[0])
    pace.restart(began_s)
    assert torch.equal(member.sum(torch.ones(4), 0), torch.full((4,), 2.0))
    assert pace.now_s() >= meeting.other_s - 1e-9, "the link carried it before the other member had come"
