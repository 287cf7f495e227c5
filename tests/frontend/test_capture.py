"""Capture: what the graph must get right where torch.export is known to be treacherous."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from one_device import Calls, assert_as_eager, assert_close, in_parts, ready
from torch import Tensor, nn

from graphpar.errors import CaptureError
from graphpar.frontend.capture import batch_size, capture, resize
from graphpar.frontend.export import without_aliases
from graphpar.ir.ops import BatchSize
from graphpar.ir.whole import tail_reason

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


class Language(nn.Module):
    """Tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.mix(self.embed(ids))))
        return {"loss": F.cross_entropy(logits.view(-1, 9), labels.view(-1)), "logits": logits}


def test_one_tensor_given_twice_is_two_inputs() -> None:
    ids = torch.randint(0, 9, (4, 5))
    made = ready(Language(), (ids,), {"labels": ids})
    assert len(made.source.sources("input")) == 2
    labels = torch.randint(0, 9, (4, 5))
    device = made.device()
    (loss,) = device.forward((ids,), {"labels": labels})
    wanted = made.model(ids, labels)["loss"]
    torch.testing.assert_close(loss, wanted)


def test_views_of_one_storage_and_the_models_own_tensors_are_cloned() -> None:
    base = torch.arange(6.0)
    model = nn.Linear(2, 2)
    first, second, weight = without_aliases((base[:3], base[3:], model.weight), model)
    assert first.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert second.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    assert weight is not model.weight and torch.equal(weight, model.weight)


def test_tied_weights_are_one_parameter_with_two_names() -> None:
    ids, labels = torch.randint(0, 9, (4, 5)), torch.randint(0, 9, (4, 5))
    made = assert_as_eager(Language(), (ids, labels))
    names = {str(op.args[0]) for op in made.source.sources("parameter")}
    ((kept, others),) = made.captured.graph.aliases.items()
    assert {kept, *others} == {"embed.weight", "head.weight"}
    assert len(names & {"embed.weight", "head.weight"}) == 1


def frozen(model: Calls) -> Calls:
    model.linear.weight.requires_grad_(False)
    return model


def nothing_recorded(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = (h * s.table[0]).softmax(-1)
    return -(target * (h * s.vector).log_softmax(-1)).sum(-1).mean()


def recorded_inside(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        a = h * 2
        with torch.enable_grad():
            b = (h * s.vector).sum()
    return (a * s.table[0]).sum() + b


def checked(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    torch._assert(h.size(1) == 4, "four columns")  # type: ignore[no-untyped-call]
    assert h.ndim == 2
    return h.pow(2).sum()


def fresh_writes(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = (h * 2).add_(1).mul_(s.vector).clamp_(min=-3)
    a[:, 0] = 0
    a[:, 1:3] += h[:, :2]
    return F.relu(a, inplace=True).pow(2).sum()


def shift_right(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    ids = y[:, None].expand(-1, 5).contiguous()
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = 2
    shifted.masked_fill_(shifted == 1, 3)
    return (s.table[shifted] * h[:, None]).pow(2).sum()


def two_writes_through_one_view(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    view = a[:, 1:]
    view.add_(1)
    view.mul_(s.vector[1:])
    return (a * s.vector).pow(2).sum() + view.sum()


def writes_through_reshape(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    rows = a.view(-1, 2, 2)
    rows[:, 0].add_(1)
    a.t()[1].mul_(3)
    flat = a.reshape(-1)
    flat.mul_(2)
    copied = a.t().reshape(-1)
    copied.mul_(5)
    return (a * s.vector).pow(2).sum() + copied.sum()


def copies_keep_apart(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    wide = a.to(torch.float64)
    wide.mul_(2)
    return (a * wide).sum().float()


def types_stay(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    count = y * 1
    count.div_(2, rounding_mode="floor")
    mask = h.detach() * 1
    mask.gt_(0.1)
    return (h * mask / 3 + count[:, None]).pow(2).sum()


def filled_in_steps(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros(h.size(0), 3, 4)
    for t in range(3):
        out[:, t] = h * s.vector**t
    return out.pow(2).sum()


def reshaped_in_place(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    a.unsqueeze_(1).add_(1)
    return (a * h[:, None]).sum()


def parts_and_sorts(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    values, places = (h * s.vector).topk(2)
    return (a * b).sum() + (values * places).sum()


def counts(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    s.buffer += 1
    s.buffer[0] = h.detach()[0]
    return (h * s.buffer[:1]).sum()


FUNCTIONS: list[Callable[[Calls, Tensor, Tensor], Tensor]] = [
    nothing_recorded, recorded_inside, checked, fresh_writes, shift_right, two_writes_through_one_view,
    writes_through_reshape, copies_keep_apart, types_stay, filled_in_steps, reshaped_in_place,
    parts_and_sorts, counts,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numbers_are_those_of_eager(function: Callable[[Calls, Tensor, Tensor], Tensor]) -> None:
    made = assert_as_eager(Calls(function), (X, Y))
    assert not any(op.target.startswith("aten._assert") for op in made.source.ops)
    if not made.reason:
        assert_close(in_parts(made, (X, Y), (1, 3)), in_parts(made, (X, Y), (4,)))


def test_frozen_parameters_carry_no_gradient() -> None:
    made = assert_as_eager(frozen(Calls(lambda s, h, y: h.pow(2).sum())), (X, Y))
    by_name = {op.args[0]: op.attr("grad") for op in made.source.sources("parameter")}
    assert by_name["linear.weight"] is None and by_name["linear.bias"] is True


def test_batch_norm_keeps_its_statistics() -> None:
    model = Calls(lambda s, h, y: s.layer(h).pow(2).sum(), nn.BatchNorm1d(4))
    made = ready(model, (X, Y))
    device = made.device()
    for _ in range(2):
        device.forward((X, Y), {})
        model(X, Y)
    layer = model.layer
    assert isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None
    torch.testing.assert_close(device.tensors["layer.running_mean"], layer.running_mean)
    assert int(device.tensors["layer.num_batches_tracked"]) == 2


def test_a_power_iteration_that_writes_through_out_keeps_its_vectors() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = Calls(lambda s, h, y: s.layer(h).pow(2).sum(), layer)
    device = ready(model, (X, Y)).device()
    for _ in range(2):
        (loss,) = device.forward((X, Y), {})
        torch.testing.assert_close(loss, model(X, Y))
    vectors = {name: b for name, b in model.named_buffers() if name.endswith(("_u", "_v"))}
    assert len(vectors) == 2
    for name, vector in vectors.items():
        torch.testing.assert_close(device.tensors[name], vector)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), r"'\(top\)' was made by torch.jit"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "'0.weight' of the model is lazy"),
    ],
)
def test_models_that_cannot_be_exported_yet(model: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        capture(model(), (X,), {})


REFUSED: dict[str, tuple[Callable[[Calls, Tensor, Tensor], Tensor], str]] = {}


def refused(why: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        REFUSED[function.__name__] = (function, why)
        return function

    return register


@refused("overwrites a parameter .* call it once in that mode before")
def writes_parameter(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        s.vector.mul_(2)
    return (h * s.vector).sum()


@refused("another live value shares")
def older_view_is_read(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    view = a[:, 0]
    a.add_(1)
    return (view * h[:, 0]).sum()


@refused("outside autograd")
def writes_past_autograd(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    a.detach().mul_(2)
    return (a * h).sum()


@refused("outside autograd")
def writes_without_grad(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    with torch.no_grad():
        a.clamp_(0, 1)
    return (a * h).sum()


@refused("autocast inside the model")
def casts_itself(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (h @ s.linear.weight).float().sum()


@refused("depend on the plan")
def draws_unkeyed(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h * torch.randperm(4)).sum()


@refused("depend")
def shape_by_data(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return h[torch.unique(y)].sum()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str) -> None:
    function, why = REFUSED[name]
    with pytest.raises(CaptureError, match=why) as caught:
        ready(Calls(function), (X, Y.clone()))
    message = str(caught.value)
    assert "(top)" in message and ".py:" in message


def test_control_flow_names_module_line_and_remedy() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.max() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Gate()))
    with pytest.raises(CaptureError) as caught:  # without memory there are no values to branch on
        capture(model.to("meta"), (X.to("meta"),), {})
    message = str(caught.value)
    assert "module '1.1' (Gate)" in message and "test_capture.py:" in message and "torch.where" in message


def test_a_recurrent_layer_runs_and_dropout_between_layers_is_refused() -> None:
    args = (torch.randn(4, 5, 4), Y)
    assert_as_eager(
        Calls(lambda s, h, y: s.layer(h)[0].pow(2).sum(), nn.LSTM(4, 3, 2, batch_first=True)), args
    )
    dropping = nn.LSTM(4, 3, 2, batch_first=True, dropout=0.5)
    with pytest.raises(CaptureError, match=r"'layer' at .*drops out between its layers"):
        ready(Calls(lambda s, h, y: s.layer(h)[0].sum(), dropping), args)
    dropping.eval()
    assert_as_eager(Calls(lambda s, h, y: s.layer(h)[0].pow(2).sum(), dropping), args)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.AlphaDropout(0.5)])
def test_dropout_that_is_off_leaves_no_op(layer: nn.Module) -> None:
    made = assert_as_eager(Calls(lambda s, h, y: s.layer(h * 1).pow(2).sum(), layer.eval()), (X, Y))
    targets = {op.target for op in made.source.ops}
    assert not any(t.startswith("gp.") for t in targets)
    assert layer.training is False


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.5)])
def test_dropout_that_is_on_is_keyed(layer: nn.Module) -> None:
    model = Calls(lambda s, h, y: s.layer((h * 1)[..., None, None]).pow(2).sum(), layer)
    made = ready(model, (X, Y))
    (op,) = [op for op in made.source.ops if op.target == "gp.dropout"]
    assert op.args[1] == 0.5 and op.kwarg("stream") == 0
    losses = {float(made.device(seed).forward((X, Y), {})[0].detach()) for seed in (1, 1, 2)}
    assert len(losses) == 2


def test_the_mode_of_each_submodule_is_kept_and_restored() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5))
    model[0].eval()
    drops = [op for op in capture(model, (X,), {}).graph.ops if "dropout" in op.target]
    assert [op.args[2] for op in drops] in ([True], [False, True])
    captured = capture(model, (X,), {}, training=False)
    assert not any(op.args[2] for op in captured.graph.ops if "dropout" in op.target)
    assert [m.training for m in model] == [False, True, True]


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (lambda h: h, "a tensor of shape"),
        (lambda h: {"logits": h}, r"dict with keys \['logits'\]"),
        (lambda h: (h, h), "tuple"),
        (lambda h: None, "NoneType"),
    ],
)
def test_a_model_without_a_loss(output: Callable[[Tensor], Any], shown: str) -> None:
    with pytest.raises(CaptureError, match=f"returned {shown}.*Training\\(loss="):
        ready(Calls(lambda s, h, y: output(h)), (X, Y))


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((X,), {}, "do not match the model's forward signature"),
        ((X, Y), {"z": X}, "do not match the model's forward signature"),
        ((torch.randn(4, 7), Y), {}, "does not fit the model"),
        ((object(), Y), {}, "."),
        ((X.to("meta"), Y), {}, "build model and example inputs on the same device"),
    ],
)
def test_wrong_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        ready(Calls(lambda s, h, y: h.sum()), args, kwargs)


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, mode: str, scale: float | None, more: dict[str, Any]) -> Any:
        h = self.linear(x) * (scale or 1.0) + more["y"]
        return {"a": h, "nested": [mode, (h.sum(-1), None, 3)], "again": h}


def flags(**changes: Any) -> dict[str, Any]:
    return {"mode": "up", "scale": 2.0, "more": {"y": torch.ones(4, 4), "k": 1}, **changes}


def test_outputs_are_put_together_as_the_user_had_them() -> None:
    made = ready(Flags(), (X,), flags(), loss=None)
    wanted = made.model(X, **flags())
    values = made.device().forward((X,), flags())
    by_name = dict(zip(made.lowered.output.operands(), values, strict=True))
    originals = dict(zip(made.captured.graph.output.operands(), values, strict=True))
    assert len(by_name) == 2
    got = made.captured.signature.assemble(originals)
    assert list(got) == ["a", "nested", "again"]
    torch.testing.assert_close(got["a"], wanted["a"])
    mode, (total, nothing, three) = got["nested"]
    assert (mode, nothing, three) == ("up", None, 3)
    torch.testing.assert_close(total, wanted["nested"][1][0])


def test_keyword_order_does_not_matter_and_constants_do() -> None:
    signature = ready(Flags(), (X,), flags(), loss=None).captured.signature
    given = flags()
    backwards = {key: given[key] for key in reversed(given)}
    assert list(signature.bind((X,), backwards)) == list(signature.bind((X,), given))
    for changed, message in (
        (flags(mode="down"), "'up' in the example batch"),
        (flags(scale=None), "structure|example batch"),
        (flags(scale=2), "2.0 in the example batch"),
        (flags(scale=X), "2.0 in the example batch"),
        (flags(more={"y": 3.0, "k": 1}), "was a tensor in the example batch"),
        (flags(more={"y": X}), "structure"),
        ({"mode": "up"}, r"keyword arguments \['mode', 'more', 'scale'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            signature.bind((X,), changed)
    with pytest.raises(ValueError, match="structure"):
        signature.bind((X, X), flags())


def test_nan_is_a_constant_like_any_other() -> None:
    given = flags(scale=math.nan)
    signature = ready(Flags(), (X,), given, loss=None).captured.signature
    assert signature.bind((X,), flags(scale=math.nan))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_named_tuples_in_and_out() -> None:
    class Swap(nn.Module):
        def forward(self, pair: Pair) -> Pair:
            return Pair(pair.second * 2, pair.first)

    made = ready(Swap(), (Pair(X, Y),), loss=None)
    values = made.device().forward((Pair(X, Y),), {})
    torch.testing.assert_close(values[0], Y * 2)
    torch.testing.assert_close(values[1], X)


def test_an_argument_may_be_called_output() -> None:
    class Named(nn.Module):
        def forward(self, output: Tensor, input: Tensor) -> Tensor:
            return output * input

    (value,) = ready(Named(), (X, X * 2), loss=None).device().forward((X, X * 2), {})
    torch.testing.assert_close(value, X * X * 2)


def test_a_loss_of_the_user() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    made = assert_as_eager(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (X, Y), loss=loss)
    assert not made.reason


def test_a_model_without_memory_gives_the_same_graph() -> None:
    ids = torch.randint(0, 9, (4, 5))
    real = capture(Language(), (ids, ids), {}, loss="returned").graph
    with torch.device("meta"):
        ghost = Language()
    meta_ids = ids.to("meta")
    graph = capture(ghost, (meta_ids, meta_ids), {}, loss="returned").graph
    assert [op.target for op in graph.ops] == [op.target for op in real.ops]
    assert len(graph.sources("input")) == 2


def test_sizes_in_proportion_become_symbols() -> None:
    graph = capture(Calls(lambda s, h, y: h.reshape(-1) * 2), (X, Y), {}).graph
    assert graph.ops[-2].type.shape == (BatchSize(4),)
    assert graph.ops[-3].args[1] in ((-1,), (BatchSize(4),))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda s, h, y: h * (1 / h.size(0)), "uses 0.25 for a batch of 4"),
        (lambda s, h, y: torch.cat([h, h[:1]]), "has a size 5 for a batch of 4|makes"),
        (lambda s, h, y: sum(h[i] for i in range(h.size(0))), "ops for a batch of 4 but"),
        (lambda s, h, y: h * (2 if h.size(0) > 5 else 3), "3 for a batch of 4 but 2"),
        (lambda s, h, y: h * (2 if h.size(0) % 2 else 3), "3 for a batch of 4 but 2"),
        (lambda s, h, y: h * torch.tensor([float(h.size(0))]), "constant .* changes with the batch size"),
    ],
)
def test_what_depends_on_the_batch_size_keeps_the_batch_whole(
    function: Callable[..., Tensor], why: str
) -> None:
    made = ready(Calls(lambda s, h, y: function(s, h, y).pow(2).sum()), (X, Y))
    assert made.reason
    assert_as_eager(made.model, (X, Y))
    assert re.search(why, made.reason), made.reason


def test_samples_reshaped_into_each_other_meet_after_all_forwards() -> None:
    made = ready(Calls(lambda s, h, y: h.view(2, -1).pow(2).sum()), (X, Y))
    assert made.reason == ""
    assert re.search("view at .* reshapes samples into each other", tail_reason(made.source))
    assert_close(in_parts(made, (X, Y), (1, 3)), in_parts(made, (X, Y), (4,)))


def test_a_batch_of_one_runs_whole() -> None:
    made = assert_as_eager(Calls(lambda s, h, y: F.cross_entropy(h, y)), (X[:1], Y[:1]))
    assert made.reason == "the example batch has one sample"


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(CaptureError, match="empty; give one with at least one sample"):
        ready(Calls(lambda s, h, y: h.sum()), (X[:0], Y[:0]))


def test_batch_sizes_and_resizing() -> None:
    assert batch_size([]) == 1
    assert batch_size([torch.zeros(()), 3, "a"]) == 1
    assert batch_size([torch.zeros(5, 2), torch.zeros(5), torch.zeros(2)]) == 5
    assert resize(torch.arange(3), 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert resize(torch.arange(3), 3, 2).tolist() == [0, 1]
    assert resize("text", 3, 2) == "text" and resize(torch.arange(4), 3, 2).tolist() == [0, 1, 2, 3]
    ghost = torch.zeros(3, 2, device="meta")
    assert resize(ghost, 3, 7).shape == (7, 2)


def test_modules_and_lines_are_kept() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU())), (X,), {}).graph
    assert [op.module for op in graph.ops if op.target.startswith("aten.")] == ["0", "1.0"]
    graph = capture(Calls(lambda s, h, y: h * 2), (X, Y), {}).graph
    assert graph.ops[-2].source.startswith("one_device.py:")


def chained_buffer_writes(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    s.buffer[1].mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return (h * s.buffer[1]).sum()


def test_writes_in_a_row_to_part_of_a_buffer_all_count() -> None:
    model = Calls(chained_buffer_writes)
    made = ready(model, (X, Y))
    device = made.device()
    for _ in range(2):
        (loss,) = device.forward((X, Y), {})
        torch.testing.assert_close(loss, model(X, Y))
    torch.testing.assert_close(device.tensors["buffer"], model.buffer)


def test_an_argument_that_is_overwritten_is_the_callers_no_more(caplog: pytest.LogCaptureFixture) -> None:
    def writes(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        y[0] = 7
        return (h * y[:, None]).sum()

    made, y = ready(Calls(writes), (X, Y.clone())), Y.clone()
    assert "overwrites the argument" in caplog.text
    (loss,) = made.device().forward((X, y), {})
    assert torch.equal(y, Y)
    torch.testing.assert_close(loss, made.model(X, Y.clone()))
