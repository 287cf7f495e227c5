"""Formats become casts: the text of the graph, who may read what, and the numbers that come out."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphpar.errors import VerifyError
from graphpar.ir.chain import build_chain
from graphpar.ir.formats import FORMATS, LARGEST, carrier, format_of, role_of
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES
from graphpar.ir.rules import verify
from graphpar.ir.text import format_op, parse_graph
from graphpar.passes.casts import AssignFormats, InsertCasts
from graphpar.passes.comm import InsertMessages
from graphpar.preparation import Prepared, lower, prepare
from graphpar.runtime.reference import OneDevice, whole_on_one_device
from graphpar.training import Training

TRAINING = Training(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))

BLOCK = """graph placed "Block" batch=2
%x = input("x") : float32[B,4]
%w = parameter("w") : float32[4,4] {grad=true}
%v = parameter("v") : float32[4,4] {grad=true}
%g = parameter("g") : float32[4] {grad=true}
%n = aten.layer_norm.default(%x, (4,), %g) : float32[B,4] {format="bfloat16", grad=true, stage=0}
%a = aten.linear.default(%n, %w) : float32[B,4] {format="bfloat16", grad=true, stage=0}
%b = aten.relu.default(%a) : float32[B,4] {format="bfloat16", grad=true, stage=0}
%c = aten.linear.default(%b, %w) : float32[B,4] {format="bfloat16", grad=true, stage=0}
%r = aten.add.Tensor(%n, %c) : float32[B,4] {format="bfloat16", grad=true, stage=0}
%d = aten.linear.default(%r, %v) : float32[B,4] {format="bfloat16", grad=true, stage=1}
%e = aten.linear.default(%r, %v) : float32[B,4] {format="bfloat16", grad=true, stage=1}
%s = aten.add.Tensor(%r, %d) : float32[B,4] {format="bfloat16", grad=true, stage=1}
%t = aten.mul.Tensor(%s, %e) : float32[B,4] {format="bfloat16", grad=true, stage=1}
%l = aten.mse_loss.default(%t, %x) : float32[] {format="bfloat16", grad=true, stage=1}
%output = output((%l,))
"""

CAST_BLOCK = """
%n = aten.layer_norm.default(%x, (4,), %g) : float32[B,4]
%n_bfloat16 = aten._to_copy.default(%n, dtype=dtype:bfloat16) : bfloat16[B,4]
%w_bfloat16 = gp.cast_weight(%w, dtype:bfloat16) : bfloat16[4,4]
%a = aten.linear.default(%n_bfloat16, %w_bfloat16) : bfloat16[B,4]
%b = aten.relu.default(%a) : bfloat16[B,4]
%c = aten.linear.default(%b, %w_bfloat16) : bfloat16[B,4]
%c_float32 = aten._to_copy.default(%c, dtype=dtype:float32) : float32[B,4]
%r = aten.add.Tensor(%n, %c_float32) : float32[B,4]
%r_bfloat16 = aten._to_copy.default(%r, dtype=dtype:bfloat16) : bfloat16[B,4]
%r_bfloat16_to1 = gp.send(%r_bfloat16, 1, 0) : bfloat16[B,4]
%r_bfloat16_at1 = gp.recv(%r_bfloat16_to1, 0, 0) : bfloat16[B,4]
%v_bfloat16 = gp.cast_weight(%v, dtype:bfloat16) : bfloat16[4,4]
%d = aten.linear.default(%r_bfloat16_at1, %v_bfloat16) : bfloat16[B,4]
%e = aten.linear.default(%r_bfloat16_at1, %v_bfloat16) : bfloat16[B,4]
%r_float32 = aten._to_copy.default(%r_bfloat16_at1, dtype=dtype:float32) : float32[B,4]
%d_float32 = aten._to_copy.default(%d, dtype=dtype:float32) : float32[B,4]
%s = aten.add.Tensor(%r_float32, %d_float32) : float32[B,4]
%e_float32 = aten._to_copy.default(%e, dtype=dtype:float32) : float32[B,4]
%t = aten.mul.Tensor(%s, %e_float32) : float32[B,4]
%l = aten.mse_loss.default(%t, %x) : float32[]
"""


def cast(text: str) -> Graph:
    graph = InsertMessages().run(InsertCasts().run(parse_graph(text)))
    verify(graph)
    return graph


def test_golden_text() -> None:
    shown = [format_op(op).split(" {")[0] for op in cast(BLOCK).ops if op.target not in SOURCES]
    assert "\n".join(shown[:-1]) == CAST_BLOCK.strip()


def test_float32_graphs_come_back_as_they_are() -> None:
    graph = parse_graph(BLOCK.replace('"bfloat16"', '"float32"'))
    assert InsertCasts().run(graph) is graph
    assert AssignFormats(("float32",)).run(graph) is graph


def test_each_op_reads_what_it_computes_in() -> None:
    for op in cast(BLOCK).ops:
        if op.target.startswith("aten.") and "_to_copy" not in op.target:
            read = {t.dtype for name in op.operands() for t in cast(BLOCK)[name].types if t is not None}
            assert len(read) == 1, op


def test_a_value_made_in_float16_keeps_its_range_on_the_wire() -> None:
    graph = cast(BLOCK.replace("bfloat16", "float16"))
    assert graph["r_to1"].type.dtype == "float32"


def test_masks_stay_finite_and_numbers_in_range() -> None:
    graph = cast("""graph placed "Mask" batch=2
%x = input("x") : float32[B,4]
%m = input("m") : bool[B,4]
%w = parameter("w") : float32[4,4]
%f = aten.full.default((B, 4), -3.4028234663852886e38) : float32[B,4] {stage=0}
%h = aten.linear.default(%x, %w) : float32[B,4] {format="float16", stage=0}
%k = aten.add.Tensor(%h, %f) : float32[B,4] {format="float16", stage=0}
%q = aten.masked_fill.Scalar(%k, %m, -3.4028234663852886e38) : float32[B,4] {format="float16", stage=0}
%y = aten.linear.default(%q, %w) : float32[B,4] {format="float16", stage=0}
%output = output((%y,))
""")
    assert graph["f_float16"].operands() == ("f_clamped",)
    assert graph["q"].args[2] == -LARGEST["float16"]


def test_a_cast_back_is_no_cast() -> None:
    """Code that asks for float32 and then for the lower format again gets the lower value itself."""
    graph = cast("""graph placed "Back" batch=2
%x = input("x") : float32[B,4]
%w = parameter("w") : float32[4,4]
%h = aten.linear.default(%x, %w) : float32[B,4] {format="bfloat16", stage=0}
%i = aten._to_copy.default(%h, dtype=dtype:bfloat16) : bfloat16[B,4] {format="bfloat16", stage=0}
%output = output((%i,))
""")
    assert (graph["i"].target, graph["i"].operands()) == ("aten.alias.default", ("h",))


def test_attention_may_stay_behind() -> None:
    """In a partly lower unit attention is float32, and what goes into it is cast once per value."""
    captured = parse_graph("""graph captured "Heads" batch=2
%x = input("x") : float32[B,3,8]
%w = parameter("w") : float32[8,8] {grad=true}
%q = aten.linear.default(%x, %w) : float32[B,3,8] {grad=true}
%v = aten.view.default(%q, (B, 3, 2, 4)) : float32[B,3,2,4] {grad=true}
%a = aten.scaled_dot_product_attention.default(%v, %v, %v) : float32[B,3,2,4] {grad=true}
%r = aten.reshape.default(%a, (B, 3, 8)) : float32[B,3,8] {grad=true}
%y = aten.linear.default(%r, %w) : float32[B,3,8] {grad=true}
%output = output((%y,))
""")
    units = len(build_chain(captured).units)
    marked = AssignFormats(("bfloat16_linear",) * units).run(captured)
    graph = InsertCasts(takes="captured", gives="captured").run(marked)
    assert [graph[n].type.dtype for n in "qvary"] == ["bfloat16", *("float32",) * 3, "bfloat16"]
    assert sorted(op.name for op in graph.ops if op.made_by == "casts") == [
        "q_float32", "r_bfloat16", "w_bfloat16", "x_bfloat16", "y_float32",
    ]  # fmt: skip


def test_unknown_formats_and_wrong_counts_are_refused() -> None:
    captured = parse_graph(BLOCK.replace("placed", "captured").replace(", stage=0", "").replace(
        ", stage=1", "").replace('format="bfloat16", ', ""))  # fmt: skip
    with pytest.raises(VerifyError, match="not 'int4'"):
        AssignFormats(("int4",)).run(captured)
    with pytest.raises(VerifyError, match="formats for 40 units"):
        AssignFormats(("bfloat16",) * 40).run(captured)


def test_products_of_unlike_formats_break_a_rule() -> None:
    graph = cast(BLOCK)
    wide = graph["n"].args[0]
    spoilt = [replace(op, args=(wide, op.args[1])) if op.name == "a" else op for op in graph]
    with pytest.raises(VerifyError, match="operands have one format"):
        verify(graph.with_ops(spoilt))


# --- numbers ---


class Attention(nn.Module):
    """Written-out attention with a float mask, an embedding and a loss on logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 20)

    def forward(self, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mask = (1.0 - keep.float())[:, None, :] * torch.finfo(torch.float32).min
        x = x + ((q @ k.transpose(1, 2)) / 4 + mask).softmax(-1) @ v
        result: torch.Tensor = nn.functional.cross_entropy(self.out(x).flatten(0, 1), ids.flatten())
        return result


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(self.two(self.norm(self.one(x)).relu()), 2)
        result: torch.Tensor = nn.functional.cross_entropy(self.head(x.mean((2, 3))), y)
        return result


class Far(nn.Module):
    """Logits of 20 and more, whose sigmoid is 1 in a lower format."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        nn.init.constant_(self.linear.weight, 5.0)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        first = nn.functional.binary_cross_entropy_with_logits(logits, y)
        return first + nn.functional.binary_cross_entropy(logits.sigmoid(), y)


def one_device(model: nn.Module, prepared: Prepared, precision: str) -> OneDevice:
    found = whole_on_one_device(prepared.graph)
    (stage,) = found.pipelines[0].stages
    pipeline = replace(found.pipelines[0], stages=(replace(stage, precision=precision),))
    (graph,) = lower(prepared.graph, replace(found, pipelines=(pipeline,)), True).graphs
    return OneDevice(model, prepared.captured, graph, prepared.graph, 0)


def loss_and_gradient(device: OneDevice, args: tuple[torch.Tensor, ...]) -> tuple[float, torch.Tensor]:
    (loss,) = device.forward(args, {})
    assert loss.dtype == torch.float32
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = device.gradients()
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    return float(loss.detach()), torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def attention_case() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    keep = torch.ones(6, 5, dtype=torch.int64)
    keep[:, 3:] = 0
    return Attention(), (torch.randint(0, 20, (6, 5)), keep)


def convolutions_case() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Convolutions(), (torch.randn(4, 3, 10, 10), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize(("precision", "room"), [("bfloat16", 0.02), ("float16", 0.004)])
@pytest.mark.parametrize("case", [attention_case, convolutions_case])
def test_numbers_are_those_of_float32_but_for_rounding(
    case: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]], precision: str, room: float
) -> None:
    torch.manual_seed(0)
    model, args = case()
    prepared = prepare(model, args, {}, TRAINING)
    loss, gradient = loss_and_gradient(one_device(model, prepared, "float32"), args)
    near_loss, near = loss_and_gradient(one_device(model, prepared, precision), args)
    assert near_loss == pytest.approx(loss, rel=room)
    difference = float((near - gradient).norm() / gradient.norm())
    assert 0 < difference < room, "lower formats round, but not more than that"


def test_numbers_of_an_mlp_are_those_of_autocast() -> None:
    """Two linear layers leave no choice: the casts are autocast's, and so is every bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    args = (torch.randn(6, 8), torch.randn(6, 3))
    training = replace(TRAINING, loss=nn.functional.mse_loss)
    prepared = prepare(model, args, {}, training)
    loss, gradient = loss_and_gradient(one_device(model, prepared, "bfloat16"), args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = nn.functional.mse_loss(model(args[0]).float(), args[1])
    wanted.backward()  # type: ignore[no-untyped-call]
    named = dict(model.named_parameters())
    assert loss == float(wanted.detach())
    expected = torch.cat([named[n].grad.flatten() for n in sorted(named)])  # type: ignore[union-attr]
    torch.testing.assert_close(gradient, expected, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_far_logits_stay_finite(precision: str) -> None:
    model = Far()
    args = (torch.ones(2, 4), torch.tensor([[0.0], [1.0]]))
    prepared = prepare(model, args, {}, TRAINING)
    loss, gradient = loss_and_gradient(one_device(model, prepared, precision), args)
    wanted, expected = loss_and_gradient(one_device(model, prepared, "float32"), args)
    assert torch.isfinite(gradient).all()
    assert loss == pytest.approx(wanted, rel=0.02)
    assert float((gradient - expected).norm()) <= 0.02 * float(expected.norm())


def doubled(graph: Graph) -> Iterator[str]:
    seen = set()
    for op in graph.ops:
        if op.made_by == "casts":
            key = (op.operands(), op.target, op.type.dtype, op.attr("stage"))
            if key in seen:
                yield op.name
            seen.add(key)


def test_no_cast_is_doubled_or_undone() -> None:
    model, args = attention_case()
    prepared = prepare(model, args, {}, TRAINING)
    units = len(build_chain(prepared.graph).units)
    for formats in (("bfloat16",) * units, ("float32", *("bfloat16",) * (units - 1))):
        marked = AssignFormats(formats).run(prepared.graph)
        graph = InsertCasts(takes="captured", gives="captured").run(marked)
        assert not list(doubled(graph))
        for op in graph.ops:
            if op.made_by == "casts" and op.target == "aten._to_copy.default":
                before = graph[op.operands()[0]]
                assert before.made_by != "casts" or before.target == "aten.clamp.default"


# --- any graph, any formats ---

OPS = (
    ("aten.linear.default", 2), ("aten.relu.default", 1), ("aten.add.Tensor", 2), ("aten.mul.Tensor", 2),
    ("aten.softmax.int", 1), ("aten.exp.default", 1), ("aten.tanh.default", 1),
)  # fmt: skip


@st.composite
def formatted_graphs(draw: st.DrawFn) -> str:
    """Square values, each op in a format and a stage drawn for it, and a loss at the end."""
    lines = [
        'graph placed "Any" batch=2',
        '%x = input("x") : float32[B,4]',
        '%w = parameter("w") : float32[4,4] {grad=true}',
    ]
    values, stage = ["x"], 0
    formats = st.sampled_from(FORMATS)
    for number in range(draw(st.integers(1, 10))):
        target, operands = draw(st.sampled_from(OPS))
        stage += draw(st.booleans())
        read = [f"%{draw(st.sampled_from(values))}" for _ in range(operands)]
        if target == "aten.linear.default":
            read[1] = "%w"
        read += ["-1"] * (target == "aten.softmax.int")
        marks = f'format="{draw(formats)}", grad=true, stage={stage}'
        lines.append(f"%v{number} = {target}({', '.join(read)}) : float32[B,4] {{{marks}}}")
        values.append(f"v{number}")
    marks = f'format="{draw(formats)}", grad=true, stage={stage}'
    lines.append(f"%l = aten.mse_loss.default(%{values[-1]}, %x) : float32[] {{{marks}}}")
    return "\n".join([*lines, "%output = output((%l,))", ""])


@given(formatted_graphs())
@settings(max_examples=40, deadline=None)
def test_casts_stand_at_borders_alone(text: str) -> None:
    before, graph = parse_graph(text), cast(text)
    assert not list(doubled(graph))
    for op in graph.ops:
        dtypes = {graph[n].type.dtype for n in op.operands() if graph[n].target not in ("gp.send",)}
        made = op.made_by == "casts"
        if not made and op.target.startswith("aten."):
            assert len(dtypes) == 1, "an op reads one format"
            asked = carrier(format_of(before[op.name]))
            assert dtypes <= {"float32", asked}
            if role_of(op) == "island":
                assert dtypes == {"float32"}, "islands read float32"
            if role_of(op) == "product":
                assert dtypes == {asked}
        if made and op.target == "aten._to_copy.default":
            (source,) = op.operands()
            assert graph[source].type.dtype != op.type.dtype, "casts from a format to itself"
            assert graph.users(op.name), "casts that nobody reads"
            on_wire = any(u.target == "gp.send" for u in graph.users(op.name))
            assert graph[source].made_by != "casts" or on_wire or graph[source].target != op.target
    assert graph.output.operands() == ("l",) and graph["l"].type.dtype == "float32"


class Scores(nn.Module):
    """Products that come out as large as their weights are."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        nn.init.constant_(self.linear.weight, size / 4)
        with torch.no_grad():
            self.linear.weight[1].neg_()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = self.linear(x)
        attended = (scores.unsqueeze(2) * x[:, :3].unsqueeze(1)).softmax(-1).sum()
        result: torch.Tensor = nn.functional.cross_entropy(scores, y) + attended
        return result


@pytest.mark.parametrize("size", [20.0, 50.0, 1e4])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_large_scores_stay_finite(precision: str, size: float) -> None:
    model, args = Scores(size), (torch.ones(2, 4), torch.tensor([0, 1]))
    prepared = prepare(model, args, {}, TRAINING)
    loss, gradient = loss_and_gradient(one_device(model, prepared, precision), args)
    wanted, expected = loss_and_gradient(one_device(model, prepared, "float32"), args)
    assert torch.isfinite(gradient).all() and loss == pytest.approx(wanted, rel=0.02)
    # At ten thousand, bfloat16's neighbours are 64 apart, and a difference between two scores is lost.
    room = 0.02 if size < 1e3 else 0.2
    assert float((gradient - expected).norm()) <= room * float(expected.norm())
