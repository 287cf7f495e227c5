"""A model as a chain of units."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_device import Calls
from torch import Tensor, nn

from graphpar.ir.chain import build_chain, crossings, free_ops, writes_buffer, written_buffers
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES
from graphpar.ir.text import parse_graph, parse_op
from graphpar.preparation import prepare


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class Net(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.place = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def graph_of(blocks: int) -> Graph:
    return prepare(Net(blocks), (torch.randint(0, 11, (4, 5)),), {}, None).graph


def core_ops(graph: Graph, free: frozenset[str]) -> list[str]:
    skipped = (*SOURCES, "output")
    return [op.name for op in graph.ops if op.target not in skipped and op.name not in free]


def test_equal_blocks_fold_to_equal_kinds() -> None:
    graph = graph_of(4)
    chain = build_chain(graph)
    names = [unit.name for unit in chain.units]
    assert len(set(names)) == len(names)
    by_block = {
        number: [u.kind for u in chain.units if u.name.startswith(f"blocks.{number}")]
        for number in range(4)
    }
    assert by_block[1] == by_block[2] and by_block[1]
    inner = {kind for number in (1, 2) for kind in by_block[number]}
    assert len({unit.kind for unit in chain.units}) <= len(inner) + 4


def test_units_in_order_are_all_core_ops() -> None:
    graph = graph_of(3)
    chain = build_chain(graph)
    assert [name for unit in chain.units for name in unit.ops] == core_ops(graph, chain.free)


def test_positions_and_labels_are_free() -> None:
    graph = graph_of(2)
    free = free_ops(graph)
    targets = {graph[name].target for name in free}
    assert "aten.arange.default" in targets
    assert not any(graph[name].attr("grad") for name in free)


def test_values_cross_forward_only() -> None:
    graph = graph_of(3)
    chain = build_chain(graph)
    unit_of = chain.unit_of()
    for crossing in crossings(graph, chain):
        assert crossing.source < crossing.target
        assert unit_of[crossing.name] == crossing.source
        assert max(unit_of.get(u.name, 0) for u in graph.users(crossing.name)) == crossing.target


CHAINED = """graph captured "N" batch=2
%x = input("x") : float32[B,4]
%w = parameter("a.weight") : float32[4,4] {grad=true}
%b = buffer("count") : float32[4]
"""


def test_no_cut_between_a_tuple_and_its_parts() -> None:
    graph = parse_graph(
        CHAINED
        + """%h = aten.linear.default(%x, %w) : float32[B,4]
%s = aten.split.Tensor(%h, 2, 1) : (float32[B,2], float32[B,2])
%p = getitem(%s, 0) : float32[B,2]
%i = aten.linear.default(%p, %w) : float32[B,4]
%j = aten.linear.default(%i, %w) : float32[B,4]
%q = getitem(%s, 1) : float32[B,2]
%k = aten.linear.default(%q, %w) : float32[B,4]
%y = aten.add.Tensor(%j, %k) : float32[B,4]
%output = output((%y,))
"""
    )
    unit_of = build_chain(graph).unit_of()
    assert unit_of["s"] == unit_of["p"] == unit_of["q"]


def test_ops_on_a_written_buffer_stay_together() -> None:
    graph = parse_graph(
        CHAINED
        + """%h = aten.linear.default(%x, %w) : float32[B,4]
%v = aten.select.int(%b, 0, 0) : float32[]
%i = aten.linear.default(%h, %w) : float32[B,4]
%u = aten.copy_.default(%v, %b) : float32[]
%j = aten.linear.default(%i, %w) : float32[B,4]
%r = aten.add.Tensor(%j, %b) : float32[B,4]
%y = aten.linear.default(%r, %w) : float32[B,4]
%output = output((%y,))
"""
    )
    assert written_buffers(graph) == {"b"}
    chain = build_chain(graph)
    unit_of = chain.unit_of()
    assert unit_of["v"] == unit_of["u"] == unit_of["r"]
    assert "v" not in chain.free


@pytest.mark.parametrize(
    ("text", "writes"),
    [
        ("%y = aten.batch_norm.default(%x, none, none, %m, %v, true, 0.1, 1e-05, false)", True),
        ("%y = aten.batch_norm.default(%x, none, none, %m, %v, false, 0.1, 1e-05, false)", False),
        ("%y = aten.batch_norm.default(%x, none, none, none, none, true, 0.1, 1e-05, false)", False),
        ("%y = aten.instance_norm.default(%x, none, none, %m, %v, true, 0.1, 1e-05, false)", True),
        ("%y = aten.instance_norm.default(%x, none, none, none, none, true, 0.1, 1e-05, false)", False),
        ("%y = aten.add_.Tensor(%x, 1)", True),
        ("%y = aten.add.Tensor(%x, 1)", False),
        ("%y = aten.__and__.Tensor(%x, %m)", False),
        ('%y = input("y_")', False),
    ],
)
def test_which_ops_write_buffers(text: str, writes: bool) -> None:
    assert writes_buffer(parse_op(text)) is writes


def test_a_model_of_free_ops_alone_is_one_chain_all_the_same() -> None:
    graph = parse_graph(
        'graph captured "N" batch=2\n%x = input("x") : float32[B]\n'
        "%y = aten.neg.default(%x) : float32[B]\n%output = output((%y,))\n"
    )
    chain = build_chain(graph)
    assert [unit.ops for unit in chain.units] == [("y",)] and not chain.free
    empty = graph.with_ops([graph["x"]])
    assert build_chain(empty).units == ()


STEPS = ("linear", "add", "split", "relu", "mask", "joined")


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_units_cover_random_graphs_in_order(steps: list[tuple[str, int]]) -> None:
    lines, values = [CHAINED], ["x"]
    for number, (step, back) in enumerate(steps):
        a, b, name = values[-1], values[-1 - back % len(values)], f"n{number}"
        kind = "float32[B,4]"
        if step == "linear":
            lines.append(f"%{name} = aten.linear.default(%{a}, %w) : {kind} {{grad=true}}\n")
        elif step == "split":
            lines.append(f"%{name}s = aten.split.Tensor(%{a}, 4, 1) : ({kind})\n")
            lines.append(f"%{name} = getitem(%{name}s, 0) : {kind}\n")
        elif step == "mask":
            lines.append(f"%{name}m = aten.gt.Scalar(%x, 0) : bool[B,4]\n")
            lines.append(f"%{name} = aten.mul.Tensor(%{a}, %{name}m) : {kind}\n")
        else:
            lines.append(f"%{name} = aten.add.Tensor(%{a}, %{b}) : {kind}\n")
        values.append(name)
    graph = parse_graph("".join(lines) + f"%output = output((%{values[-1]},))\n")
    chain = build_chain(graph)
    assert [name for unit in chain.units for name in unit.ops] == core_ops(graph, chain.free)
    unit_of = chain.unit_of()
    for op in graph.ops:
        if op.is_tuple and op.name in unit_of:
            assert {unit_of[u.name] for u in graph.users(op.name)} <= {unit_of[op.name]}
    names = [unit.name for unit in chain.units]
    assert len(set(names)) == len(names)


def test_a_written_view_of_a_buffer_in_a_model_is_seen() -> None:
    def remember(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        s.buffer[0] = h.detach()[0]
        return (h * s.buffer[0]).sum()

    prepared = prepare(Calls(remember), (torch.randn(4, 4), torch.zeros(4)), {}, None)
    assert {str(prepared.graph[n].args[0]) for n in written_buffers(prepared.graph)} == {"buffer"}
    assert "updates a buffer" in prepared.batch_reason


@settings(max_examples=20)
@given(st.lists(st.sampled_from([4, 8, 8, 16, 64]), min_size=3, max_size=8))
def test_a_few_layers_in_a_row_may_be_cut_between_any_two(widths: list[int]) -> None:
    with torch.device("meta"):
        layers = [t for a, b in pairwise(widths) for t in (nn.Linear(a, b), nn.ReLU())]
        model, batch = nn.Sequential(*layers[:-1]), torch.empty(6, widths[0])
    assert len(prepare(model, (batch,), {}, None).chain.units) == len(widths) - 1
