"""Stages of a lowered graph as torch modules, stamped for microbatch sizes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from graphpar.errors import VerifyError
from graphpar.ir.graph import Graph
from graphpar.ir.text import parse_graph
from graphpar.passes.comm import InsertMessages
from graphpar.passes.place import Place
from graphpar.rewrite import Pipeline
from graphpar.runtime.lower import Message, StageBuilder, interface, stage_ops
from graphpar.runtime.prologue import Prologue
from graphpar.runtime.random import StepContext

CPU = torch.device("cpu")
TWO_STAGES = """graph captured "N" batch=4
%x = input("x") : float32[B,6]
%w = parameter("a.weight") : float32[6,6] {grad=true}
%v = parameter("b.weight") : float32[6,6] {grad=true}
%b = buffer("shift") : float32[6]
%c = constant("c_0") : float32[]
%m = aten.gt.Scalar(%x, 0.0) : bool[B,6]
%h = aten.linear.default(%x, %w) : float32[B,6] {grad=true}
%d = gp.dropout(%h, 0.5, false, stream=0, layout=(1, 1)) : float32[B,6] {grad=true}
%g = aten.mul.Tensor(%d, %m) : float32[B,6] {grad=true}
%i = aten.linear.default(%g, %v) : float32[B,6] {grad=true}
%r = aten.reshape.default(%i, (2*B, 3)) : float32[2*B,3] {grad=true}
%s = aten.split.Tensor(%r, 2, 1) : (float32[2*B,2], float32[2*B,1]) {grad=true}
%p = getitem(%s, 0) : float32[2*B,2] {grad=true}
%k = aten.mul.Tensor(%m, %b) : float32[B,6]
%t = aten.sum.dim_IntList(%p, (0, 1), dtype=dtype:float32) : float32[] {grad=true}
%u = aten.sum.default(%k) : float32[]
%a = aten.add.Tensor(%t, %u) : float32[] {grad=true}
%e = aten.mul.Tensor(%a, %c) : float32[] {grad=true}
%y = aten.div.Tensor(%e, batch:6) : float32[] {grad=true}
%output = output((%y, %x))
"""


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter
    return {
        "a.weight": parameter(torch.randn(6, 6, generator=generator)),
        "b.weight": parameter(torch.randn(6, 6, generator=generator)),
        "shift": torch.arange(6.0),
        "c_0": torch.tensor(2.0),
    }


def lowered(stages: tuple[int, ...] | None = None) -> Graph:
    graph = parse_graph(TWO_STAGES)
    passes = Pipeline((Place(stages or (0, 1)), InsertMessages()))
    return passes.run(graph)[0]


def builder(graph: Graph, stage: int, held: dict[str, Tensor], context: StepContext) -> StageBuilder:
    return StageBuilder(graph, stage, held, CPU, context)


def test_the_interface_says_what_goes_in_and_out() -> None:
    graph = lowered()
    first, second = interface(graph, 0), interface(graph, 1)
    assert first.inputs == ("x",) and second.inputs == ("x",)
    assert first.tensors == {"parameter": ("a.weight",), "buffer": (), "constant": ()}
    assert second.tensors == {"parameter": ("b.weight",), "buffer": ("shift",), "constant": ("c_0",)}
    (sent,), (received,) = first.sends, second.receives
    assert sent.tag == received.tag == 0 and sent.stage == 1 and received.stage == 0
    assert sent.has_gradient and received.has_gradient
    assert not first.receives and not second.sends and not first.results
    assert [place for place, _ in second.results] == [0, 1]
    assert isinstance(sent, Message)


def test_stages_one_after_the_other_are_the_whole() -> None:
    held, x = tensors(), torch.randn(4, 6)
    whole_graph = lowered((0, 0))
    context = StepContext(seed=3, batch=4, samples=4)
    module = builder(whole_graph, 0, held, context).module(4, 4)
    _, (wanted, same) = module(x)
    graph = lowered()
    first, second = (builder(graph, stage, held, context) for stage in (0, 1))
    (crossing,), nothing = first.module(4, 4)(x)
    _, (got, _) = second.module(4, 4)(x, crossing)
    assert nothing == () and torch.equal(same, x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)])
def test_any_microbatch_sizes_add_up(sizes: tuple[int, ...]) -> None:
    held, x = tensors(), torch.randn(4, 6)
    context = StepContext(seed=3, batch=4)
    stage = builder(lowered((0, 0)), 0, held, context)
    context.samples = 4
    wanted = stage.module(4, 4)(x)[1][0]
    total, first = torch.zeros(()), 0
    for size in sizes:
        context.first_sample, context.samples = first, size
        total = total + stage.module(size, 4)(x[first : first + size])[1][0]
        first += size
    torch.testing.assert_close(total, wanted)


def test_modules_are_built_once_for_each_size_on_the_same_tensors() -> None:
    held = tensors()
    stage = builder(lowered((0, 0)), 0, held, StepContext())
    assert stage.module(2, 4) is stage.module(2, 4)
    assert stage.module(2, 4) is not stage.module(2, 6)
    module = stage.module(2, 4)
    assert isinstance(module, fx.GraphModule)
    assert {id(p) for p in module.parameters()} == {id(held["a.weight"]), id(held["b.weight"])}
    assert {id(b) for b in module.buffers()} == {id(held["shift"]), id(held["c_0"])}


def test_only_the_stages_own_ops_and_sources() -> None:
    names = {op.name for op in stage_ops(lowered(), 0)}
    assert {"x", "w", "h", "d"} <= names and not names & {"v", "b", "i", "y"}


def test_an_operator_this_torch_lacks_is_named() -> None:
    graph = lowered((0, 0))
    strange = [
        op if op.name != "h" else replace(op, target="aten.frobnicate.default") for op in graph.ops
    ]
    with pytest.raises(VerifyError, match=r"Op %h calls aten.frobnicate.default.*Plan again"):
        builder(graph.with_ops(strange), 0, tensors(), StepContext()).module(4, 4)


def test_devices_dtypes_and_formats_are_stamped() -> None:
    graph = parse_graph(
        """graph lowered "N" batch=2
%x = input("x") : float32[B,3,2,2]
%z = aten.zeros.default((B, 2), dtype=dtype:int64, device=device:cuda:0) : int64[B,2] {stage=0}
%f = aten.full.default((), inf, dtype=dtype:float64, device=device:meta) : float64[] {stage=0}
%c = aten.clone.default(%x, memory_format=memory_format:channels_last) : float32[B,3,2,2] {stage=0}
%r = gp.random("normal", (B, 2), "float64", stream=1, layout=(1, 1)) : float64[B,2] {stage=0}
%n = aten.add.Tensor(%f, batch:3) : float64[] {stage=0}
%output = output((%z, %f, %c, %r, %n))
"""
    )
    stage = builder(graph, 0, {}, StepContext(batch=7, samples=5))
    _, (zeros, full, copied, noise, number) = stage.module(5, 7)(torch.randn(5, 3, 2, 2))
    assert zeros.shape == (5, 2) and zeros.dtype == torch.int64 and zeros.device == CPU
    assert full.dtype == torch.float64 and float(full) == float("inf")
    assert copied.is_contiguous(memory_format=torch.channels_last)
    assert noise.shape == (5, 2) and noise.dtype == torch.float64
    assert float(number) == float("inf")


def test_a_prologue_runs_on_the_whole_batch() -> None:
    graph = parse_graph(
        """graph captured "N" batch=2
%x = input("x") : int64[B]
%v = aten.ne.Scalar(%x, -100) : bool[B]
%s = aten.sum.default(%v) : int64[]
%w = gp.whole_batch(%s) : int64[]
%y = aten.div.Tensor(%x, %w) : float32[B]
%output = output((%y,))
"""
    )
    prologue = Prologue.of(graph, {})
    assert prologue is not None
    values = prologue.run({"x": torch.tensor([1, -100, 3, -100])}, 4)
    assert list(values) == ["whole:w"] and int(values["whole:w"]) == 2
    assert Prologue.of(parse_graph(TWO_STAGES), {}) is None
