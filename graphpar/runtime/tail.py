"""The tail of a step: what needs the whole batch runs once, between all forwards and all backwards.

Every rank of the last stage (of every pipeline) has parts of the batch. They give each other what the
tail collects, and each runs the tail on the whole: that costs less than sending gradients back, for a
tail is small. The gradients of the collected values are then known everywhere, and each rank takes
those of its own parts. The rank of the first microbatch alone adds gradients of weights that the tail
reads, and gives the results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphpar.runtime.lower import Collect, StageBuilder
from graphpar.runtime.program import RankProgram
from graphpar.runtime.slices import join, take
from graphpar.runtime.team import Team
from graphpar.runtime.transport import Arrival, Transport

_FIRST_TAG = 2**30
"""Tags of messages between stages are below."""
Parts = Mapping[int, torch.Tensor]
"""One value by microbatch."""


@dataclass
class Whole:
    """A tail at work: what it collected, and its results.

    Attributes:
        collected: Whole values in the order of the interface; leaves of the tail's autograd graph.
        results: Results of the graph by their place.
    """

    collected: list[torch.Tensor]
    results: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Tail:
    """The tail of the last stage of a pipeline.

    Attributes:
        builder: Builds its module.
        sizes: Samples of each microbatch.
        owners: For each microbatch the rank that has it; of a tensor group the first.
        teams: Ranks of every tensor group of several by their first.
        member: The rank's place in its tensor group.
        width: Ranks in that group.
    """

    builder: StageBuilder
    sizes: Sequence[int]
    owners: Sequence[int]
    teams: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    member: int = 0
    width: int = 1

    @classmethod
    def of(cls, builder: StageBuilder, program: RankProgram, team: Team | None) -> "Tail | None":
        """The tail of a rank's stage, None where it has none."""
        if builder.interface.tail is None:
            return None
        owners = tuple(route[-1] for route in program.routes)
        teams = {members[0]: members for members in program.teams}
        member, width = (0, 1) if team is None else (team.member, team.size)
        return cls(builder, program.sizes, owners, teams, member, width)

    @property
    def collects(self) -> tuple[Collect, ...]:
        """What is collected."""
        assert self.builder.interface.tail is not None
        return self.builder.interface.tail.collects

    @property
    def inputs(self) -> tuple[str, ...]:
        """Labels of the inputs it reads."""
        assert self.builder.interface.tail is not None
        return self.builder.interface.tail.inputs

    def exchange(self, own: Sequence[Parts], transport: Transport) -> list[Parts]:
        """Parts of all microbatches from those of this rank."""
        mine = {number for parts in own for number in parts}
        others = [number for number in range(len(self.owners)) if number not in mine]
        peers = sorted({peer for number in others for peer in self._readers(self.owners[number])})
        posted: list[tuple[int, int, Arrival]] = []
        for index, collect in enumerate(self.collects):
            for number in others:
                posted.append((index, number, self._post(transport, index, collect, number)))
        for index, parts in enumerate(own):
            for number, part in parts.items():
                for peer in peers:
                    transport.send(peer, part, self._tag(index, number))
        every = [dict(parts) for parts in own]
        for index, number, arrival in posted:
            every[index][number] = arrival.wait()
        return list(every)

    def _post(self, transport: Transport, index: int, collect: Collect, number: int) -> Arrival:
        team = self.teams.get(self.owners[number], (self.owners[number],))
        shape = collect.type.sizes(self.sizes[number])
        dtype = getattr(torch, collect.type.dtype)
        return transport.post(team[self.member % len(team)], shape, dtype, self._tag(index, number))

    def _readers(self, owner: int) -> tuple[int, ...]:
        """The ranks of another replica that read from this one: of a tensor group some members."""
        return self.teams.get(owner, (owner,))[self.member :: self.width]

    def _tag(self, index: int, number: int) -> int:
        return _FIRST_TAG + index * len(self.sizes) + number

    def run(self, parts: Sequence[Parts], inputs: Sequence[torch.Tensor], training: bool) -> Whole:
        """Run it on the whole batch.

        Args:
            parts: For each collected value its parts over all microbatches.
            inputs: The inputs it reads, of the whole batch.
            training: Whether a backward follows.
        """
        collected = [
            self._joined(collect, [by_number[n].detach() for n in range(len(self.sizes))])
            for collect, by_number in zip(self.collects, parts, strict=True)
        ]
        if training:
            for collect, value in zip(self.collects, collected, strict=True):
                value.requires_grad_(collect.has_gradient)
        batch = sum(self.sizes)
        _, results = self.builder.tail(batch)(*inputs, *collected)
        assert self.builder.interface.tail is not None
        places = [place for place, _ in self.builder.interface.tail.results]
        return Whole(collected, dict(zip(places, results, strict=True)))

    def backward(self, whole: Whole, scale: float, own: Sequence[int]) -> None:
        """Start from the loss among the results; gradients are then at the collected values.

        Those of weights are kept by the rank of the first microbatch alone.
        """
        leaves = [value for value in whole.collected if value.requires_grad]
        for loss in whole.results.values():
            if loss.requires_grad and (0 in own or leaves):
                seed = torch.full_like(loss, scale)
                torch.autograd.backward([loss], [seed], inputs=None if 0 in own else leaves)

    def gradients(self, whole: Whole, number: int) -> list[torch.Tensor | None]:
        """For each collected value the gradient of a microbatch's part of it; None for none."""
        return [
            None if value.grad is None else self._of_part(collect, value.grad, number)
            for collect, value in zip(self.collects, whole.collected, strict=True)
        ]

    def _of_part(self, collect: Collect, gradient: torch.Tensor, number: int) -> torch.Tensor:
        if collect.kind == "sample":
            dim, inner = collect.layout
            return take(gradient, dim, self.sizes, inner, number)
        if collect.kind == "shared" and number != 0:
            # Zeros, not nothing: where parts go in step, all of them take part in every backward.
            return torch.zeros_like(gradient)
        return gradient

    def _joined(self, collect: Collect, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if collect.kind == "sample":
            dim, inner = collect.layout
            return join(parts, dim, self.sizes, inner)
        if collect.kind == "partial":
            return torch.stack(tuple(parts)).sum(0, dtype=parts[0].dtype)
        return parts[0].detach()
