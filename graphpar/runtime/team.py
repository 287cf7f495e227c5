"""What the members of a tensor group say to each other: a sum, a maximum, and an exchange of blocks.

What is begun may be waited for later, so that a member computes while it is on the way.
"""

from collections.abc import Callable, Sequence
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

    def along(self, axis: int) -> "Team":
        """The members that differ from this one along one axis of a mesh alone, as a team."""

    def start_sum(self, tensor: torch.Tensor, owned: bool = False) -> Callable[[], torch.Tensor]:
        """Begin a sum over the members; calling what comes back waits for it, the same bits for each.

        The argument is left as it is unless it is `owned`: then its place is used.
        """

    def start_exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> Callable[[], list[torch.Tensor]]:
        """Begin to give block k to member k; waiting gives what the members had for this one."""

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest value over the members, place by place; the argument is left as it is."""


class TransportTeam:
    """A tensor group over the ranks' process groups.

    Args:
        transport: The rank's transport.
        group: Number of the group among the transport's groups.
        member: The rank's place in it.
        size: Members of the group.
        lines: The lines of a mesh that it stands in, one along each axis.
    """

    def __init__(
        self,
        transport: Transport,
        group: int,
        member: int,
        size: int,
        lines: "Sequence[TransportTeam]" = (),
    ) -> None:
        self.transport, self.group, self.member, self.size = transport, group, member, size
        self.lines = lines

    def along(self, axis: int) -> "TransportTeam":
        """The rank's line along an axis."""
        return self.lines[axis]

    def start_sum(self, tensor: torch.Tensor, owned: bool = False) -> Callable[[], torch.Tensor]:
        """Begin a sum over the members."""
        tensor = tensor.detach()
        return self.transport.start_sum(tensor if owned else tensor.clone(), self.group)

    def start_exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> Callable[[], list[torch.Tensor]]:
        """Begin to give each member its block."""
        return self.transport.start_exchange(blocks, shapes, self.group)

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest value over the members."""
        return self.transport.maximum(tensor.detach().clone(), self.group)
