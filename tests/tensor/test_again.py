"""What a unit that is computed again computes and sends a second time is what its price holds."""

from collections import Counter
from typing import Any

import pytest
import threads
import torch
from choices import planned
from test_bytes import Blocks, Shape
from test_rewriting import TRAINING
from threads import grouped, one_stage
from torch.utils._python_dispatch import TorchDispatchMode

from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.again import run_again
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.sharding import Sharding
from graphpar.cost_models.tensor_modes import computed_again, sent_again
from graphpar.ir.conversions import conversion
from graphpar.ir.optable import packet
from graphpar.preparation import prepare
from graphpar.runtime.lower import StageBuilder
from graphpar.runtime.random import StepContext
from graphpar.runtime.reference import OneDevice
from graphpar.runtime.team_calls import TeamCall


def cpus() -> TensorGroup:
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu", "count": 2, "threads": 1}]})
    return TensorGroup(cluster.devices, (0.5, 0.5), LinkCost(1e-5, 1e9))


@pytest.mark.parametrize("keys", [4, 2], ids=["gpt", "llama"])
def test_collectives_made_again(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than the unit has: torch stops where nothing more is needed, and so does the price."""
    shape = Shape(32, 4, keys, 128, 64, 4)
    model = Blocks(shape, 2)
    batch = torch.randn(4, 64, 32), torch.randn(4, 64, 32)
    prepared = prepare(model, batch, {}, TRAINING)
    group = cpus()
    choice = planned(prepared, group, ShardingOptions(samples=4, hold_factor=1e6, cuts_batch=False))
    graph = one_stage(prepared.graph)
    times = MeshTimes(graph, group, ShardingOptions(samples=4))
    sharding = Sharding(choice.chosen, choice.forms, choice.weights)
    priced = 0
    for unit in prepared.chain.units:
        ops = [graph[name] for name in unit.ops if graph[name].target != "getitem"]
        again = computed_again(graph, ops, times)
        for name, (made,), (wanted,) in sent_again(sharding, graph, ops, again):
            op = graph[name]
            how = conversion(made, wanted, bool(op.attr("grad")), op.target == "parameter")
            priced += how is not None and how.forward is not None
    seen: list[tuple[int, int]] = []

    def count(made: list[str], calls: tuple[TeamCall, ...], samples: int) -> None:
        phases = Counter(call.phase for call in calls)
        seen.append((len(made) - phases["forward"] - phases["backward"], phases["again"]))

    monkeypatch.setattr(threads, "check_calls", count)
    grouped(model, prepared, choice, 2, batch, {}, again=True)
    assert seen[0] == seen[1]
    assert seen[0][0] == priced and 0 < priced < seen[0][1]


KERNELS = {
    "mm": "linear", "addmm": "linear", "gelu": "gelu", "silu": "silu", "native_layer_norm": "layer_norm",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
}  # fmt: skip


class Called(TorchDispatchMode):
    """Counts the kernels that a context launches, by the op that they stand for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in KERNELS:
            self.count[KERNELS[name]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keys", [4, 2], ids=["gpt", "llama"])
def test_kernels_launched_again(keys: int) -> None:
    """All of a unit but its last product: that one kept its operands before torch stopped."""
    shape = Shape(32, 4, keys, 128, 64, 4)
    model = Blocks(shape, 2)
    batch = torch.randn(4, 64, 32), torch.randn(4, 64, 32)
    prepared = prepare(model, batch, {}, TRAINING)
    graph = one_stage(prepared.graph)
    units = tuple(unit.ops for unit in prepared.chain.units)
    counts = []
    for again in ((), units):
        device = OneDevice(model, prepared.captured, graph, prepared.graph, 0)
        context = StepContext(seed=0, batch=4, samples=4)
        builder = StageBuilder(graph, 0, device.tensors, torch.device("cpu"), context, recompute=again)
        _, (loss,) = builder.module(4, 4)(*batch)
        with Called() as called:
            loss.backward()
        counts.append(called.count)
    layout = find_layout(graph)
    priced: Counter[str] = Counter()
    for unit in units:
        works = {name: work_of(graph[name], graph, layout, 4) for name in unit}
        priced.update(packet(graph[name]) for name in run_again(graph, works))
    counted = set(KERNELS.values())
    assert counts[1] - counts[0] == Counter({k: n for k, n in priced.items() if k in counted})
    assert 0 < priced["linear"] < sum(op.target == "aten.linear.default" for op in graph.ops)
