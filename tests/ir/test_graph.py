"""Graphs and ops as values."""

import networkx as nx
import pytest

from graphpar.errors import VerifyError
from graphpar.ir.graph import Graph
from graphpar.ir.ops import BatchSize, Op, Ref, TensorType, map_arguments
from graphpar.ir.text import parse_graph
from graphpar.ir.whole import prologue, whole_batch_names

X = Op("x", "input", ("x",), types=(TensorType((BatchSize(), 2), "float32"),))
Y = Op("y", "aten.mul.Tensor", (Ref("x"), Ref("x")), types=X.types)
OUT = Op("output", "output", ((Ref("y"),),))


def test_two_ops_of_one_name_are_refused() -> None:
    with pytest.raises(VerifyError, match=r"Two ops are named %x in graph 'N'"):
        Graph([X, X], level="captured", name="N")


@pytest.mark.parametrize("ops", [[Y, X], [Op("y", "f", (Ref("y"),))], [Op("y", "f", ((Ref("gone"),),))]])
def test_reading_what_is_not_defined_before_is_refused(ops: list[Op]) -> None:
    with pytest.raises(VerifyError, match=r"Op %y .* not defined before it"):
        Graph(ops, level="captured")


def test_edges_keep_operand_positions() -> None:
    graph = Graph([X, Y, OUT], level="captured")
    assert list(graph.nx.edges(keys=True)) == [("x", "y", 0), ("x", "y", 1), ("y", "output", 0)]
    assert graph.users("x") == (Y,) and graph.output == OUT and "x" in graph and "z" not in graph
    assert graph.position == {"x": 0, "y": 1, "output": 2}


def test_a_graph_cannot_be_changed() -> None:
    graph = Graph([X, Y, OUT], level="captured")
    with pytest.raises(nx.NetworkXError):
        graph.nx.remove_node("x")


def test_equality_sees_everything() -> None:
    graph = Graph([X, Y, OUT], level="captured", name="N", batch=2, aliases={"a": ("b",)})
    assert graph == Graph(graph.ops, level="captured", name="N", batch=2, aliases={"a": ("b",)})
    assert graph != Graph(graph.ops, level="captured", name="N", batch=3, aliases={"a": ("b",)})
    assert graph != Graph(graph.ops, level="captured", name="N", batch=2)
    assert graph != graph.with_ops(graph.ops, level="placed")
    assert graph != graph.with_ops([X, Y.with_attrs(grad=True), OUT])
    assert graph != "graph"


def test_arguments_and_attributes_of_an_op() -> None:
    op = Op("z", "f", (Ref("x"), (1, Ref("y"))), (("dim", Ref("x")), ("p", 0.5)))
    assert op.operands() == ("x", "y", "x")
    assert map_arguments(op, {"x": "w"}).operands() == ("w", "y", "w")
    assert op.argument(7, "p") == 0.5 and op.argument(1, "p") == (1, Ref("y"))
    assert op.with_attrs(stage=1, grad=True).attrs == (("grad", True), ("stage", 1))


def test_sizes_of_a_type() -> None:
    kind = TensorType((BatchSize(3), 4), "bfloat16")
    assert (kind.sizes(2), kind.numel(2), kind.bytes(2), kind.batch_dims) == ((6, 4), 24, 48, (0,))


def test_the_prologue_computes_whole_batch_values_only() -> None:
    graph = parse_graph(
        """graph captured "N" batch=2
%x = input("x") : int64[B]
%w = parameter("w") : float32[B]
%m = aten.sum.default(%x) : int64[]
%n = gp.whole_batch(%m) : int64[]
%d = aten.div.Tensor(%w, %n) : float32[B]
%s = aten.sum.default(%x, dtype=dtype:float32) : float32[]
%t = aten.add.Tensor(%s, %n) : float32[]
%u = gp.whole_batch(%t) : float32[]
%e = aten.div.Tensor(%d, %u) : float32[B]
%output = output((%e,))
"""
    )
    part = prologue(graph)
    assert part is not None
    assert [op.name for op in part.ops] == ["x", "m", "n", "s", "t", "output"]
    assert part["n"].target == "aten.alias.default"
    assert part.output.operands() == ("m", "t")
    assert whole_batch_names(graph) == ("whole:n", "whole:u")
    assert prologue(graph.with_ops([X, Y, OUT])) is None
