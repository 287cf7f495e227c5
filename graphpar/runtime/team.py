"""What the members of a tensor group say to each other: a sum, a maximum, and an exchange of blocks."""

from collections.abc import Sequence
from typing import Protocol

import torch

from graphpar.runtime.transport import Transport


class Team(Protocol):
    """One member's view of its tensor group; all members make the same calls in the same order."""

    @property
    def member(self) -> int:
        """The member's place in the group."""

    @property
    def size(self) -> int:
        """Members of the group."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the members, the same bits for each; the argument is left as it is."""

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest value over the members, place by place; the argument is left as it is."""

    def exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """Give block k to member k; get what the members had for this one, of the shapes given."""


class TransportTeam:
    """A tensor group over the ranks' process groups.

    Args:
        transport: The rank's transport.
        group: Number of the group among the transport's groups.
        member: The rank's place in it.
        size: Members of the group.
    """

    def __init__(self, transport: Transport, group: int, member: int, size: int) -> None:
        self.transport, self.group, self.member, self.size = transport, group, member, size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the members."""
        return self.transport.sum(tensor.detach().clone(), self.group)

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest value over the members."""
        return self.transport.maximum(tensor.detach().clone(), self.group)

    def exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """Give each member its block."""
        return self.transport.exchange(blocks, shapes, self.group)
