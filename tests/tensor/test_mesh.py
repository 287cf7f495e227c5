"""Tensor groups of two axes: planned, running, saved; their prices against an independent programme."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from choices import FREE, PCIE, gpus
from helpers import TRAINING, Line, check_training, force
from test_groups import Mlp, Words, batch, check_saved, sentences
from test_two_axes import block
from threads import one_stage
from torch import nn

import graphpar
from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import OpTimes, ShardingOptions, TensorGroup
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.sharding import choose_sharding, least_seconds
from graphpar.errors import PlanError
from graphpar.groups.candidates import candidate_groups, meshes_of, widest_group
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Ways
from graphpar.ir.strategies import Strategy, StrategyTables, strategies_of
from graphpar.partition.types import Replica, TensorWidth
from graphpar.plans.check import group_contradictions
from graphpar.plans.plan import Plan
from graphpar.preparation import lower
from graphpar.training import Training

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from mesh_programme import Mesh, MeshProgramme

WISHES: tuple[TensorWidth, ...] = (4, (2, 2), "auto")
EVEN, UNEVEN = (0.25,) * 4, (0.35, 0.35, 0.15, 0.15)
ADAM = Training(optimizer=partial(torch.optim.AdamW, lr=0.01, eps=1e-3), max_grad_norm=0.3)


@pytest.fixture
def free_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that cost nothing, so that small models are cut wherever they can be."""
    monkeypatch.setattr(TensorGroup, "seconds", lambda self, name, num_bytes: 0.0)
    monkeypatch.setattr(OpTimes, "host_seconds", lambda self, name, num_bytes: 0.0)


def test_its_programme_is_that_of_the_benchmark() -> None:
    """Six samples for four members: neither cuts samples."""
    prepared = block(False)
    options = ShardingOptions(samples=6, state_ratio=6.0, cuts_batch=False)
    group = gpus(4, PCIE, mesh=(2, 2))
    found = choose_sharding(one_stage(prepared.graph), 0, prepared.chain, group, options)
    seconds, _ = MeshProgramme(prepared, Mesh((2, 2)), PCIE, options).solve(inf)
    assert found.objective_s == pytest.approx(seconds, rel=1e-5)
    assert found.bound_s == pytest.approx(found.objective_s, rel=1e-5)


class Heads(nn.Module):
    """Attention of two heads, then a perceptron: four members have no four heads to share."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 2, -1).transpose(1, 2) for t in self.mix(x).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(batch, length, width))
        result: torch.Tensor = (x + self.down(nn.functional.gelu(self.up(x)))).square().mean()
        return result


FOUR = {"kind": "h100-sxm-80gb", "count": 4}
SGD = Training(optimizer=torch.optim.SGD)


def best(model: nn.Module, batch: torch.Tensor, tensor: TensorWidth, link: str, **more: Any) -> Plan:
    """The plan for a node of four devices."""
    node = {"name": "a", "devices": FOUR, "link": link}
    plan = graphpar.plan(model, {"nodes": [node]}, (batch,), train=SGD, tensor=tensor, **more)
    assert plan.partition.gap <= 0.0101
    return plan


def mesh_in(plan: Plan) -> tuple[int, ...]:
    """The mesh of the plan's first group."""
    return plan.partition.pipelines[0].stages[0].replicas[0].mesh


def test_the_planner_takes_a_mesh_where_it_is_faster(tmp_path: Path) -> None:
    """Asked for or not, with its bound, in the file and on the page; else it is that of one axis."""
    with torch.device("meta"):
        model, x = Heads(), torch.zeros(1, 2048, 1024)
    one, two, auto = (best(model, x, tensor, "nvlink4") for tensor in WISHES)
    assert two.partition.objective_s < 0.95 * one.partition.objective_s
    assert auto.partition.objective_s == two.partition.objective_s
    assert mesh_in(two) == mesh_in(auto) == (2, 2)
    assert "tensor group of 2 x 2 a/0 & a/1" in str(two)
    two.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == two
    assert two.partition.shardings[0].inner is not None
    one, two, auto = (best(model, x, tensor, "pcie3") for tensor in WISHES)
    assert "tensor=(2, 2): groups of two axes were considered; none" in " ".join(two.notes)
    assert one.partition.objective_s == two.partition.objective_s == auto.partition.objective_s
    assert mesh_in(two) == mesh_in(auto) == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_stock_blocks_take_a_mesh_where_it_is_faster(name: str) -> None:
    """Two heads for four devices; on a slow link no group is worth its while."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {
        "vocab_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 1024,
        "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False,
    }  # fmt: skip
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    with torch.device("meta"):
        model = (
            hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **off))
            if name == "gpt2"
            else hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=4096, **sizes))
        )
        ids = torch.zeros(1, 2048, dtype=torch.long)
    more: dict[str, Any] = {"kwargs": {"labels": ids}}
    one, auto = (best(model, ids, tensor, "nvlink4", **more) for tensor in (4, WISHES[2]))
    assert auto.partition.objective_s < 0.95 * one.partition.objective_s and mesh_in(auto) == (2, 2)
    one, auto = (best(model, ids, tensor, "pcie3", **more) for tensor in (4, WISHES[2]))
    assert auto.partition.objective_s == one.partition.objective_s and mesh_in(auto) == ()


def test_a_mesh_that_cannot_pay_is_not_priced_and_the_plan_says_so() -> None:
    """Devices that compute so slowly that nothing else counts, which one axis divides as well."""
    slow = {"name": "slow", "peak_flops_per_s": {"float32": 1e8}, "memory_bytes": 1e11,
            "memory_bytes_per_s": 1e12}  # fmt: skip
    batch = torch.zeros(8, 512), torch.zeros(8, dtype=torch.long)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
    train = Training(optimizer=torch.optim.SGD, loss=nn.functional.cross_entropy)
    node = {"name": "a", "devices": {"kind": slow, "count": 4}, "link": "nvlink4"}
    for tensor, told in zip(WISHES, (False, False, True), strict=True):
        plan = graphpar.plan(model, {"nodes": [node]}, batch, train=train, tensor=tensor)
        assert ("tensor groups of 2 x 2 were not priced" in " ".join(plan.notes)) == told
        assert "equal blocks of a stage shared in one way" in plan.partition.family


@pytest.mark.parametrize("link", [FREE, PCIE], ids=["free", "pcie"])
def test_what_a_mesh_takes_at_least(link: LinkCost) -> None:
    """A bound for any link; where sending is free, what the programme finds is near."""
    prepared = block(False)
    graph = one_stage(prepared.graph)
    # Six samples make uneven parts for four members.
    for mesh, samples in (((), 8), ((2, 2), 8), ((), 6), ((2, 2), 3)):
        group, options = gpus(4, link, mesh=mesh), ShardingOptions(samples=samples)
        found = choose_sharding(graph, 0, prepared.chain, group, options)
        least_s = least_seconds(graph, 0, prepared.chain, group, options)
        assert least_s <= found.objective_s * (1 + 1e-6)
        assert (least_s > 0.7 * found.objective_s) == (link == FREE)
        assert least_s == pytest.approx(sum(cheapest(graph, group, options)))
        # Of strategies with equal shares, of which samples make other parts, any may come last.
        turned = least_seconds(graph, 0, prepared.chain, group, options, Backwards(graph))
        assert turned == pytest.approx(least_s)


class Backwards(StrategyTables):
    """Every op's strategies in the other order."""

    def of(self, shares: Sequence[float]) -> dict[str, tuple[Strategy, ...]]:
        return {name: rows[::-1] for name, rows in super().of(shares).items()}


def cheapest(graph: Graph, group: TensorGroup, options: ShardingOptions) -> Iterator[float]:
    """What each op takes at least, every pair of strategies tried."""
    times = MeshTimes(graph, group, options)
    along = [group.along(axis) for axis in range(len(group.axes))]
    tables = [strategies_of(graph, each.shares) for each in along]
    for name in tables[0]:
        rows = (
            [s for s in table[name] if options.samples >= each.size or not s.samples]
            for table, each in zip(tables, along, strict=True)
        )
        yield min(sum(times.parts(graph[name], Ways(ways))) for ways in product(*rows))


def test_wishes_that_make_no_mesh() -> None:
    four = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": 4}]})
    for wrong in ((1, 4), (2, 2, 2), (2,), (2, True)):
        with pytest.raises(ValueError, match="two numbers"):
            widest_group(four, wrong)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no node has more than 4"):
        assert widest_group(four, (2, 4)) == 4
    with pytest.warns(UserWarning, match="tensor=4, but no node has two devices; there are no groups"):
        assert widest_group(Cluster.of("g5.xlarge", 3), 4) == 1
    assert not any(group.mesh for group in candidate_groups(four, 4, [(2, 4)]))
    node = {"name": "n", "devices": {"kind": "h100-sxm-80gb", "count": 8}, "link": "nvlink4"}
    found = candidate_groups(Cluster.from_dict({"nodes": [node]}), 8, meshes_of("auto", 8))
    assert [group.width for group in found] == ["2", "4", "8", "2x2", "2x4"]
    two_kinds = [{"kind": "a100-sxm-80gb", "count": 2}, {"kind": "h100-sxm-80gb", "count": 2}]
    unlike = Cluster.from_dict({"nodes": [{"name": "n", "devices": two_kinds, "link": "nvlink3"}]})
    (mesh_of_both,) = (group for group in candidate_groups(unlike, 4, [(2, 2)]) if group.mesh)
    fast, slow = mesh_of_both.shares[3], mesh_of_both.shares[0]
    assert mesh_of_both.shares == (slow, slow, fast, fast) and fast > 1.5 * slow
    kinds = [("a100-sxm-80gb", 2), ("h100-sxm-80gb", 4)], [("a100-sxm-80gb", 4), ("h100-sxm-80gb", 2)]
    uneven = [
        {"name": name, "devices": [{"kind": k, "count": n} for k, n in node], "link": "nvlink3"}
        for name, node in zip("nm", kinds, strict=True)
    ]
    both = Cluster.from_dict({"nodes": uneven, "network": "ethernet-25g"})
    assert len({group.shares for group in candidate_groups(both, 6, [(3, 2)]) if group.mesh}) == 2
    for mesh, shares in (((2, 3), ()), ((4, 1), ()), ((2, 2), (0.4, 0.2, 0.2, 0.2))):
        replica = Replica("a", 1, ("b", "c", "d"), shares, mesh)
        assert list(group_contradictions("here", replica)), mesh


@pytest.mark.distributed
def test_training_and_checkpoints(tmp_path: Path, free_links: None) -> None:
    """Slices of slices with Adam, clipping and dropout; saved whole, read by one device and back."""
    model, data = Words(0.2), sentences()
    meshed = force(model, data, lines=(Line((1,), 2, groups=(UNEVEN,), meshes=((2, 2),)),), train=ADAM)
    with meshed.start() as job:
        cut = [c for p in job._trained_on.placements for c in p.slices.values() if c.rows is not None]
        assert len(cut) >= 4
        check_saved(job, meshed, data, tmp_path)


MESH = Line((1,), 2, groups=(EVEN,), meshes=((2, 2),))
CASES: dict[str, Mapping[str, Any]] = {
    "then a slow device": {"lines": (Line((1, 1), 2, None, (1,), (UNEVEN, ()), meshes=((2, 2), ())),)},
    "beside one axis": {"lines": (
        Line((1,), 1, 4, None, (EVEN,), meshes=((2, 2),)), Line((1,), 1, 4, None, ((0.6, 0.4),)))},
    "two by three": {"lines": (Line((1,), 1, None, None, ((1 / 6,) * 6,), meshes=((2, 3),)),)},
    "two meshes, divided state": {
        "lines": (Line((2,), 2, None, None, (EVEN,), meshes=((2, 2),)),), "train": ADAM, "zero": 2},
    "computed again": {"lines": (MESH,), "recompute": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mesh_that_auto_chose_gives_the_numbers_of_one_device(free_links: None) -> None:
    torch.manual_seed(0)
    model, x = Heads(128), torch.randn(1, 256, 128)
    sgd = Training(optimizer=partial(torch.optim.SGD, lr=0.1))
    cpus = {"devices": [{"kind": "cpu", "count": 4}]}
    with graphpar.compile(model, cpus, (x,), train=sgd, tensor="auto") as job:
        assert mesh_in(job.plan) == (2, 2)
        losses = [float(job.step(x)) for _ in range(3)]
        state = job.state_dict()
    optimizer = sgd.optimizer(model.parameters())
    expected = []
    for _ in range(3):
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", CASES.values(), ids=CASES.keys())
def test_with_others(how: Mapping[str, Any], free_links: None) -> None:
    check_training(Mlp(0.2), batch(), **how)


def test_a_plan_that_does_not_fit_is_refused(free_links: None) -> None:
    """Edited, or made for an optimiser that steps slices: either would train otherwise, in silence."""
    forced = force(Words(), sentences(), lines=(MESH,))
    found, (sharding,) = forced.plan.partition, forced.plan.partition.shardings
    ways = tuple(replace(w, results=("whole",) * len(w.results)) for w in sharding.strategies)
    needs_whole = Training(optimizer=partial(torch.optim.Adafactor, lr=0.01))
    for other, train, said in (
        (sharding, TRAINING, ""),
        (sharding, needs_whole, "Adafactor needs whole parameters"),
        (replace(sharding, strategies=ways), TRAINING, "a way for .* cannot take"),
        (replace(sharding, inner=None), TRAINING, "of the sharding 1, of the group 2"),
    ):
        edited, where = replace(found, shardings=(other,)), forced.cluster
        with pytest.raises((ValueError, PlanError), match=said) if said else nullcontext():
            lower(forced.prepared.graph, edited, True, cluster=where, train=train)
