"""What the devices of a training run send each other, beside compute and in its way.

Collectives of tensor-, expert-, context- and data-parallel groups, and what neighbouring pipeline stages
exchange; `communication.py` prices each, here is how many there are, of what size, and what hides them.
"""

from dataclasses import dataclass, replace

from graphpar import catalogue
from graphpar.cost_models.communication import CollectiveName, Group, collective_s, nodes_for
from graphpar.cost_models.training_memory import (
    dense_copies,
    expert_copies,
    layer_elements,
    stage_elements,
    weights_of_stage,
)
from graphpar.cost_models.training_run import Run, TrainingParameters

LINE_SHARE = 0.96
"""Of a network's line rate, what headers leave to payload."""

CHANNELS = 32
"""Multiprocessors that a collective takes from compute beside it, the most channels that NCCL opens
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-max-nchannels)."""

SCALED = ("float8_e4m3fn", "float4")
"""Formats whose operands are scaled and cast before each product."""

TENSOR_HIDDEN = 0.5
"""Of a tensor-parallel collective cut into pieces beside its product: 0.42 to 0.57 by torchtitan's runs
with and without (https://github.com/pytorch/torchtitan/tree/main/benchmarks)."""


@dataclass(frozen=True)
class Exchanges:
    """One run on its devices, as far as these talk to each other."""

    run: Run
    p: TrainingParameters

    @property
    def kind(self) -> catalogue.DeviceKind:
        return catalogue.devices()[self.run.device]

    @property
    def family(self) -> catalogue.Family:
        return catalogue.families()[self.kind.family]

    @property
    def link(self) -> str:
        return self.run.link or self.kind.link

    @property
    def contention(self) -> float:
        """What a collective and the compute beside it cost each other, of the shorter one."""
        return min(CHANNELS / (self.kind.multiprocessors or 108), 0.5)

    def _group(self, ranks: int, stride: int, sharing: int | None = None) -> Group:
        """Ranks that lie `stride` apart in the order of devices."""
        nodes = nodes_for(ranks, max(self.run.per_node // stride, 1))
        per_node = ranks // nodes
        together = self.run.per_node // per_node if nodes > 1 else 1
        together = max(min(together, stride), 1) if sharing is None else sharing
        network = replace(self.run.network, efficiency=LINE_SHARE)
        return Group(ranks, self.link, nodes, network, together, self.kind.peer_access, stride == 1)

    def tensor_collective_s(self, beside_s: float) -> float:
        """What one all-reduce of activations adds to the compute that comes with it."""
        run = self.run
        if run.tensor == 1:
            return 0.0
        tokens = run.microbatch * run.shape.seq_len / run.context
        num_bytes = tokens * run.shape.hidden * 2.0
        group = self._group(run.tensor, 1)
        if run.sequence_parallel:
            gathered_s = collective_s("all_gather", num_bytes * self._gathered_share(), group)
            spent_s = gathered_s + collective_s("reduce_scatter", num_bytes, group)
        else:
            spent_s = collective_s("all_reduce", num_bytes, group)
        # Cut into pieces beside the products that make and use them; the ends stay exposed.
        if not run.overlaps_tensor:
            return spent_s
        hidden_s = min(TENSOR_HIDDEN * spent_s, 0.5 * beside_s)
        return spent_s - hidden_s

    def _gathered_share(self) -> float:
        """Bytes of gathered activations over those in half precision.

        Where one scale stands for a tensor or a block, forward casts to float8 first and gathers that;
        backward's gradients come as they are.
        """
        if self.run.dtype not in SCALED or self.run.row_scales:
            return 1.0
        return 0.75 if self.run.recompute == "none" else 2 / 3

    def expert_collective_s(self, beside_s: float) -> float:
        """What one all-to-all of a layer's tokens adds; forward and backward have two each."""
        run = self.run
        if run.expert <= 1 or run.shape.moe is None:
            return 0.0
        tokens = run.microbatch * run.shape.seq_len / run.context / run.tensor
        chosen = run.shape.moe.topk
        group = self._group(run.expert, run.expert_tensor)
        if group.nodes > 1 and group.network is not None:
            # A token goes to each node once, however many of its experts live there.
            share = group.nodes * (1 - (1 - 1 / group.nodes) ** chosen) / chosen
            bytes_per_s = group.network.node_bytes_per_s / share
            group = replace(group, network=replace(group.network, node_bytes_per_s=bytes_per_s))
        spent_s = collective_s("all_to_all", tokens * run.shape.hidden * 2.0 * chosen, group)
        return self._exposed(spent_s, beside_s) if run.overlaps_experts else spent_s

    def context_collective_s(self, beside_s: float) -> float:
        """What keys and values add on their way around a context-parallel group beside attention: once
        in forward, and in backward once more with their gradients coming back."""
        run, shape = self.run, self.run.shape
        if run.context == 1:
            return 0.0
        elements = 2.0 * run.microbatch * shape.seq_len * shape.kv_heads * shape.head / run.tensor
        group = self._group(run.context, run.tensor)
        return self._exposed(collective_s("all_gather", elements * 2.0, group), beside_s)

    def shard_collectives_s(self, device_s: float) -> float:
        """What sharded weights cost per layer and microbatch beyond what compute hides."""
        run = self.run
        if run.zero < 3:
            return 0.0
        weights = layer_elements(run)
        gather_s = self._over_copies_s("all_gather", weights, 2.0)
        scatter_s = self._over_copies_s("reduce_scatter", weights, run.sent_bytes)
        if run.gathers_late:
            # Asked for only after the gradients of the layer before, nothing is left to hide it behind.
            return gather_s + self._exposed(gather_s + scatter_s, device_s)
        return self._exposed(2 * gather_s + scatter_s, device_s)

    def _exposed(self, spent_s: float, beside_s: float) -> float:
        """What a collective adds to compute it runs beside: the excess, and a share of the rest."""
        return max(spent_s - beside_s, 0.0) + self.contention * min(spent_s, beside_s)

    def exchanges_s(self) -> list[float]:
        """What each stage spends per microbatch on exchanging activations and gradients with neighbours.

        Stages in the middle have two of them, the ends one; chunks of an interleaved schedule go around,
        each with two. Across a boundary a microbatch's activations go one way while an earlier one's
        gradients go the other, or one after the other.
        """
        run = self.run
        between_s = [
            self._unhidden(sum(ways) if run.sends_apart else max(ways)) for ways in self._boundaries_s()
        ]
        if run.virtual > 1:
            return [2 * run.virtual * max(between_s, default=0.0)] * run.pipeline
        return [sum(between_s[max(stage - 1, 0) : stage + 1]) for stage in range(run.pipeline)]

    def filling_s(self) -> float:
        """What one microbatch waits for at all boundaries, there and back."""
        return self._unhidden(sum(map(sum, self._boundaries_s())))

    def _unhidden(self, spent_s: float) -> float:
        """Chunks of an interleaved schedule are sent while the next one computes."""
        hides = self.run.overlaps_tensor and self.run.virtual > 1
        return spent_s * self.contention if hides else spent_s

    def _boundaries_s(self) -> list[tuple[float, float]]:
        """One microbatch's activations on to the next stage and their gradients back, by boundary."""
        run = self.run
        if run.pipeline == 1:
            return []
        tokens = run.microbatch * run.shape.seq_len / run.context
        whole = tokens * run.shape.hidden * 2.0
        # Ranks of a tensor-parallel group send a slice each and gather it inside the node.
        part = whole / run.tensor
        sent_s = {
            far: tuple(
                collective_s("send", num_bytes, self._pair(far))
                for num_bytes in (part, whole if run.sends_whole else part)
            )
            for far in (False, True)
        }
        return [(sent_s[far][0], sent_s[far][1]) for far in map(self._is_far, range(run.pipeline - 1))]

    @property
    def _stride(self) -> int:
        """Devices of a stage, which lie next to each other."""
        return self.run.tensor * self.run.context * self.run.data

    def _is_far(self, boundary: int) -> bool:
        """Whether the stages on both sides of a boundary lie in more than one node."""
        run = self.run
        last = (boundary + 2) * self._stride - 1
        return (
            run.devices > run.per_node and boundary * self._stride // run.per_node != last // run.per_node
        )

    def _pair(self, far: bool) -> Group:
        """A device and its like in another stage, in one node or in two."""
        sharing = min(self._stride, self.run.per_node) if far else 1
        return replace(self._group(2, self._stride, sharing), nodes=2 if far else 1)

    def tables_sum_s(self) -> float:
        """The sum of the gradients of a table that the first and the last stage both hold."""
        run = self.run
        if run.pipeline == 1 or not run.sums_tables:
            return 0.0
        elements = run.shape.embedding_parameters / (1 if run.shape.tied else 2) / run.tensor
        ends = self._pair(run.devices > run.per_node)
        return collective_s("all_reduce", elements * run.sent_bytes, ends)

    def gradient_collective_s(self, work_s: float) -> float:
        """The sum of gradients over replicas beyond what backward hides."""
        run = self.run
        window_s = work_s / max(run.batch / (run.data * run.microbatch), 1.0) * 0.66
        if run.zero >= 3:
            # Those of shards run beside the shards' own, whose multiprocessors are counted.
            return max(self._shard_sums_s() - window_s, 0.0)
        spent_s = self._over_copies_s("all_reduce", stage_elements(run, 0), run.sent_bytes)
        if run.overlaps:
            spent_s = self._exposed(spent_s, window_s)
        return spent_s + self.tables_sum_s()

    def _shard_sums_s(self) -> float:
        """Under hybrid sharding, the sums of shards over the groups that have divided weights."""
        run = self.run
        if not run.shard_group:
            return 0.0
        groups = max(run.data * run.context // run.shard_group, 1)
        shard = weights_of_stage(run, 0) / run.shard_group
        group = self._group(groups, run.tensor * run.shard_group)
        return collective_s("all_reduce", shard * run.sent_bytes, group)

    def _over_copies_s(self, name: CollectiveName, elements: tuple[float, float], each: float) -> float:
        """A collective of some elements of weights, dense ones and experts, of so many bytes each, over
        the devices that hold the same: experts' groups leave fewer of them."""
        run = self.run
        dense, experts = elements
        spent_s = collective_s(name, dense * each, self._group(dense_copies(run), run.tensor))
        if experts:
            group = self._group(expert_copies(run), run.expert * run.expert_tensor)
            spent_s += collective_s(name, experts * each, group)
        return spent_s
