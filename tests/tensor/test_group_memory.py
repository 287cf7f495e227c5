"""Groups that compute again and divide their state keep less, and are chosen where memory binds."""

from contextlib import AbstractContextManager
from functools import cache

import pytest
import torch
from choices import FREE, PCIE, gpus, planned
from threads import grouped, one_stage
from torch import nn

from graphpar.cluster import Cluster
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.sharding import choose_sharding
from graphpar.cost_models.tensor_modes import SharedUnits, TimesBySize
from graphpar.groups.candidates import candidate_groups, width_notes
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_prepared, price
from graphpar.preparation import Prepared, prepare
from graphpar.training import Training

hf = pytest.importorskip("transformers", reason="transformers is not installed")
ADAM = Training(optimizer=torch.optim.AdamW, microbatches=2, zero=1)


class Stack(nn.Module):
    """Equal perceptrons and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(16, 64) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(64, 16) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return nn.functional.mse_loss(x, y)


def test_less_is_kept() -> None:
    model, data = Stack(), (torch.randn(32, 16), torch.randn(32, 16))
    prepared = prepare(model, data, {}, Training(optimizer=torch.optim.SGD))
    choice = planned(prepared, gpus(2, FREE))
    kept = []
    for again in (False, True):
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def watched() -> AbstractContextManager[None]:
            return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

        grouped(model, prepared, choice, 2, data, {}, again=again, watched=watched)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.6 * kept[0]


@cache
def captured() -> Prepared:
    """Two blocks of a small Llama without weights."""
    with torch.device("meta"):
        ids = torch.zeros(8, 512, dtype=torch.long)
        config = hf.LlamaConfig(
            vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
            num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=512,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    return prepare(model, (ids,), {"labels": ids}, ADAM)


def stages(memory_bytes: float) -> list[StageChoice]:
    """What four H100 with so much memory do in groups of two at most."""
    devices = {"kind": "h100-sxm-80gb", "count": 4, "memory_bytes": int(memory_bytes)}
    cluster = Cluster.from_dict({"nodes": [{"name": "a", "devices": devices, "link": "nvlink4"}]})
    plan = plan_prepared(
        captured(),
        cluster,
        train=ADAM,
        precision="float32",
        calibration=None,
        time_limit_s=60.0,
        gap=0.01,
        tensor=2,
    )
    assert max(plan.partition.peak_bytes.values()) <= memory_bytes
    return [stage for pipeline in plan.partition.pipelines for stage in pipeline.stages]


@pytest.mark.parametrize(("memory_bytes", "again"), [(1.8e9, False), (1.7e9, True)])
def test_both_are_chosen_where_memory_binds(memory_bytes: float, again: bool) -> None:
    (stage,) = stages(memory_bytes)
    assert [len(replica.devices) for replica in stage.replicas] == [2, 2]
    assert stage.zero == 1 and stage.recompute == again


def test_which_groups_are_priced() -> None:
    """Three equal devices together; unlike ones by speed, by memory and halfway between."""
    three = {"name": "a", "link": "nvlink4", "devices": {"kind": "h100-sxm-80gb", "count": 3}}
    found = candidate_groups(Cluster.from_dict({"nodes": [three]}), 3)
    assert [len(group.devices) for group in found] == [2, 3]
    unlike = [{"kind": "h100-sxm-80gb", "memory_bytes": 10**9}, {"kind": "t4", "memory_bytes": 3 * 10**9}]
    pair = {"name": "a", "link": "pcie4-x16", "devices": unlike}
    speed, between, memory = candidate_groups(Cluster.from_dict({"nodes": [pair]}), 2)
    assert memory.shares == (0.25, 0.75) and speed.shares[0] > between.shares[0] > 0.25


def test_what_became_of_a_width_that_was_asked_for() -> None:
    def found(*widths: int) -> Partition:
        replicas = tuple(Replica(f"a{i}", 1, ("b",) * (width - 1)) for i, width in enumerate(widths))
        pipeline = PipelineChoice(1, 1, tuple(StageChoice(0, 1, (replica,)) for replica in replicas))
        return Partition((pipeline,), "1f1b", "optimal", 1, {}, 1, 0, 1, 1, (), "", {})

    candidates = [Replica("a", 1, ("b",)), Replica("a", 1, ("b", "c", "d"))]
    where = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": 4}]})
    table = price(captured(), where, train=ADAM, calibration=None)
    (none,) = width_notes(found(1, 1), 4, candidates, table)
    (narrower,) = width_notes(found(1, 2), 8, candidates, table)
    assert "up to 4 devices were considered; none makes the step shorter" in none
    assert "tensor=8: " in narrower and "none of more than 2 " in narrower
    assert not width_notes(found(1, 4), 4, candidates, table)
    assert not width_notes(found(1), "auto", candidates, table)


def test_collectives_are_told_apart_from_computing() -> None:
    """What of a group's time depends on its link is what is said to be spent in collectives."""
    prepared, cluster = (
        captured(),
        Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": 2}]}),
    )
    table = price(prepared, cluster, train=ADAM, calibration=None)
    graph, options = one_stage(prepared.graph), ShardingOptions(samples=2, hold_factor=4.0)
    chosen = choose_sharding(graph, 0, prepared.chain, gpus(2, PCIE), options)
    modes = []
    for link in (PCIE, FREE):
        group = TensorGroup(cluster.devices, (0.5, 0.5), link)
        times = TimesBySize(graph, group, options)
        modes.append(SharedUnits(graph, prepared.chain, chosen, times).mode(table, (0, 0)))
    sent = 0.0
    for slow, free in zip(*(mode.costs for mode in modes), strict=True):
        both = (map(sum, zip(c.forward_s, c.backward_s, strict=True)) for c in (slow, free))
        longer = [a - b for a, b in zip(*both, strict=True)]
        told = [a - b for a, b in zip(slow.collective_s, free.collective_s, strict=True)]
        assert longer == pytest.approx(told, rel=1e-6, abs=1e-12)
        assert max(free.collective_s) < 1e-7
        sent += sum(slow.collective_s)
    assert sent > 0
