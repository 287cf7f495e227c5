"""What crosses between stages: tensors, no numbers made of them, and no marks of ops that made them."""

from itertools import combinations_with_replacement

import pytest

from graphpar.ir.text import parse_graph
from graphpar.passes.comm import InsertMessages
from graphpar.passes.place import place_ops

GRAPH = parse_graph("""graph captured "N" batch=2
%x = input("x") : float32[B,4]
%c = input("c") : int64[]
%k = aten.neg.default(%c) : int64[]
%n = aten.item.default(%k)
%h = aten.mul.Tensor(%x, %n) : float32[B,4]
%i = aten.mul.Tensor(%h, %n) : float32[B,4]
%y = aten.mul.Tensor(%i, %n) : float32[B,4]
%output = output((%y,))
""")


@pytest.mark.parametrize("stages", list(combinations_with_replacement(range(3), 3)))
def test_each_stage_makes_its_own_number(stages: tuple[int, int, int]) -> None:
    where = dict(zip(["h", "i", "y"], stages, strict=True)) | {"k": 0, "n": 0}
    placed = GRAPH.with_ops(place_ops(GRAPH, where, "place"), level="placed")
    lowered = InsertMessages().run(placed)
    assert all(op.makes_tensor for op in lowered.ops if op.target in ("gp.send", "gp.recv"))
    numbers = {op.name: op.attr("stage") for op in lowered.ops if op.target == "aten.item.default"}
    assert sorted(str(stage) for stage in numbers.values()) == sorted({str(s) for s in stages})
    for name in ("h", "i", "y"):
        read = next(o for o in lowered[name].operands() if o in numbers)
        assert numbers[read] == lowered[name].attr("stage")


def test_a_message_is_no_place_where_parts_of_the_batch_meet() -> None:
    graph = parse_graph("""graph placed "N" batch=2
%x = input("x") : float32[B,4]
%m = aten.sum.dim_IntList(%x, (0,)) : float32[4] {stage=0}
%t = gp.sum_parts(%m) : float32[4] {meets=true, samples="shared", stage=0}
%y = aten.sub.Tensor(%x, %t) : float32[B,4] {samples="sample", stage=1}
%output = output((%y,))
""")
    lowered = InsertMessages().run(graph)
    assert [op.name for op in lowered.ops if op.attr("meets")] == ["t"]
    messages = [op for op in lowered.ops if op.target in ("gp.send", "gp.recv")]
    assert [op.attr("samples") for op in messages] == ["shared", "shared"]
