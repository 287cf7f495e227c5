"""Members whose collectives would not meet are found before anything runs."""

from typing import Any

import pytest
import torch
from helpers import Line, force
from torch import nn

from graphpar.errors import VerifyError
from graphpar.groups import sharing as tensor_groups
from graphpar.ir.graph import Graph
from graphpar.ir.ops import Ref
from graphpar.ir.strategies import strategies_of
from graphpar.ir.text import parse_graph
from graphpar.passes.members import member_stages
from graphpar.passes.shard import Shard, _Member
from graphpar.runtime.team_calls import check_in_step, team_calls

GRAPH = """graph lowered "Twice" batch=4
%x = input("x") : float32[B,4]
%w = parameter("w") : float32[4,4] {grad=true}
%a = aten.neg.default(%w) : float32[4,4] {grad=true, stage=0}
%y = aten.linear.default(%x, %a) : float32[B,4] {grad=true, stage=0}
%z = aten.linear.default(%x, %w) : float32[B,4] {grad=true, stage=0}
%s = aten.add.Tensor(%y, %z) : float32[B,4] {grad=true, stage=0}
%t = aten.sum.default(%s) : float32[] {grad=true, stage=0}
%output = output((%t,))
"""


def by_samples() -> tuple[Graph, Shard]:
    """Each member takes some of the samples; a weight is read as a copy and, by %a, whole."""
    graph = parse_graph(GRAPH)
    table = strategies_of(graph, (0.5, 0.5))
    chosen = {n: next(s for s in table[n] if s.samples) for n in ("y", "z", "s", "t")}
    return graph, Shard(0, 0, {"a": table["a"][0], **chosen})


def test_calls_in_forward_and_backward() -> None:
    graph, shard = by_samples()
    stages = member_stages(lambda member: graph, shard, 2, True)
    check_in_step(stages, 0, training=True)
    calls = [team_calls(stage, 0, training=True) for stage in stages]
    assert [(c.phase, c.kind) for c in calls[0]] == [("forward", "sum"), ("backward", "sum")]
    assert len(team_calls(stages[1], 0, training=False)) == 1


def test_a_member_without_a_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a weight that is cut off from its gradient has none, and would not be summed."""
    monkeypatch.setattr(
        _Member,
        "_silent",
        lambda self, name: self._derived(name, "values", "aten.detach.default", (Ref(name),), grad=False),
    )
    graph, shard = by_samples()
    stages = member_stages(lambda member: graph, shard, 2, True)
    with pytest.raises(VerifyError, match=r"wait for ever(.|\n)*member 1: nothing more"):
        check_in_step(stages, 0, training=True)


def test_unlike_cuts_are_found() -> None:
    """Members of two shardings: both exchange something, but not the same."""
    graph, shard = by_samples()
    other = Shard(0, 0, {n: strategies_of(graph, (0.5, 0.5))[n][0] for n in ("a", "y", "z", "s", "t")})
    stages = [
        member_stages(lambda member: graph, how, 2, True)[k] for k, how in enumerate((shard, other))
    ]
    with pytest.raises(VerifyError, match="Call 1 differs"):
        check_in_step(stages, 0, training=True)


def test_no_job_starts_with_members_out_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_one_alone(graph_of: Any, shard: Shard, size: int, *how: Any) -> list[Graph]:
        return [*member_stages(graph_of, shard, size, *how)[:-1], graph_of(size - 1)]

    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))
    job = force(model, (torch.randn(4, 64),), lines=(Line((1,), 2, groups=((0.5, 0.5),)),), train=None)
    monkeypatch.setattr(tensor_groups, "member_stages", last_one_alone)
    with pytest.raises(VerifyError, match="do not ask the same"):
        job.start()
