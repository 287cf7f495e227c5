"""What a unit that is computed again sends a second time is what its price holds."""

from collections import Counter

import pytest
import threads
import torch
from choices import planned
from test_bytes import Blocks, Shape
from test_rewriting import TRAINING
from threads import grouped, one_stage

from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import OpTimes, ShardingOptions, TensorGroup
from graphpar.cost_models.sharding import Sharding
from graphpar.cost_models.tensor_modes import computed_again, sent_again
from graphpar.ir.conversions import conversion
from graphpar.preparation import prepare
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
    times = OpTimes(graph, group, ShardingOptions(samples=4))
    sharding = Sharding(choice.chosen, choice.forms, choice.weights)
    priced = 0
    for unit in prepared.chain.units:
        ops = [graph[name] for name in unit.ops if graph[name].target != "getitem"]
        again = computed_again(graph, ops, times)
        for name, made, wanted in sent_again(sharding, graph, ops, again):
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
