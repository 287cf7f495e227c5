"""What the passes of a tensor group write, as text, and what fused collectives compute."""

import pytest
import torch
from threads import ThreadTeam, in_threads
from torch import nn

from graphpar.ir.conversions import COLLECTIVES, conversion
from graphpar.ir.graph import Graph
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, strategies_of
from graphpar.ir.text import format_op, parse_graph
from graphpar.passes.fuse import FuseComm
from graphpar.passes.shard import Shard
from graphpar.runtime.overlap import SumTogether
from graphpar.runtime.team_calls import team_calls

PERCEPTRON = parse_graph("""graph lowered "Perceptron" batch=2
%x = input("x") : float32[B,4]
%g = parameter("g") : float32[4] {grad=true}
%up = parameter("up") : float32[6,4] {grad=true}
%down = parameter("down") : float32[4,6] {grad=true}
%bias = parameter("bias") : float32[4] {grad=true}
%n = aten.mul.Tensor(%x, %g) : float32[B,4] {grad=true, stage=0}
%h = aten.linear.default(%n, %up) : float32[B,6] {grad=true, stage=0}
%a = aten.relu.default(%h) : float32[B,6] {grad=true, stage=0}
%y = aten.linear.default(%a, %down, %bias) : float32[B,4] {grad=true, stage=0}
%unread = aten.neg.default(%a) : float32[B,6] {grad=true, stage=0}
%output = output((%y,))
""")
SHARDED = """
%n = aten.mul.Tensor(%x, %g) : float32[B,4] {grad=true, stage=0}
%n__copied = gp.copy_to_group(%n) : float32[B,4] {grad=true, stage=0} from(%n) by("shard")
%h = aten.linear.default(%n__copied, %up) : float32[B,2] {grad=true, stage=0} from(%h) by("shard")
%a = aten.relu.default(%h) : float32[B,2] {grad=true, stage=0} from(%a) by("shard")
%y = aten.linear.default(%a, %down) : float32[B,4] {grad=true, stage=0}
%unread = aten.neg.default(%a) : float32[B,2] {grad=true, stage=0} from(%unread) by("shard")
%y__whole = gp.all_reduce(%y) : float32[B,4] {grad=true, stage=0} from(%y) by("shard")
"""
FUSED = """
%n = aten.mul.Tensor(%x, %g)
%n__copied_begun = gp.begin(%n, "gp.copy_to_group", owned=(false, true))
%up_late_h = gp.late_weight(%up)
%down_late_y = gp.late_weight(%down)
%n__copied = gp.end(%n__copied_begun)
%h = gp.late_product(%n__copied, %up_late_h, none, true)
%a = aten.relu.default(%h)
%y = gp.late_product(%a, %down_late_y, none, true)
%y__whole = gp.all_reduce(%y, owned=(true, false))
"""


def second_member(graph: Graph) -> Graph:
    """Columns 4 and 2, then rows, as the member without the bias has them."""
    table = strategies_of(graph, (2, 1))

    def wanted(name: str, result: str) -> Strategy:
        return next(s for s in table[name] if result in str(s).split(" -> ")[1])

    chosen = {n: wanted(n, "dim1:4/2") for n in ("h", "a", "unread")} | {"y": wanted("y", "partial")}
    weights: dict[str, Layout] = {"up": Split(0, (4, 2)), "down": Split(1, (4, 2))}
    return Shard(0, 1, chosen, weights=weights).run(graph)


def lines(graph: Graph, types: bool = True) -> str:
    """The computing ops."""
    text = [format_op(op) for op in graph.ops if op.attr("stage") is not None]
    return "\n" + "\n".join(t if types else t.split(" : ")[0] for t in text) + "\n"


def test_what_shard_writes() -> None:
    assert lines(second_member(PERCEPTRON)) == SHARDED


def test_what_fuse_comm_writes() -> None:
    fused = FuseComm(0, True).run(second_member(PERCEPTRON))
    assert lines(fused, types=False) == FUSED
    alone = FuseComm(0, False).run(second_member(PERCEPTRON))
    assert "late" not in lines(alone) and "begin" not in lines(alone), "nothing is sent in backward"


def test_a_collective_begins_before_what_does_not_need_it() -> None:
    """Two branches that read one value: the first one's sum travels while the second computes."""
    graph = parse_graph("""graph lowered "Branches" batch=2
%x = input("x") : float32[B,4]
%v = parameter("v") : float32[4,4]
%w = parameter("w") : float32[4,4]
%a = aten.linear.default(%x, %v) : float32[B,4] {stage=0}
%b = aten.linear.default(%x, %w) : float32[B,4] {stage=0}
%s = gp.all_reduce(%a) : float32[B,4] {stage=0}
%y = aten.add.Tensor(%s, %b) : float32[B,4] {stage=0}
%output = output((%y,))
""")
    names = [op.name for op in FuseComm(0, False).run(graph).ops]
    assert names[3:] == ["a", "s_begun", "b", "s", "y", "output"]


def test_small_sums_in_one_message() -> None:
    graph = parse_graph("""graph lowered "Sums" batch=2
%x = input("x") : float32[B,4]
%a = aten.neg.default(%x) : float32[B,4] {stage=0}
%s = gp.all_reduce(%a) : float32[B,4] {stage=0}
%b = aten.abs.default(%x) : float32[B,4] {stage=0}
%t = gp.all_reduce(%b) : float32[B,4] {stage=0}
%y = aten.add.Tensor(%s, %t) : float32[B,4] {stage=0}
%u = gp.all_reduce(%y) : float32[B,4] {stage=0}
%output = output((%u,))
""")
    text = lines(FuseComm(0, False).run(graph), types=False).strip().split("\n")
    assert text == [
        "%a = aten.neg.default(%x)",
        "%b = aten.abs.default(%x)",
        '%s_together = gp.sum_together((%a, %b), "gp.all_reduce")',
        "%s = getitem(%s_together, 0)",
        "%t = getitem(%s_together, 1)",
        "%y = aten.add.Tensor(%s, %t)",
        "%u = gp.all_reduce(%y, owned=(false, false))",
    ]


@pytest.mark.parametrize("target", ["gp.all_reduce", "gp.reduce_copies", "gp.copy_to_group"])
def test_sums_together_are_the_sums(target: str) -> None:
    ahead, behind = COLLECTIVES[target]
    values = [(torch.randn(3), torch.randn(2, 2)) for _ in range(2)]

    def work(team: ThreadTeam) -> list[torch.Tensor]:
        own = [nn.Parameter(v.clone()) for v in values[team.member]]
        made = SumTogether(team, target)(own, target)
        (made[0].sum() * (team.member + 1) + made[1].sum() * 3).backward()
        return [*(m.detach() for m in made), *(p.grad for p in own if p.grad is not None)]

    for member, got in enumerate(in_threads(2, work)):
        for k, value in enumerate(values[member]):
            torch.testing.assert_close(got[k], values[0][k] + values[1][k] if ahead else value)
        first = 3.0 if behind else member + 1.0
        torch.testing.assert_close(got[2], torch.full((3,), first))
        torch.testing.assert_close(got[3], torch.full((2, 2), 6.0 if behind else 3.0))


def test_every_conversion_tells_what_it_sends() -> None:
    layouts: list[Layout] = ["whole", "copied", "partial", "disjoint", Split(0, (1, 1)), Split(1, (2, 1))]
    for made in layouts:
        for wanted in layouts:
            how = conversion(made, wanted, True)
            if how is not None and how.target in COLLECTIVES:
                assert (how.forward, how.backward) == COLLECTIVES[how.target]


@pytest.mark.parametrize("width", [4, 1 << 14])
def test_a_sum_of_the_other_axis_ends_a_message_whatever_its_size(width: int) -> None:
    """Members of a line have slices of unlike size of it, and must decide alike on their own sums."""
    graph = parse_graph(f"""graph lowered "Lines" batch=2
%x = input("x") : float32[B,4]
%z = input("z") : float32[B,{width}]
%p = aten.neg.default(%x) : float32[B,4] {{stage=0}}
%q = aten.neg.default(%z) : float32[B,{width}] {{stage=0}}
%r = aten.exp.default(%x) : float32[B,4] {{stage=0}}
%p__whole = gp.all_reduce(%p, axis=0) : float32[B,4] {{stage=0}}
%q__whole = gp.all_reduce(%q, axis=1) : float32[B,{width}] {{stage=0}}
%r__whole = gp.all_reduce(%r, axis=0) : float32[B,4] {{stage=0}}
%output = output((%p__whole, %q__whole, %r__whole))
""")
    calls = team_calls(FuseComm(0, False).run(graph), 0, training=False)
    assert [(call.axis, len(call.types)) for call in calls] == [(0, 1), (1, 1), (0, 1)]
