"""What `graphpar estimate` counts is what a plan for that device counts."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, combinations, pairwise

import pytest
import torch

import graphpar
from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.partition.handmade import Tried, one_device
from graphpar.partition.pipeline_price import price as price_of_plan
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.planner import price
from graphpar.precision.formats import uniform_formats
from graphpar.preparation import prepare
from graphpar.scenarios.estimate import _fewest, _fits, _table, estimate, in_bfloat16

BATCH = 4


class Normed(torch.nn.Module):
    """A convolution whose batch goes in step, with a buffer of whole numbers and an island of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.last = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.last(self.norm(self.first(x)).relu().mean((2, 3)))
        return torch.nn.functional.cross_entropy(x.float(), targets)


def _language(batch: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    return (GPT(width=64, layers=2, heads=2, length=64), *example_inputs(batch, 64))


def _pictures(batch: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    return Normed(), torch.randn(batch, 3, 16, 16), torch.zeros(batch, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "training", "samples"),
    [(_language, True, 1), (_language, False, 1), (_pictures, True, BATCH)],
)
def test_the_total_is_the_peak_of_a_plan_with_the_smallest_microbatches(
    make: Callable[[int], tuple[torch.nn.Module, torch.Tensor, torch.Tensor]],
    training: bool,
    samples: int,
) -> None:
    train = graphpar.Training(optimizer=torch.optim.AdamW) if training else None
    with torch.device("meta"):
        model, given, targets = make(BATCH)
    prepared = prepare(model, (given,), {"targets": targets}, train)
    half = in_bfloat16(model, (given,), {"targets": targets}, train)
    cluster = Cluster.from_dict({"devices": [{"kind": "a100-sxm-80gb"}]})
    found = {(e.format, e.recompute): e for e in estimate(prepared, train, ["t4"], half)}
    for name, run, precision in (
        ("float32", prepared, "float32"),
        ("bfloat16 mixed", prepared, "bfloat16"),
        ("bfloat16", half, "float32"),
    ):
        formats = uniform_formats(cluster, precision, len(run.chain.units))
        table = price(run, cluster, train=train, calibration=None, formats=formats)
        alone = one_device(table, Tried("gpipe" if train is None else "1f1b", BATCH // samples))
        (peak,) = alone.peak_bytes.values()
        assert found[name, False].total_bytes == pytest.approx(peak, rel=1e-6), name
        assert found[name, False].samples == samples
    whole, lower = (found[name, False].weights_bytes for name in ("float32", "bfloat16"))
    held = sum(b.numel() * b.element_size() for b in model.buffers() if not b.is_floating_point())
    assert lower - held / 2 == pytest.approx(whole / 2)


def test_no_pipeline_of_fewer_devices_fits() -> None:
    batch = 3  # fewer than stages, so that the first ones hold no more than these
    train = graphpar.Training(optimizer=torch.optim.AdamW)
    with torch.device("meta"):
        model = GPT(width=64, layers=2, heads=2, length=512)
        ids, targets = example_inputs(batch, 512)
    prepared = prepare(model, (ids,), {"targets": targets}, train)
    cluster = Cluster.from_dict({"devices": [{"kind": "a100-sxm-80gb", "count": 8}]})
    table, alone = (
        price(prepared, cluster, train=train, calibration=None),
        _table(prepared, train, "float32"),
    )
    units = table.num_units
    assert 4 <= units <= 8
    least = []
    for stages in range(1, units + 1):
        # All ways to cut a pipeline of so many stages, priced as plans are.
        peaks = [
            _peak(table, (0, *cuts, units), batch) for cuts in combinations(range(1, units), stages - 1)
        ]
        least.append(min(peaks) - (table.reserved_bytes - alone.reserved_bytes if stages == 1 else 0))
    for capacity in sorted({p + d for p in least for d in (-1, 1)}):
        fitting = [n for n, peak in enumerate(least, 1) if peak <= capacity]
        assert _fewest(alone, capacity) == min(fitting, default=0)


def _peak(table: CostTable, cuts: tuple[int, ...], batch: int) -> float:
    stages = tuple(
        StageChoice(a, b, (Replica(f"local/{i}", batch),)) for i, (a, b) in enumerate(pairwise(cuts))
    )
    return max(price_of_plan(table, [PipelineChoice(batch, batch, stages)], "1f1b").peak_bytes.values())


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
    (peak,) = one_device(table, Tried("1f1b", 1)).peak_bytes.values()
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
