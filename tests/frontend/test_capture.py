"""Capture: what the graph must get right where torch.export is known to be treacherous."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from one_device import Calls, assert_as_eager, assert_close, in_parts, ready
from torch import Tensor, nn

from graphpar.frontend.capture import capture
from graphpar.frontend.export import without_aliases

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


def test_a_number_of_a_constant_is_one_of_the_graph() -> None:
    betas = torch.tensor([2.0, 3.0])
    assert_as_eager(Calls(lambda s, h, y: (h * betas[1].item()).relu().mean() + betas[0].item()), (X, Y))


@pytest.mark.parametrize("dropout", [0.0, 1e-12, 0.5])
def test_a_recurrent_layer_that_drops_out_between_its_layers(dropout: float) -> None:
    layer = nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, dropout=dropout)
    model = Calls(lambda s, h, y: s.layer(h)[0].pow(2).sum() + s.layer(h)[1][1].sum(), layer)
    args = (torch.randn(6, 5, 4), torch.randint(0, 4, (6,)))
    made = ready(model, args) if dropout > 0.1 else assert_as_eager(model, args)
    assert sum(op.target == "gp.dropout" for op in made.source.ops) == 2 * (dropout > 0)
    assert_close(in_parts(made, args, (1, 3, 2)), in_parts(made, args, (6,)))


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


def test_what_returns_its_argument_keeps_the_gradient_outside_of_no_grad() -> None:
    """Tracing goes on with the result of a cast that did nothing, made where there are no gradients."""

    def uses_again(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (h.float().contiguous() @ s.linear.weight.to(h.dtype)).amax()
        return (h @ s.linear.weight).square().mean() * scale + (s.vector * scale).sum()

    assert_as_eager(Calls(uses_again), (X, Y))


def test_the_mode_of_each_submodule_is_kept_and_restored() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5))
    model[0].eval()
    drops = [op for op in capture(model, (X,), {}).graph.ops if "dropout" in op.target]
    assert [op.args[2] for op in drops] in ([True], [False, True])
    captured = capture(model, (X,), {}, training=False)
    assert not any(op.args[2] for op in captured.graph.ops if "dropout" in op.target)
    assert [m.training for m in model] == [False, True, True]


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


def test_modules_and_lines_are_kept() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU())), (X,), {}).graph
    assert [op.module for op in graph.ops if op.target.startswith("aten.")] == ["0", "1.0"]
    graph = capture(Calls(lambda s, h, y: h * 2), (X, Y), {}).graph
    assert graph.ops[-2].source.startswith("one_device.py:")


class Weighing(nn.Module):
    """Numbers in a plain attribute, of a global name, and made as the forward goes."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, device=device)
        self.classes = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = torch.tensor([[1.0, 1.0, 2.5]], device=x.device) + torch.arange(3) * x.new_tensor(0.5)
        weight = self.classes * made[0] * SHARES
        return nn.functional.cross_entropy(self.linear(x), y.clamp(max=2), weight=weight)


SHARES = torch.tensor([0.5, 0.25, 1.0])


def test_numbers_of_a_model_without_weights_keep_their_values() -> None:
    made, model = ready(Weighing("meta"), (X, Y)), Weighing("cpu")
    (loss,) = replace(made, model=model).device().forward((X, Y), {})
    torch.testing.assert_close(loss, model(X, Y))
    assert SHARES.device == torch.device("cpu")
