"""A job computes what one device computes, however the model and the batch are split."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    TRAINING,
    Line,
    check_inference,
    check_training,
    compare_states,
    force,
    sgd,
    state_of,
    straight,
)
from torch import nn
from torch.utils import _pytree

from graphpar.partition.types import ScheduleName
from graphpar.training import Training
from graphpar.verify import reference_for, train_on_one_device, verify


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.up(self.norm(x)).relu()
        result: torch.Tensor = x + self.down(hidden)
        return result


class Language(nn.Module):
    """Tied weights in the first and the last stage."""

    def __init__(self, words: int = 20, width: int = 8, layers: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.drop(block(x))
        logits = self.head(x)
        result: torch.Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return result


def sentences(batch: int = 8, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and labels; unequally many labels are ignored, all of them in the first samples."""
    ids = torch.randint(0, 20, (batch, length))
    labels = torch.randint(0, 20, (batch, length))
    labels[torch.rand(batch, length) < 0.5] = -100
    labels[:2] = -100
    return ids, labels


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
def test_stages_and_microbatches(microbatches: int, schedule: ScheduleName) -> None:
    stages = 1 + microbatches % 4
    check_training(Language(), sentences(), lines=straight(stages, microbatches), schedule=schedule)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param((Line((2,), 3),), id="one stage, replicas 2:1"),
        pytest.param((Line((1, 2), 3),), id="second stage replicated"),
        pytest.param((Line(((1, 2, 1), 1), 4),), id="first stage replicated 1:2:1"),
        pytest.param((Line(((3, 1), (1, 3)), 4),), id="both stages replicated 3:1, 1:3"),
        pytest.param((Line((1,), 2, 5), Line((1,), 1, 3)), id="two pipelines 5:3"),
        pytest.param((Line((1, 1), 3, 6, cuts=(1,)), Line((1,), 1, 2)), id="unlike pipelines 6:2"),
        pytest.param((Line((1, 2), 2, 6), Line((1,), 1, 2)), id="pipelines and replicas"),
    ],
)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_unequal_shares(lines: tuple[Line, ...], schedule: ScheduleName) -> None:
    check_training(Language(), sentences(), lines=lines, schedule=schedule)


def test_dropout_does_not_depend_on_the_plan() -> None:
    model, batch = Language(drop=0.3), sentences()
    check_training(model, batch, lines=straight(3, 4))
    check_training(model, batch, lines=(Line((1, 2), 2, 6), Line((1,), 1, 2)))


def test_adam_with_clipping_over_several_steps() -> None:
    training = Training(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01), max_grad_norm=0.3)
    model, batch = Language(), sentences()
    forced = force(model, batch, lines=(Line((1, 2), 2, 5), Line((1,), 1, 3)), train=training)
    with forced.start() as job:
        losses = [float(job.step(*batch)) for _ in range(5)]
    reference = reference_for(model, forced.prepared, training)
    expected = list(train_on_one_device(reference, training, batch, {}, 5))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


def test_clipping_acts() -> None:
    training = Training(optimizer=sgd, max_grad_norm=0.01)
    check_training(Language(), sentences(), lines=straight(3, 2), train=training)


def test_every_gradient() -> None:
    model, batch = Language(drop=0.1), sentences()
    forced = force(model, batch, lines=(Line((1, 2), 4, 5), Line((1,), 1, 3)))
    report = verify(model, forced.cluster, batch, train=TRAINING, plan=forced.plan)
    assert report.equal, str(report)


def test_loss_callable_takes_the_last_argument() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    training = Training(optimizer=sgd, loss=nn.functional.cross_entropy)
    batch = torch.randn(7, 6), torch.randint(0, 3, (7,))
    lines = straight(2, 3)
    check_training(model, batch, lines=lines, train=training, by_op=True)
    with force(model, batch, lines=straight(1), train=training).start() as job:
        torch.testing.assert_close(job(batch[0]), model(batch[0]))


# --- the shape of models ---


class Skips(nn.Module):
    """Skips over stages that are no neighbours, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = self.down1(x).relu()
        b = self.down2(nn.functional.max_pool2d(a, 2)).relu()
        c = self.middle(b).relu()
        d = self.up2(torch.cat([b, c], 1)).relu()
        wide = nn.functional.interpolate(d, scale_factor=2.0)
        result: torch.Tensor = nn.functional.mse_loss(self.up1(torch.cat([a, wide], 1)), y)
        return result


@pytest.mark.parametrize("stages", [2, 4])
def test_skips_over_stages(stages: int) -> None:
    batch = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8)
    check_training(Skips(), batch, lines=straight(stages, 2), by_op=True)


class Crossings(nn.Module):
    """Bool and int values that cross stages, made from trained values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        positive, best = a > 0, a.argmax(-1)
        b = self.second(a.tanh())
        c = torch.where(positive, b, 0.5 * b)
        d = self.third(c).gather(1, best[:, None]).squeeze(1)
        result: torch.Tensor = ((d - y) ** 2).mean()
        return result


def test_bool_and_int_values_cross() -> None:
    check_training(Crossings(), (torch.randn(6, 6), torch.randn(6)), lines=straight(3, 2), by_op=True)


class Twice(nn.Module):
    """One module called twice, far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.between, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.between(self.shared(x).tanh()).tanh()
        result: torch.Tensor = self.last(self.shared(h).tanh()).square().mean()
        return result


@pytest.mark.parametrize("lines", [straight(3, 2), (Line((1, 1, 1), 1, 3), Line((1,), 2, 3))])
def test_shared_module(lines: tuple[Line, ...]) -> None:
    check_training(Twice(), (torch.randn(6, 5),), lines=lines, by_op=True)


def test_frozen_parameters_stay() -> None:
    model = Language()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "blocks.1" in name or "norm" in name
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = sentences()
    check_training(model, batch, lines=straight(3, 2))
    with force(model, batch, lines=straight(3, 2)).start() as job:
        job.step(*batch)
        state = job.state_dict()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


class Normed(nn.Module):
    """Batch statistics: the batch stays whole, running statistics are updated once."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.up1, self.down1 = nn.Linear(4, 9), nn.Linear(9, 4)
        self.up2, self.down2 = nn.Linear(4, 9), nn.Linear(9, 4)
        self.norm1, self.norm2 = (nn.BatchNorm1d(9, affine=affine) for _ in range(2))
        self.register_buffer("scale", torch.full((4,), 1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down1(self.norm1(self.up1(x)).relu()) * self.scale
        result: torch.Tensor = (self.down2(self.norm2(self.up2(h)).relu()) * self.scale).square().mean()
        return result


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training(affine: bool) -> None:
    model, batch = Normed(affine), (torch.randn(9, 4),)
    check_training(model, batch, lines=straight(2))
    forced = force(model, batch, lines=straight(2))
    with forced.start() as job:
        job.step(*batch)
        state, result = job.state_dict(), job(*batch)
    assert int(state["norm1.num_batches_tracked"]) == 1
    assert not torch.equal(state["norm2.running_mean"], model.state_dict()["norm2.running_mean"])
    after = Normed(affine)
    after.load_state_dict(state)
    torch.testing.assert_close(result, after.eval()(*batch))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 20)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        logits = self.head(hidden).flatten(0, 1)
        result: torch.Tensor = nn.functional.cross_entropy(logits, labels.flatten())
        return result


def test_lstm() -> None:
    check_training(Recurrent(), sentences(6), lines=straight(2, 2))


# --- inputs, results, inference ---


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    name: str


_pytree.register_pytree_node(
    Answer,
    lambda a: ([a.logits, a.hidden, a.name], None),
    lambda parts, _: Answer(*parts),
    serialized_type_name="test_equality.Answer",
)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Structured(nn.Module):
    """Several inputs in nested structures and several results of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, parts: dict[str, Any], *, scale: float, extra: Pair) -> dict[str, Any]:
        a = self.first(parts["x"][0] + parts["x"][1]).tanh()
        b = self.second(a).tanh()
        c = self.third(b) * scale
        return {
            "answer": Answer(c, (a, b), "graphpar"),
            "pair": Pair(extra.left * 2, b.argmax(-1)),
            "list": [a > 0, None, 7, (c.sum(-1),)],
            "weight": self.first.bias,
            "same": extra.right,
        }


@pytest.mark.parametrize("lines", [straight(3, 3), (Line((2, 1), 3, 4), Line((1,), 2, 3))])
def test_nested_inputs_and_results(lines: tuple[Line, ...]) -> None:
    parts = {"x": (torch.randn(7, 4), torch.randn(7, 4))}
    extra = Pair(torch.randn(7, 2), torch.randint(0, 9, (7,)))
    check_inference(Structured(), (parts,), {"scale": 0.5, "extra": extra}, lines=lines, by_op=True)


def test_inference_uses_the_weights_of_today() -> None:
    model, batch = Language(), sentences()
    with force(model, batch, lines=(Line((1, 1), 2, 5), Line((1,), 1, 3))).start() as job:
        first = job(*batch)
        for _ in range(3):
            job.step(*batch)
        last, state = job(*batch), job.state_dict()
    torch.testing.assert_close(first, model(*batch).detach())
    trained = Language()
    trained.load_state_dict(state)
    torch.testing.assert_close(last, trained(*batch).detach())
    assert last < first


def test_inference_calls_of_several_forms() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, twice: bool = False) -> Any:
            h = self.down(self.up(x).relu()) * (2 if twice else 1)
            return h if y is None else nn.functional.mse_loss(h, y)

    model, x, y = Either(), torch.randn(6, 4), torch.randn(6, 4)
    with force(model, (x, y), lines=straight(1, 2)).start() as job:
        job.step(x, y)
        after = Either()
        after.load_state_dict(job.state_dict())
        for args, kwargs in (((x,), {}), ((x, y), {}), ((x,), {"twice": True}), ((x,), {"twice": False})):
            torch.testing.assert_close(job(*args, **kwargs), after(*args, **kwargs).detach())


class Detached(nn.Module):
    """A parameter that no gradient reaches: weight decay must leave it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 4)
        self.still = nn.Parameter(torch.ones(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.down(self.up(x).relu() * self.still.detach()).square().mean()
        return loss


def test_parameter_without_gradient_stays() -> None:
    training = Training(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5))
    batch = (torch.randn(6, 4),)
    with force(Detached(), batch, lines=(Line((2,), 2),), train=training).start() as job:
        job.step(*batch)
        assert torch.equal(job.state_dict()["still"], torch.ones(9))


def test_state_has_the_names_and_ties_of_the_model() -> None:
    model, batch = Language(), sentences()
    model.register_buffer("unused", torch.arange(3.0))
    model.register_buffer("hidden", torch.arange(3.0), persistent=False)
    with force(model, batch, lines=straight(3, 2)).start() as job:
        before = job.state_dict()
        job.step(*batch)
        after = job.state_dict()
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(after["head.weight"], after["embed.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_loaded_state_is_used() -> None:
    model, other, batch = Language(), Language(), sentences()
    other.register_buffer("unused", torch.ones(2))
    model.register_buffer("unused", torch.zeros(2))
    with force(model, batch, lines=(Line((1, 2), 2, 5), Line((1,), 1, 3))).start() as job:
        job.step(*batch)
        job.load_state_dict(other.state_dict())
        torch.testing.assert_close(job(*batch), other(*batch).detach())
        state = job.state_dict()
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.0.up.bias"), "blocks.0.up.bias"),
        (lambda s: s.update({"blocks.0.up.bias": torch.zeros(1)}), "blocks.0.up.bias"),
        (lambda s: s.update({"blocks.9.up.bias": torch.zeros(1)}), "blocks.9.up.bias"),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_bad_state(change: Any, words: str) -> None:
    model, batch = Language(), sentences()
    with force(model, batch, lines=straight(2)).start() as job:
        before = job.state_dict()
        state = dict(model.state_dict())
        change(state)
        with pytest.raises(ValueError, match=words):
            job.load_state_dict(state)
        assert all(torch.equal(v, before[k]) for k, v in job.state_dict().items())


@pytest.mark.parametrize("samples", [3, 5, 16])
def test_batches_of_other_sizes(samples: int) -> None:
    model, batch = Language(drop=0.2), sentences()
    training = TRAINING
    other = sentences(samples)
    forced = force(model, batch, lines=(Line((1, 2), 3, 6), Line((1,), 1, 2)))
    with forced.start() as job:
        losses = [float(job.step(*b)) for b in (batch, other, batch)]
        assert job.last_step is not None
        state = job.state_dict()
    reference = reference_for(model, forced.prepared, training)
    optimizer = training.optimizer(reference.parameters)
    expected = []
    for step, b in enumerate((batch, other, batch)):
        (loss,) = reference.forward(b, {}, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=2e-5)
    compare_states(state, state_of(reference, forced), model.state_dict())


def test_one_sample_at_a_time() -> None:
    batch = sentences(3)
    batch[1][:] = torch.randint(0, 20, (3, 5))
    with force(Language(), batch, lines=straight(2, 3)).start() as job:
        loss = job.step(batch[0][:1], batch[1][:1])
    assert torch.isfinite(loss)


# --- wrong calls ---


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda i, la: ((i.float(), la), {}), "args_0"),
        (lambda i, la: ((i, la[:, :3]), {}), "args_1"),
        (lambda i, la: ((i[:4], la), {}), "number of samples"),
        (lambda i, la: ((i[:0], la[:0]), {}), "samples"),
        (lambda i, la: ((i,), {}), "structure"),
        (lambda i, la: ((i,), {"labels": la}), "labels"),
        (lambda i, la: ((i, 3), {}), r"args\[1\]"),
    ],
    ids=["dtype", "shape", "unequal", "empty", "missing", "keyword", "no tensor"],
)
def test_wrong_batches_name_the_input(bad: Any, words: str) -> None:
    model, batch = Language(layers=1), sentences()
    with force(model, batch, lines=straight(1)).start() as job:
        args, kwargs = bad(*batch)
        with pytest.raises(ValueError, match=words):
            job.step(*args, **kwargs)
        assert torch.isfinite(job.step(*batch))


def test_inference_job_does_not_train() -> None:
    forced = force(nn.Linear(3, 2), (torch.randn(4, 3),), lines=straight(1), train=None)
    with forced.start() as job, pytest.raises(ValueError, match="Training"):
        job.step(torch.randn(4, 3))
