"""Shardings at several prices of memory: what is kept, all strategies tried, plans that need one."""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from choices import ETHERNET, NVLINK, PCIE, at_random, gpus
from helpers import cpus
from threads import grouped, one_stage
from torch import nn

import graphpar
from graphpar.cluster import Cluster
from graphpar.cost import LinkCost
from graphpar.cost_models import sharding as programmes
from graphpar.cost_models.group_times import ShardingOptions, TensorGroup
from graphpar.cost_models.kept import kept_of
from graphpar.cost_models.mesh_times import MeshTimes
from graphpar.cost_models.sharding import Sharding, ShardingProgramme, choose_sharding
from graphpar.errors import InfeasibleError
from graphpar.groups import modes as group_modes
from graphpar.groups.candidates import candidate_groups
from graphpar.groups.modes import with_group_modes
from graphpar.groups.settings import group_options
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, Ways
from graphpar.ir.strategies import strategies_of, value_of
from graphpar.ir.text import parse_graph
from graphpar.partition.answers import Solved
from graphpar.partition.problems import ShardingProblem
from graphpar.partition.sharding.solve import solve_sharding
from graphpar.partition.types import MOST_LEAN, Replica
from graphpar.planner import price
from graphpar.plans.check import group_contradictions
from graphpar.plans.diff import Change, diff_plans
from graphpar.preparation import prepare
from graphpar.runtime.reference import EagerModel
from graphpar.training import Training
from graphpar.verify import train_on_one_device
from graphpar.view.build import view_of

ADAM = Training(optimizer=partial(torch.optim.Adam, lr=0.01))


class Block(nn.Module):
    """A perceptron behind a norm, beside what goes past it, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        width, inner = 16, 48
        self.enter, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        result: torch.Tensor = x.sin().square().mean()
        return result


_OF_WEIGHTS = ("TBackward0", "_LateWeightBackward")


class Watch:
    """Counts storages that autograd keeps, but for weights and inputs."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []  # or a place might be used twice

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    def hooks(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.grad_fn is not None and type(tensor.grad_fn).__name__ not in _OF_WEIGHTS:
            self.alive.append(tensor)
            self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


@pytest.mark.parametrize("seed", range(6))
def test_what_members_keep_is_what_autograd_keeps(seed: int) -> None:
    """However ops are computed, as a part of what one device keeps."""
    model, data = Block(), (torch.randn(32, 8, 16),)
    prepared = prepare(model, data, {}, ADAM)
    graph = one_stage(prepared.graph)
    choice = at_random(graph, (0.5, 0.5), seed)
    whole, own = Watch(), Watch()
    with whole.hooks():
        model(*data)
    grouped(model, prepared, choice, 2, data, {}, watched=own.hooks)
    times = MeshTimes(graph, gpus(2, PCIE), ShardingOptions(samples=32))
    sharding = Sharding(choice.chosen, choice.forms, choice.weights)
    ops = [op for op in graph.ops if op.name in choice.chosen]
    members = kept_of(graph, sharding, times, ops, ())
    assert own.num_bytes == pytest.approx(sum(kept.share for kept in members) * whole.num_bytes, rel=0.02)


class Plain(nn.Module):
    """Few enough ops to try every strategy of each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.up(x).relu()).relu().sum()
        return result


Numbers = npt.NDArray[np.float64]


class Every:
    """Seconds, bytes held and kept of every way to share a chain of ops; an axis for each choice."""

    def __init__(self, graph: Graph, group: TensorGroup, options: ShardingOptions) -> None:
        self.times = MeshTimes(graph, group, options)
        ways = {
            name: [Ways((s,)) for s in rows] for name, rows in strategies_of(graph, group.shares).items()
        }
        held: dict[str, list[Layouts]] = {}
        for op in graph.sources("parameter"):
            (reader,) = graph.users(op.name)
            wanted = (w.operands[reader.operands().index(op.name)] for w in ways[reader.name])
            held[op.name] = list(dict.fromkeys([("whole",), *(w for w in wanted if w[0] not in TEXTS)]))
        self.axes = [*ways, *held]
        self.seconds, self.held, self.kept = self._on((), 0.0), self._on((), 0.0), self._on((), 0.0)
        for name, rows in ways.items():
            op = graph[name]
            self.seconds = self.seconds + self._on((name,), [self.times.seconds(op, w) for w in rows])
            self.kept = self.kept + self._on((name,), [self.times.kept_bytes(op, w) for w in rows])
            for slot, read in enumerate(op.operands()):
                source, index = value_of(graph, read)
                made = [w.results[index] for w in ways.get(source, ())] or held.get(source, [("whole",)])
                sent, sent_by = self.times.conversions(
                    graph[read], made, [w.operands[slot] for w in rows]
                )
                table = self.times.sending_seconds(graph[read], sent)[sent_by]
                named = source in self.axes
                self.seconds = self.seconds + self._on(
                    (source, name) if named else (name,), table if named else table[0]
                )
        for name, layouts in held.items():
            op = graph[name]
            steps = [self.times.optimizer_seconds(op, layout) for layout in layouts]
            self.seconds = self.seconds + self._on((name,), steps)
            own = [self.times.weight_bytes(op, layout) for layout in layouts]
            self.held = self.held + self._on((name,), own)

    def _on(self, names: tuple[str, ...], values: object) -> Numbers:
        """Values along the axes of some choices."""
        found = np.array(values, dtype=np.float64)
        order = sorted(range(len(names)), key=lambda k: self.axes.index(names[k]))
        sizes = iter(found.transpose(order).shape)
        return found.transpose(order).reshape([next(sizes) if axis in names else 1 for axis in self.axes])


TEXTS = ("whole", "copied", "first", "partial", "disjoint")


@pytest.mark.parametrize("link", [NVLINK, PCIE, ETHERNET], ids=["nvlink", "pcie", "ethernet"])
def test_no_strategy_does_better_in_as_little_memory(link: LinkCost) -> None:
    """Under a limit, and at every price, what was chosen is the best of all, and so is its bound."""
    with torch.device("meta"):
        model, x = Plain(), torch.zeros(2, 2048, 64)
    prepared = prepare(model, (x,), {}, ADAM)
    graph, group = one_stage(prepared.graph), gpus(2, link)
    free = replace(group_options(prepared.graph, True), samples=2, hold_factor=0.0)
    every = Every(graph, group, free)
    total = every.held + every.kept
    seen = set()
    for part in (0.0, 0.2, 0.5, 1.0):
        limit = float(np.ceil((1 - part) * total.min() + part * total.max())) + 1
        found = choose_sharding(graph, 0, prepared.chain, group, replace(free, memory_bytes=limit))
        best_s = every.seconds[total <= limit].min()
        assert found.objective_s == pytest.approx(best_s, rel=1e-4)
        assert found.bound_s == pytest.approx(best_s, rel=1e-4)
        seen.add(round(1e6 * found.objective_s))
    assert len(seen) > 1, "the limit never bound"
    prices = [group_options(prepared.graph, True, lean=lean) for lean in range(MOST_LEAN + 1)]
    programme = ShardingProgramme.of(graph, 0, prepared.chain, group, replace(prices[0], samples=2))
    for asked in prices:
        sharding = programme.solve(replace(asked, samples=2))
        dear = asked.hold_factor * every.held + asked.keep_factor * every.kept
        best_s = (every.seconds + dear / link.bytes_per_s).min()
        assert sharding.objective_s == pytest.approx(best_s, rel=1e-4)
        assert sharding.bound_s == pytest.approx(best_s, rel=1e-4)


def test_a_sharding_that_is_not_proven_is_said_and_a_small_one_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.device("meta"):
        model, x = Plain(), torch.zeros(2, 2048, 64)
    prepared = prepare(model, (x,), {}, ADAM)
    graph, group = one_stage(prepared.graph), gpus(2, NVLINK)
    options = replace(group_options(prepared.graph, True), samples=2)
    limits = []

    def cut_short(problem: ShardingProblem, *, time_limit_s: float) -> Solved[list[int]]:
        limits.append(time_limit_s)
        found = solve_sharding(problem, time_limit_s=time_limit_s)
        return replace(found, status="feasible", gap=0.06)

    monkeypatch.setattr(programmes, "solve_sharding", cut_short)
    with pytest.warns(UserWarning, match="not be the fastest way: proven within 6 %"):
        choose_sharding(graph, 0, prepared.chain, group, options)
    assert len(limits) == 2
    assert limits[1] > limits[0]


class Beside(nn.Module):
    """A perceptron behind a norm, beside what goes past it: one unit that keeps all of it, and a loss."""

    def __init__(self, width: int = 512, inner: int = 2048) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, inner),
            nn.Linear(inner, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (x + self.down(nn.functional.gelu(self.up(self.norm(x))))).square().mean()
        return result


def test_a_plan_takes_a_leaner_sharding_where_only_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample: neither replicas nor stages nor computing again would need less."""
    with torch.device("meta"):
        model, x = Beside(), torch.zeros(1, 4096, 512)

    def planned(memory_bytes: float) -> graphpar.Plan:
        devices = {"kind": "h100-sxm-80gb", "count": 2, "memory_bytes": int(memory_bytes)}
        node = {"name": "a", "devices": devices, "link": "pcie4-x16"}
        return graphpar.plan(model, {"nodes": [node]}, (x,), train=ADAM, tensor="auto")

    roomy = planned(1.4e9)
    (peak_bytes,) = set(roomy.partition.peak_bytes.values())
    tight = planned(peak_bytes - 1e6)
    replicas = [plan.partition.pipelines[0].stages[0].replicas[0] for plan in (roomy, tight)]
    assert [r.width for r in replicas] == ["2", "2"] and replicas[0].lean == 0 < replicas[1].lean
    assert max(tight.partition.peak_bytes.values()) < peak_bytes - 1e6
    assert tight.partition.objective_s > roomy.partition.objective_s and tight.partition.gap <= 0.0101
    assert "members hold less and take longer" in " ".join(str(tight).split())
    told = f"members hold less (price of memory {replicas[1].lean})"
    assert [stage.sharing for plan in (roomy, tight) for stage in view_of(plan).stages] == [(), (told,)]
    assert Change("price of memory", "none", str(replicas[1].lean)) in diff_plans(roomy, tight).changes
    tight.save(tmp_path / "plan.json")
    assert graphpar.Plan.load(tmp_path / "plan.json") == tight
    for wrong in (Replica("a/0", 1, lean=1), replace(replicas[1], lean=MOST_LEAN + 1)):
        assert any("lean" in problem for problem in group_contradictions("here", wrong))
    monkeypatch.setattr(group_modes, "_may_lack_memory", lambda table, mode: False)
    with pytest.raises(InfeasibleError):
        planned(peak_bytes - 1e6)


def test_memory_that_the_update_alone_lacks_asks_for_leaner_shardings() -> None:
    """Of a single sample little is kept; Adam on a GPU makes one more value for every gradient."""
    train = Training(optimizer=torch.optim.Adam, loss=nn.functional.mse_loss)
    with torch.device("meta"):
        layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
        prepared = prepare(layers, (torch.zeros(1, 512), torch.zeros(1, 512)), {}, train)
    two = Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb", "count": 2}]})
    table = price(prepared, two, train=train, calibration=None)
    (usual,) = with_group_modes(table, prepared.graph, two, candidate_groups(two, 2), train=train).modes
    weights = sum(usual.costs[kind].weight_bytes[0] for kind in table.units)
    (kind,) = table.device_classes
    lacking = []
    for times, update_share in ((5.1, 1.0), (4.9, 1.0), (4.9, 0.0)):
        memory_bytes = table.reserved_bytes + times * weights
        small = replace(kind, memory_bytes=memory_bytes, update_share=update_share)
        lacking.append(group_modes._may_lack_memory(replace(table, device_classes=(small,)), usual))
    assert lacking == [False, True, False]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_under_a_leaner_plan_has_the_numbers_of_one_device(tmp_path: Path) -> None:
    """Two workers with less memory than the usual sharding takes; the plan comes from its file."""
    torch.manual_seed(0)
    model, x = Beside(256, 1024), torch.randn(1, 1024, 256)
    adam = Training(optimizer=partial(torch.optim.Adam, lr=0.01, eps=1e-3))

    def planned(memory_bytes: float) -> tuple[Cluster, graphpar.Plan]:
        where = cpus(2, memory_bytes=int(memory_bytes))
        return where, graphpar.plan(model, where, (x,), train=adam, tensor="auto", measure_s=0)

    _, roomy = planned(8e9)
    where, tight = planned(max(roomy.partition.peak_bytes.values()) - 1e5)
    leans = [p.partition.pipelines[0].stages[0].replicas[0].lean for p in (roomy, tight)]
    assert leans[0] == 0 < leans[1]
    tight.save(tmp_path / "plan.json")
    plan = graphpar.Plan.load(tmp_path / "plan.json")
    with graphpar.compile(model, where, (x,), train=adam, plan=plan) as job:
        losses = [float(job.step(x)) for _ in range(3)]
        state = job.state_dict()
    reference = EagerModel(model, adam)
    assert losses == pytest.approx(list(train_on_one_device(reference, adam, (x,), {}, 3)), rel=1e-5)
    for name, tensor in reference.model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("width", "samples"), [(8, 16), (1 << 32, 4), (1 << 30, 16), (1 << 31, 8)])
def test_few_samples_are_enough_only_where_they_are_large(width: int, samples: int) -> None:
    """A quarter of the batch, up to 64 GiB of results, but four samples at least."""
    graph = parse_graph(f"""graph lowered "Wide" batch=64
%x = input("x") : float32[B,{width}]
%output = output((%x,))
""")
    assert group_options(graph, training=True).samples == samples
