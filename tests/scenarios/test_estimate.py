"""What `graphpar estimate` counts is what a plan for that device counts."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

import graphpar
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.partition.baselines import one_device
from graphpar.planner import price
from graphpar.precision import uniform_formats
from graphpar.preparation import prepare
from graphpar.scenarios.estimate import _fits, _table, estimate

BATCH = 4


@pytest.mark.parametrize("training", [True, False])
def test_the_total_is_the_peak_of_a_plan_with_one_sample_per_microbatch(training: bool) -> None:
    train = graphpar.Training(optimizer=torch.optim.AdamW) if training else None
    with torch.device("meta"):
        model = GPT(width=64, layers=2, heads=2, length=64)
        ids, targets = example_inputs(BATCH, 64)
    prepared = prepare(model, (ids,), {"targets": targets}, train)
    cluster = Cluster.from_dict({"devices": [{"kind": "a100-sxm-80gb"}]})
    found = {(e.format, e.recompute): e for e in estimate(prepared, train, ["t4"])}
    for name, precision in (("float32", "float32"), ("bfloat16 mixed", "bfloat16")):
        formats = uniform_formats(cluster, precision, len(prepared.chain.units))
        table = price(prepared, cluster, train=train, calibration=None, formats=formats)
        alone = one_device(table, schedule="gpipe" if train is None else "1f1b", microbatches=BATCH)
        (peak,) = alone.peak_bytes.values()
        assert found[name, False].total_bytes == pytest.approx(peak, rel=1e-6), name


def test_a_table_that_is_also_the_head_is_counted_in_both_stages() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(4000, 64)
            self.inner = torch.nn.Linear(64, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(self.table(ids)).relu() @ self.table.weight.T
            return out

    train = graphpar.Training(optimizer=torch.optim.AdamW, loss=lambda out, _: out.square().mean())
    ids = torch.zeros(2, 8, dtype=torch.long)
    table = _table(prepare(Tied(), (ids, ids), {}, train), train, "float32")
    assert table.repeated
    assert _least(table) > _least(replace(table, repeated=()))


def _least(table: CostTable) -> float:
    """The least memory on which two stages fit."""
    low, high = 0.0, 1e12
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(table, middle, 2) else (middle, high)
    return high


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_few_tokens_need_most_memory_in_the_update_which_plans_and_stages_count(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    train = graphpar.Training(optimizer=optimizer)
    model = GPT(width=64, layers=2, heads=2, length=8)
    ids, targets = example_inputs(1, 8)
    prepared = prepare(model, (ids,), {"targets": targets}, train)
    found = next(e for e in estimate(prepared, train, []) if e.format == "float32" and not e.recompute)
    assert found.update_bytes > found.activations_bytes + found.workspace_bytes
    table = _table(prepared, train, "float32")
    assert _fits(table, found.total_bytes + 1, 1)
    assert not _fits(table, found.total_bytes - 1, 1)
    (peak,) = one_device(table, schedule="1f1b", microbatches=1).peak_bytes.values()
    assert found.total_bytes == pytest.approx(peak, rel=1e-9)
    assert _update_peak_bytes(model, optimizer) == pytest.approx(found.update_bytes, rel=0.01)


def _update_peak_bytes(model: torch.nn.Module, kind: type[torch.optim.Optimizer]) -> float:
    """What torch has at most besides, in an update of all tensors together as GPUs make it."""
    optimizer = kind(model.parameters(), foreach=True)  # type: ignore[call-arg]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        optimizer.step()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return float(max(accumulate(size for _, size in changes)))
