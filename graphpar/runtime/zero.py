"""ZeRO: replicas of a stage divide the optimiser's state among them (Rajbhandari et al., 2020).

Every replica holds all weights of its stage and adds up all of their gradients. After the last backward
each gets the sum of its own rows of every weight, steps these rows alone, and the replicas give each
other what they have stepped. Rows are a parameter of their own in the weight's memory, with as many
dimensions as the weight has, so that optimisers that group parameters by dimensions group them alike.
What has fewer rows than there are replicas stays whole on all of them. At level 2 gradients are given
by rows in every backward (`gradient_rows`). Replicas that are tensor groups
divide what they hold: members in equal places have equal slices, and each steps some rows of its slice.

That is the step on the whole for optimisers that work element by element; others are refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from graphpar.optimizer_probe import joining_optimizer, optimizer_traits
from graphpar.partition.types import PipelineChoice, ScheduleName
from graphpar.runtime.program import Slice
from graphpar.runtime.transport import Transport
from graphpar.training import Training

T = TypeVar("T")

TURN_BYTES = 4 * 2**20
"""Weights that are exchanged together; a larger one goes alone."""


def rows_of(rows: int, members: int, turn: int, member: int, dim: int = 0) -> Slice:
    """A member's rows of a weight; who gets one more of those that are left over goes by turns.

    >>> rows_of(5, 3, 0, 0).counts, rows_of(5, 3, 1, 0).counts
    ((2, 2, 1), (1, 2, 2))
    """
    share, more = divmod(rows, members)
    counts = tuple(share + ((k - turn) % members < more) for k in range(members))
    return Slice(dim, counts, 1, member)


MOST_ZERO = 2
"""The highest level that runs."""
ZERO_2_SCHEDULES = ("gpipe", "1f1b")
"""Schedules of which a rank has one stage and one backward for each microbatch."""


def refuse_levels(
    pipeline: PipelineChoice, training: Training | None, schedule: ScheduleName = "1f1b"
) -> None:
    """
    Raises:
        ValueError: A stage has a ZeRO level that does not run, or not with this optimiser or schedule.
    """
    for number, stage in enumerate(pipeline.stages):
        if not stage.zero or training is None:
            continue
        if stage.zero > MOST_ZERO:
            raise ValueError(
                f"Stage {number} of the plan has ZeRO level {stage.zero}, which can be planned, not run: "
                f"levels up to {MOST_ZERO} run."
            )
        if stage.zero > 1 and schedule not in ZERO_2_SCHEDULES:
            raise ValueError(
                f"Stage {number} of the plan has ZeRO level {stage.zero} under the schedule {schedule}; "
                f"from level 2 on {' and '.join(ZERO_2_SCHEDULES)} run. Plan with Training(zero=1) or "
                "Training(schedule='1f1b')."
            )
        if len({(r.member_shares, r.mesh, r.lean) for r in stage.replicas}) > 1:
            raise ValueError(
                f"Stage {number} of the plan has ZeRO level {stage.zero} on tensor groups of unlike "
                "widths or shares: they hold unlike slices, of which there is nothing to divide among "
                "them. Give its replicas equal shares, or plan with Training(zero=0)."
            )
        traits = optimizer_traits(training.optimizer)
        if not traits.by_slices:
            raise ValueError(
                f"Stage {number} of the plan divides the optimiser's state by rows (ZeRO level "
                f"{stage.zero}), but {traits.name} needs whole parameters. Plan with Training(zero=0)."
            )


def refuse_cut_model(pipeline: PipelineChoice, training: Training | None) -> None:
    """
    Raises:
        ValueError: The optimiser joins parameters that the plan gives to several devices.
    """
    joins = joining_optimizer(training)
    members = {replica.devices for stage in pipeline.stages for replica in stage.replicas}
    shared = len(pipeline.stages) > 1 and len(members) > 1
    if joins and (shared or any(len(devices) > 1 for devices in members)):
        raise ValueError(
            f"{joins} cannot train under this plan: its step on one parameter depends on the others, and "
            "each device of a pipeline holds only some of them. Plan with this optimiser "
            "(graphpar.plan(train=...)): then every device holds all parameters."
        )


@dataclass(frozen=True)
class Shard:
    """A weight, the rows of it that this rank steps, and among whom it is divided."""

    whole: nn.Parameter
    rows: nn.Parameter
    cut: Slice
    group: int

    def of(self, tensor: torch.Tensor, member: int) -> torch.Tensor:
        """A member's rows of a tensor like the weight, where they lie in it."""
        return tensor.narrow(self.cut.dim, sum(self.cut.counts[:member]), self.cut.counts[member])

    @property
    def own(self) -> int:
        """This rank's place among the replicas."""
        return self.cut.member


class Shards:
    """The weights of a rank whose optimiser state is divided.

    Args:
        tensors: The rank's parameters by label.
        cuts: The rows it steps, by label.
        groups: Number of the group of replicas, by label.
        transport: The way to them.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        cuts: Mapping[str, Slice],
        groups: Mapping[str, int],
        transport: Transport,
    ) -> None:
        self.transport = transport
        self.by_label: dict[str, Shard] = {}
        for label, cut in cuts.items():
            whole = tensors[label]
            assert isinstance(whole, nn.Parameter)
            first = sum(cut.counts[: cut.member])
            rows = nn.Parameter(whole.data.narrow(cut.dim, first, cut.counts[cut.member]))
            self.by_label[label] = Shard(whole, rows, cut, groups[label])

    def stepped(self, label: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the optimiser steps for a parameter: its rows, or all of it."""
        shard = self.by_label.get(label)
        return tensor if shard is None else shard.rows

    def sums_rows(self, label: str, group: int) -> bool:
        """Whether the sum of a gradient over a group is wanted by rows, each by one of the group."""
        return label in self.by_label and self.by_label[label].group == group

    def keep_rows(self, labels: Iterable[str]) -> None:
        """Of gradients that are summed already keep this rank's rows."""
        for label in labels:
            shard = self.by_label.get(label)
            if shard is not None and shard.whole.grad is not None:
                shard.rows.grad = shard.of(shard.whole.grad, shard.own).clone()
                shard.whole.grad = None

    def make_whole(self, labels: Iterable[str]) -> None:
        """Of gradients of which this rank has its rows make whole ones, zero where others have rows."""
        for label in labels:
            shard = self.by_label[label]
            shard.whole.grad = torch.zeros_like(shard.whole)
            if shard.rows.grad is not None:
                shard.of(shard.whole.grad, shard.own).copy_(shard.rows.grad)
                shard.rows.grad = None

    def sum_rows(self, labels: Sequence[str]) -> None:
        """Sum gradients over the replicas, of each row where it is stepped; the labels share a group."""
        for shards in _in_turns([self.by_label[label] for label in labels]):
            self._sum_rows(shards)

    def _sum_rows(self, shards: Sequence[Shard]) -> None:
        first = shards[0]
        blocks = []
        for member in range(len(first.cut.counts)):
            parts = [shard.of(_gradient(shard.whole), member).reshape(-1) for shard in shards]
            blocks.append(torch.cat(parts))
        mine = tuple(blocks[first.own].shape)
        arrived = self.transport.start_exchange(blocks, [mine] * len(blocks), first.group)()
        total = arrived[0]
        for part in arrived[1:]:
            total = total + part
        sizes = [shard.rows.numel() for shard in shards]
        for shard, rows in zip(shards, torch.split(total, sizes), strict=True):
            shard.rows.grad = rows.view_as(shard.rows).clone()
            shard.whole.grad = None

    def gather(self) -> None:
        """Give the replicas the rows stepped here, and take theirs."""
        buckets: dict[tuple[int, torch.dtype], list[Shard]] = {}
        for _, shard in sorted(self.by_label.items()):
            buckets.setdefault((shard.group, shard.whole.dtype), []).append(shard)
        for (group, _), every in sorted(buckets.items(), key=lambda item: item[0][0]):
            for shards in _in_turns(every):
                self._gather(shards, group)

    def _gather(self, shards: Sequence[Shard], group: int) -> None:
        members = range(len(shards[0].cut.counts))
        own = torch.cat([shard.rows.detach().reshape(-1) for shard in shards])
        sizes = [[shard.of(shard.whole, k).numel() for shard in shards] for k in members]
        shapes = [(sum(size),) for size in sizes]
        arrived = self.transport.start_exchange([own] * len(members), shapes, group)()
        with torch.no_grad():
            for member, flat in enumerate(arrived):
                if member == shards[0].own:
                    continue
                for shard, rows in zip(shards, torch.split(flat, sizes[member]), strict=True):
                    place = shard.of(shard.whole, member)
                    place.copy_(rows.view_as(place))


def in_turns(items: Iterable[T], num_bytes: Callable[[T], int], enough_bytes: int) -> Iterator[list[T]]:
    """So few at once that their copies take little memory beside what is saved."""
    found: list[T] = []
    held = 0
    for item in items:
        found.append(item)
        held += num_bytes(item)
        if held >= enough_bytes:
            yield found
            found, held = [], 0
    if found:
        yield found


def _in_turns(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    return in_turns(shards, lambda shard: shard.whole.nbytes, TURN_BYTES)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's gradient; zeros where no microbatch reached it."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad
