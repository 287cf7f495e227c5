"""What single ops make of values per sample, said on graph text."""

import pytest
import torch
from one_device import Calls, assert_as_eager, ready
from torch import Tensor

from graphpar.ir.graph import Graph
from graphpar.ir.text import format_op, parse_graph
from graphpar.passes.batch import AnalyseBatch, mixing_reason
from graphpar.passes.canonicalize import Canonicalize
from graphpar.runtime.executor import StepResult
from graphpar.runtime.merge import merge_results
from graphpar.runtime.program import StepReport

HEAD = """graph captured "N" batch=6
%x = input("x") : float32[B,4,2]
%i = input("i") : int64[B]
%w = parameter("w") : float32[4,2] {grad=true}
%t = parameter("t") : float32[9,4] {grad=true}
%u = aten.select.int(%x, 1, 0) : float32[B,2]
%r = aten.repeat.default(%i, (2,)) : int64[2*B]
%n = aten.repeat_interleave.self_int(%i, 2, 0) : int64[2*B]
%a = aten.arange.default(B) : int64[B]
%e = constant("e") : float32[0]
%h = aten.mul.Tensor(%x, %w) : float32[B,4,2]
%p = aten.sum.dim_IntList(%h, (0,)) : float32[4,2]
%l = aten.sum.default(%h) : float32[]
%k = aten.sum.default(%x) : float32[]
%g = parameter("g") : float32[2,2]
%c = constant("c") : int64[4]
%ut = aten.transpose.int(%u, 0, 1) : float32[2,B]
%xt = aten.transpose.int(%x, 0, 1) : float32[4,B,2]
%q = aten.matmul.default(%x, %x) : float32[B,2,2]
%v = input("v") : float32[B,2,3]
%f = input("f") : int64[2*B]
%o = aten.arange.start_step(0, 2*B, 2) : int64[B]
%rows = aten.view.default(%x, (4*B, 2)) : float32[4*B,2]
%best = aten.argsort.default(%x, 1) : int64[B,4,2]
%best1 = aten.select.int(%best, 2, 0) : int64[B,4]
%best2 = aten.view.default(%best1, (4*B,)) : int64[4*B]
%first = aten.mul.Tensor(%a, 4) : int64[B]
%first1 = aten.unsqueeze.default(%first, 1) : int64[B,1]
%sum = aten.add.Tensor(%best1, %first1) : int64[B,4]
%placed = aten.view.default(%sum, (4*B,)) : int64[4*B]
%loose = aten.add.Tensor(%i, %first) : int64[B]
%every = aten.arange.default(4*B) : int64[4*B]
"""
CASES: list[tuple[str, str, int]] = [
    ("%y = aten.add.Tensor(%x, %w) : float32[B,4,2]", "sample", 1),
    ("%y = aten.view.default(%x, (4*B, 2)) : float32[4*B,2]", "sample", 1),
    ("%y = aten.view.default(%x, (8*B,)) : float32[8*B]", "sample", 1),
    ("%y = aten.transpose.int(%x, 0, 1) : float32[4,B,2]", "sample", 1),
    ("%y = aten.view.default(%x, (2, 2*B, 2)) : float32[2,2*B,2]", "mixed", 1),
    ("%y = aten.add.Tensor(%r, %n) : int64[2*B]", "mixed", 1),
    ("%y = aten.add.Tensor(%r, %r) : int64[2*B]", "sample", 2),
    ("%y = aten.add.Tensor(%n, %n) : int64[2*B]", "sample", 1),
    ("%y = aten.cat.default((%u, %u)) : float32[2*B,2]", "sample", 2),
    ("%y = aten.cat.default((%u, %u), 1) : float32[B,4]", "sample", 1),
    ("%y = aten.cat.default((%e, %u), 1) : float32[B,2]", "sample", 1),
    ("%y = aten.stack.default((%u, %u)) : float32[2,B,2]", "sample", 1),
    ("%y = aten.add.Tensor(%a, 1) : int64[B]", "mixed", 1),
    ("%y = aten.index.Tensor(%x, (%a, %i)) : float32[B,2]", "sample", 1),
    ("%y = aten.index.Tensor(%x, (%i, %i)) : float32[B,2]", "mixed", 1),
    ("%y = aten.index.Tensor(%t, (%i,)) : float32[B,4]", "sample", 1),
    ("%y = aten.index.Tensor(%t, (%a,)) : float32[B,4]", "mixed", 1),
    ("%y = aten.index.Tensor(%t, (%r, %n)) : float32[2*B]", "mixed", 1),
    ("%y = aten.slice.Tensor(%t, 0, 0, B) : float32[B,4]", "mixed", 1),
    ("%y = aten.slice.Tensor(%x, 1, 0, B) : float32[B,4,2]", "mixed", 1),
    ("%y = aten.slice.Tensor(%x, 0, 0, B) : float32[B,4,2]", "sample", 1),
    ("%y = aten.slice.Tensor(%x, 0, 0, 3) : float32[3,4,2]", "mixed", 1),
    ("%y = aten.expand.default(%w, (B, -1, -1)) : float32[B,4,2]", "sample", 1),
    ("%y = aten.zeros.default((B, 2)) : float32[B,2]", "sample", 1),
    ("%y = aten.linspace.default(0, 1, B) : float32[B]", "mixed", 1),
    ("%y = aten.neg.default(%p) : float32[4,2]", "partial", 1),
    ("%y = aten.mul.Tensor(%p, %w) : float32[4,2]", "partial", 1),
    ("%y = aten.mul.Tensor(%p, %p) : float32[4,2]", "mixed", 1),
    ("%y = aten.div.Tensor(%w, %p) : float32[4,2]", "mixed", 1),
    ("%y = aten.div.Tensor(%l, 3.0, rounding_mode=\"floor\") : float32[]", "mixed", 1),
    ("%y = aten.div.Tensor(%w, %k) : float32[4,2]", "shared", 1),
    ("%y = aten.div.Tensor(%l, %k) : float32[]", "partial", 1),
    ("%y = aten.div.Tensor(%k, %l) : float32[]", "mixed", 1),
    ("%y = aten.sum.default(%p) : float32[]", "partial", 1),
    ("%y = aten.mean.dim(%p, (1,)) : float32[4]", "partial", 1),
    ("%y = aten.amax.default(%p, (1,)) : float32[4]", "mixed", 1),
    ("%y = aten._to_copy.default(%p, dtype=dtype:int64) : int64[4,2]", "mixed", 1),
    ("%y = aten._to_copy.default(%p, dtype=dtype:float64) : float64[4,2]", "partial", 1),
    ("%y = aten.softmax.int(%x, 1) : float32[B,4,2]", "sample", 1),
    ("%y = aten.softmax.int(%x, -3) : float32[B,4,2]", "mixed", 1),
    ("%y = aten.bmm.default(%x, %x) : float32[B,4,4]", "sample", 1),
    ("%y = aten.mm.default(%w, %u) : float32[4,2]", "mixed", 1),
    ("%y = aten.frobnicate.default(%x) : float32[B,4,2]", "mixed", 1),
    ("%y = aten.frobnicate.default(%w) : float32[4,2]", "shared", 1),
    ("%y = aten.frobnicate.default(%w, B) : float32[4,2]", "mixed", 1),
    ("%y = aten.add.Tensor(%w, B) : float32[4,2]", "shared", 1),
    ("%y = aten.fft_rfft.default(%x, none, 1) : complex64[B,3,2]", "sample", 1),
    ("%y = aten.fft_rfft.default(%x, none, 0) : complex64[B,4,2]", "mixed", 1),
    ("%y = aten.fft_fft2.default(%x) : complex64[B,4,2]", "sample", 1),
    ("%y = aten.fft_fftn.default(%x) : complex64[B,4,2]", "mixed", 1),
    ("%y = aten.linalg_inv.default(%q) : float32[B,2,2]", "sample", 1),
    ("%y = aten.linalg_inv.default(%u) : float32[B,2]", "mixed", 1),
    ("%y = aten.linalg_solve_triangular.default(%g, %ut, upper=true) : float32[2,B]", "sample", 1),
    ("%y = aten.linalg_solve_triangular.default(%g, %u, upper=true) : float32[B,2]", "mixed", 1),
    ("%y = aten.cdist.default(%u, %w) : float32[B,4]", "sample", 1),
    ("%y = aten.cdist.default(%u, %u) : float32[B,B]", "mixed", 1),
    ("%y = aten.index_add.default(%x, 1, %c, %x) : float32[B,4,2]", "sample", 1),
    ("%y = aten.index_add.default(%x, 0, %i, %x) : float32[B,4,2]", "mixed", 1),
    ("%y = aten.index_add.default(%x, 1, %i, %x) : float32[B,4,2]", "mixed", 1),
    ("%y = aten.index_put.default(%u, (%a, %i), 1.0) : float32[B,2]", "sample", 1),
    ("%y = aten.index_put.default(%u, (%i, %a), 1.0) : float32[B,2]", "mixed", 1),
    ("%y = aten.index_put.default(%x, (none, %c), %x) : float32[B,4,2]", "sample", 1),
    ("%y = aten.index_put.default(%x, (none, %c), %xt) : float32[B,4,2]", "mixed", 1),
    ("%y = aten.affine_grid_generator.default(%v, (B, 1, 3, 3), false) : float32[B,3,3,2]", "sample", 1),
    ("%y = aten.quantile.scalar(%x, 0.5, 1) : float32[B,2]", "sample", 1),
    ("%y = aten.quantile.scalar(%x, 0.5) : float32[]", "mixed", 1),
    ("%y = aten.embedding_bag.default(%t, %f, %o) : float32[B,4]", "sample", 1),
    ("%y = aten.embedding_bag.default(%t, %f, %a) : float32[B,4]", "mixed", 1),
    ("%y = aten.index.Tensor(%rows, (%placed,)) : float32[4*B,2]", "sample", 1),
    ("%y = aten.index.Tensor(%rows, (%loose,)) : float32[B,2]", "mixed", 1),
    ("%y = aten.index.Tensor(%x, (%placed,)) : float32[4*B,4,2]", "mixed", 1),
    ("%y = aten.index.Tensor(%rows, (%every, %best2)) : float32[4*B]", "sample", 1),
    ("%y = aten.bucketize.Tensor(%u, %e) : int64[B,2]", "sample", 1),
    ("%y = aten.searchsorted.Tensor(%e, %u) : int64[B,2]", "sample", 1),
    ("%y = aten.diagonal.default(%x, 0, 1, 2) : float32[B,2]", "sample", 1),
    ("%y = aten.diagonal.default(%x, 0, 0, 2) : float32[4,2]", "mixed", 1),
]  # fmt: skip


def analysed(line: str) -> Graph:
    return AnalyseBatch().run(parse_graph(f"{HEAD}{line}\n%output = output((%y,))\n"))


@pytest.mark.parametrize(("line", "kind", "outer"), CASES)
def test_states(line: str, kind: str, outer: int) -> None:
    graph = analysed(line)
    assert (graph["y"].attr("samples"), graph["y"].attr("outer", 1)) == (kind, outer)
    assert bool(mixing_reason(graph)) == (kind == "mixed")


def test_a_batch_size_as_a_number_is_the_whole_batchs() -> None:
    graph = analysed("%y = aten.add.Tensor(%x, 2*B, alpha=B) : float32[B,4,2]")
    assert "(%x, batch:2, alpha=batch:1)" in format_op(graph["y"])


def test_squeezing_says_its_shape() -> None:
    graph = analysed("%y = aten.squeeze.default(%i) : int64[B]")
    assert graph["y"].target == "aten.reshape.default"


def test_a_shared_loss_is_shared_out() -> None:
    graph = analysed("%y = aten.norm.Scalar(%w, 2) : float32[] {grad=true}")
    assert graph.output.attr("samples") == "partial"
    assert graph[graph.output.operands()[0]].target == "gp.share"


def test_reading_a_buffer_before_and_after_a_write_is_not_the_same() -> None:
    def reads(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        before = s.buffer * 2
        s.buffer[0] = 7.0
        after = s.buffer * 2
        return (h * (before[0] - after[0])).pow(2).sum()

    assert_as_eager(Calls(reads), (torch.randn(4, 4), torch.zeros(4)))


def test_equal_ops_on_inputs_are_one() -> None:
    graph = Canonicalize().run(
        parse_graph(
            'graph captured "N" batch=2\n%x = input("x") : float32[B]\n'
            '%a = aten.neg.default(%x) : float32[B] @ "a" ""\n%b = aten.neg.default(%x) : float32[B]\n'
            "%c = aten.rand_like.default(%x) : float32[B]\n%d = aten.rand_like.default(%x) : float32[B]\n"
            "%output = output((%a, %b, %c, %d))\n"
        )
    )
    assert graph.output.operands() == ("a", "a", "c", "d")


def test_results_in_parts_are_joined_as_they_were() -> None:
    def results(s: Calls, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            h, h.t(), h.repeat(2, 1), h.repeat_interleave(2, 0), torch.cat([h, -h]).t(), h.sum(0),
            s.vector, h.mean(), (y > 0).sum(), h.transpose(0, 1).reshape(-1),
            h.repeat(2, 1).repeat_interleave(3, 0),
        )  # fmt: skip

    args = (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    made = ready(Calls(results), args, loss=None)
    assert made.reason == ""
    whole = made.device().forward(args, {})
    device, first, parts = made.device(), 0, []
    device._context.batch = 6
    for number, size in enumerate((1, 3, 2)):
        device._context.first_sample, device._context.samples = first, size
        inputs = made.captured.signature.bind(args, {})
        taken = {label: value[first : first + size] for label, value in inputs.items()}
        module = device._builder.module(size, 6)
        _, values = module(*(taken[label] for label in device._builder.interface.inputs))
        parts.append({(place, number): value for place, value in enumerate(values)})
        first += size
    joined = merge_results(
        made.lowered, [StepResult(part, StepReport(0, 0.0, 0.0, (), 0)) for part in parts]
    )
    for got, wanted in zip(joined, whole, strict=True):
        torch.testing.assert_close(got, wanted)
