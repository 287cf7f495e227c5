"""Each kind of bad input is refused with module, line, reason and a remedy, and the remedy works."""

import datetime
import random
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import date
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from one_device import Calls, assert_as_eager
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from graphpar.errors import CaptureError
from graphpar.frontend import state
from graphpar.frontend.capture import capture
from graphpar.frontend.refusals import warn_of_bad_weights

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
STREAM = np.random.default_rng(0)
Function = Callable[[Calls, Tensor, Tensor], Any]


def functional(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    gradient: Tensor = torch.func.grad(lambda t: (t * s.vector).pow(3).sum())(h)
    return gradient.square().mean()


def by_autograd(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad((h * s.vector).pow(3).sum(), h, create_graph=True)
    return gradient.square().mean()


def conditional(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    made: Tensor = torch.cond(h.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (h,))
    return made.sum()


def both_branches(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return torch.where(h.sum() > 0, h.sin(), h.cos()).sum()


def to_numpy(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h * torch.from_numpy(np.tanh(h.detach().numpy()))).sum()


def in_torch(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h * torch.tanh(h.detach())).sum()


def own_generator(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h * torch.rand(4, 4, generator=torch.Generator().manual_seed(3))).sum()


def fixed_seed(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(3)
    return (h * torch.rand_like(h)).sum()


def fixed_numbers(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h * s.buffer[:4]).sum()


def elsewhere(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h + torch.ones(4).to("cuda:99")).sum()


def here(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    return (h + torch.ones(4).to(h.device)).sum()


def fails_itself(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    raise ValueError("this size is not supported")


REFUSED: tuple[tuple[Function, str, Function | None], ...] = (
    (functional, "torch.func .*torch.autograd.grad", by_autograd),
    (conditional, "torch.cond.*torch.where", both_branches),
    (to_numpy, "NumPy.*compute it with torch", in_torch),
    (own_generator, "torch.Generator.*leave generator= out", None),
    (fixed_seed, "seeds torch with 3 .*buffer", fixed_numbers),
    (elsewhere, "a device that this machine does not have.*x.device", here),
    (fails_itself, "the model itself fails.*on its own.*ValueError: this size is not", None),
)


@pytest.mark.parametrize(("bad", "why", "remedy"), REFUSED, ids=lambda f: getattr(f, "__name__", ""))
def test_refused_by_name_with_a_remedy_that_works(
    bad: Function, why: str, remedy: Function | None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=why) as caught:
        capture(Calls(bad), (X, Y), {}, loss="returned")
    assert "(top)" in str(caught.value) and ".py:" in str(caught.value)
    assert capfd.readouterr() == ("", "")
    if remedy is not None:
        assert_as_eager(Calls(remedy), (X, Y))


def shifted(moment: float) -> float:
    return moment % 7.0


FROZEN: dict[str, Callable[[], float]] = {
    "time.time": lambda: shifted(time.time()),
    "perf_counter": lambda: shifted(perf_counter()),
    "time.monotonic_ns": lambda: shifted(time.monotonic_ns() / 1e9),
    "time.localtime": lambda: time.localtime().tm_yday,
    "datetime.now": lambda: datetime.datetime.now().month,
    "date.today": lambda: date.today().day,
    "uuid.uuid4": lambda: uuid.uuid4().int % 1000,
    "default_rng.. without a seed": lambda: np.random.default_rng().random(),
    "random numbers with NumPy": lambda: float(STREAM.random()),
    "draws random numbers": lambda: random.gauss(),
}


@pytest.mark.parametrize("what", FROZEN)
def test_what_the_host_tells_is_not_frozen(what: str) -> None:
    read = FROZEN[what]
    with pytest.raises(CaptureError, match=rf"{what}.*torch.rand") as caught:
        capture(Calls(lambda s, h, y: (h * read()).sum()), (X, Y), {}, loss="returned")
    assert "(top)" in str(caught.value) and "test_bad_input.py:" in str(caught.value)
    assert (time.time, datetime.date) == (time.time, date)
    assert type(datetime.datetime.now()) is datetime.datetime


def test_a_number_of_the_host_that_decides_nothing_may_be_drawn() -> None:
    def skips(below: float) -> Function:
        def run(s: Calls, h: Tensor, y: Tensor) -> Tensor:
            drawn = random.random(), np.random.uniform(0, 1), np.random.rand()
            return (
                h.sum() if min(below, 0) > drawn[0] or drawn[1] < below or not drawn[2] >= 0 else h.mean()
            )

        return run

    assert_as_eager(Calls(skips(0.0)), (X, Y))
    with pytest.raises(CaptureError, match="draws random numbers with NumPy"):
        capture(Calls(skips(0.5)), (X, Y), {}, loss="returned")


def test_a_layer_that_is_converted_to_what_it_is_may_be() -> None:
    def run(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        s.layer = s.layer.to(h.dtype).float()
        result: Tensor = s.layer(h).pow(2).mean()
        return result

    assert_as_eager(Calls(run, nn.Linear(4, 4)), (X, Y))


def test_a_model_may_time_itself_and_be_told_the_time() -> None:
    class Timed(nn.Module):
        spent_s = 0.0

        def forward(self, x: Tensor, now: Tensor) -> Tensor:
            began = time.perf_counter()
            seeded = np.random.default_rng(0).random()
            result = (x * now).sum() * seeded
            self.spent_s = time.perf_counter() - began
            return result

    model = Timed()
    assert not capture(model, (X, torch.tensor(time.time())), {}).unsplittable
    assert model.spent_s == 0.0


class Remembers(nn.Module):
    """Keeps its last state in a plain attribute, a list or a buffer; its result depends on it or not."""

    def __init__(self, how: str, used: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.how, self.used = how, used
        self.past: Any = [] if how == "list" else None
        if how == "buffer":
            del self.past
            self.register_buffer("past", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        past = self.past[-1] if self.how == "list" and self.past else self.past
        if isinstance(past, Tensor) and self.used:
            h = h + past
        if self.how == "list":
            self.past.append(h.detach())
        elif self.how == "buffer":
            self.past.copy_(h.detach())
        else:
            self.past = h.detach()
        return h.square().mean()


@pytest.mark.parametrize("how", ["attribute", "list"])
def test_state_in_plain_attributes_is_refused_where_it_matters(how: str) -> None:
    model = Remembers(how)
    with pytest.raises(CaptureError, match=r"\(Remembers, .*_input.py:\d+\).*\(past\).*register_buffer"):
        capture(model, (X,), {}, loss="returned")
    assert not model.past
    model = Remembers(how, used=False)
    assert not capture(model, (X,), {}, loss="returned").unsplittable
    assert not model.past


SEEN: list[int] = []


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(1)
        return x * len(SEEN)


def test_state_in_the_file_is_refused_and_left_as_it_was() -> None:
    with pytest.raises(CaptureError, match=r"\(Counts, .*_input.py:\d+\).*\(SEEN\)"):
        capture(Counts(), (X,), {})
    assert not SEEN


@pytest.mark.parametrize("how", ["attribute", "list"])
@pytest.mark.parametrize("used", [True, False])
def test_without_values_such_a_state_is_told_where_it_changes_the_graph(
    how: str, used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        model = Remembers(how, used)
    capture(model, (X.to("meta"),), {}, loss="returned")
    assert ("keeps values in plain attributes (past)" in caplog.text) is used


def test_what_changes_no_graph_is_asked_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    answer = state._same_after_a_call

    def ask(model: nn.Module, call: Callable[[], Any], told: Callable[[], Any]) -> bool:
        asked.append(model)
        return answer(model, call, told)

    monkeypatch.setattr(state, "_same_after_a_call", ask)
    with torch.device("meta"):
        model = Remembers("attribute", False)
    for _ in range(2):
        capture(model, (X.to("meta"),), {}, loss="returned")
    assert asked == [model]
    model.used = True
    capture(model, (X.to("meta"),), {}, loss="returned")
    assert len(asked) > 1


def test_the_same_state_in_a_buffer_goes_through() -> None:
    assert_as_eager(Remembers("buffer"), (X,))


def test_an_argument_that_is_written_and_shared_is_refused() -> None:
    class Writes(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a.mul_(2)
            return a + b

    with pytest.raises(CaptureError, match=r"\(top\).*_input.py:.*memory another argument.*clone"):
        capture(Writes(), (X, X), {})
    before = X.clone()
    signature = capture(Writes(), (X, X.clone()), {}).signature
    assert torch.equal(X, before)
    with pytest.raises(ValueError, match=r"Argument args\[0\] is overwritten .* args\[1\], .*clone"):
        signature.bind((X, X[:]), {})


def test_arguments_are_not_written_to_where_values_are_asked_for() -> None:
    def asks(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        y += 1
        return h.sum() if y.sum() > 0 else h.mean()

    y = Y.clone()
    capture(Calls(asks), (X, y), {}, loss="returned")
    assert torch.equal(y, Y)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        (X, {}, r"not a Tensor; give args=\(x,\)"),
        ({"x": X}, {}, r"not a dict; give kwargs="),
        ((X,), [Y], "kwargs= must be a dict"),
    ],
)
def test_arguments_that_python_would_take_apart(args: Any, kwargs: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        capture(Calls(here), args, kwargs)


def yields(s: Calls, h: Tensor, y: Tensor) -> Iterator[Tensor]:
    yield h


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (lambda s, h, y: None, r"returns no tensor that it computes \(None\)"),
        (lambda s, h, y: {"size": 3}, r"returns no tensor that it computes \(3\)"),
        (yields, "returns a generator.*a tuple or a list"),
    ],
)
def test_results_that_hold_no_tensor(output: Function, why: str) -> None:
    with pytest.raises(CaptureError, match=rf"'\(top\)' \(Calls\), .*\.py:\d+.*{why}"):
        capture(Calls(output), (X, Y), {})


def test_a_plain_argument_that_changes_is_named() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0, mode: str = "a") -> Tensor:
            return x * scale if mode == "a" else x

    signature = capture(Scaled(), (X, 2.0), {"mode": "a"}).signature
    with pytest.raises(ValueError, match=r"Argument args\[1\] was 2.0 .* it is 3.0. Compile again"):
        signature.bind((X, 3.0), {"mode": "a"})
    with pytest.raises(ValueError, match=r"Argument mode was 'a' .* it is 'b'"):
        signature.bind((X, 2.0), {"mode": "b"})
    with pytest.raises(ValueError, match=r"Argument args\[1\] was 2.0 .* a tensor of shape \(\)"):
        signature.bind((X, torch.tensor(2.0)), {"mode": "a"})


class Takes(nn.Module):
    """Uses whatever it is given."""

    def __init__(self, own: nn.Module | None = None) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, other: Any = None) -> Tensor:
        if isinstance(other, torch.Generator):
            return x * torch.rand(x.shape, generator=other)
        if isinstance(other, np.ndarray):
            other = torch.as_tensor(other).sum()
        if isinstance(other, (set, tuple)):
            other = torch.tensor(max(other))
        if isinstance(other, Tensor):
            return x * other
        module: Any = other or self.own
        result: Tensor = x * torch.rand(x.shape, generator=None) if module is None else module(x)
        return result


ONES = np.ones((1, 4), np.float32)
ONES_ = torch.from_numpy(ONES)
NO_ARGUMENTS: tuple[tuple[Any, str, Callable[[], tuple[nn.Module, Any]]], ...] = (
    (torch.Generator(), "Generator.*None", lambda: (Takes(), None)),
    (nn.Linear(4, 4), "Linear.*submodule", lambda: (Takes(nn.Linear(4, 4)), None)),
    (torch.sin, "builtin_function.*attribute of the model", lambda: (Takes(nn.Tanh()), None)),
    (pack_sequence([ONES_]), "PackedSequence.*let the model pack", lambda: (Takes(), ONES_)),
    (ONES, r"ndarray.*torch.from_numpy\(array\)", lambda: (Takes(), torch.from_numpy(ONES))),
    ({1, 2}, "set.*a tuple or a list", lambda: (Takes(), (1, 2))),
)


@pytest.mark.parametrize(("given", "why", "remedy"), NO_ARGUMENTS, ids=lambda x: type(x).__name__)
def test_arguments_that_no_graph_takes_are_named_with_a_remedy_that_works(
    given: Any, why: str, remedy: Callable[[], tuple[nn.Module, Any]]
) -> None:
    for args, kwargs, name in (((X, given), {}, r"args\[1\]"), ((X,), {"other": [given]}, "other")):
        with pytest.raises(CaptureError, match=f"Argument {name} is or contains a {why}"):
            capture(Takes(), args, kwargs)
    model, other = remedy()
    captured = capture(model, (X, other), {})
    assert not captured.unsplittable
    with pytest.raises(ValueError, match=r"captured with arguments of the structure .* called with"):
        captured.signature.bind((X, {"a": 1}), {})


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_settings_around_the_capture_do_not_enter_the_graph(around: Any) -> None:
    def without(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.exp()
        return (h * scale).sum()

    model = Calls(without)
    wanted = capture(model, (X, Y), {}, loss="returned").graph
    assert "aten.detach.default" in {op.target for op in wanted.ops}
    with around(), torch.autocast("cpu", torch.bfloat16):
        assert capture(model, (X * 1, Y), {}, loss="returned").graph.ops == wanted.ops


@pytest.mark.parametrize(
    ("given", "why"), [(X.to("meta"), "holds no values"), (X.to_sparse(), "sparse.*to_dense")]
)
def test_tensors_that_cannot_be_sent_are_refused_before_anything_runs(given: Tensor, why: str) -> None:
    captured = capture(nn.Linear(4, 4), (X,), {})
    with pytest.raises(ValueError, match=rf"Argument args\[0\] .*{why}"):
        captured.signature.bind((given,), {})


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.sparse.mm(self.weight, x)
        return product


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (made_for_inference, "'weight' .*inference_mode.*Build the model outside"),
        (Sparse, "'weight' .*sparse_coo.*dense"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "'0.weight' .*lazy.*Call the model once"),
    ],
)
def test_weights_that_no_graph_can_hold_are_named(model: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        capture(model(), (X,), {})


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda out, y: (out - y).square(), r"returned a tensor of shape \(4, 4\).*its mean"),
        (lambda out, y: float((out - y).square().mean()), "returned float.*without float"),
        ("returned", r"a target that the model does not take goes last.*Training\(loss="),
    ],
)
def test_losses_that_train_nothing_are_refused(loss: Any, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        capture(nn.Linear(4, 4), (X, torch.zeros(4, 4)), {}, loss=loss, training=True)


def test_weights_of_nan_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    warn_of_bad_weights(model)
    assert not caplog.records
    next(model[1].parameters()).data[0, 0] = float("nan")
    warn_of_bad_weights(model)
    assert "1.weight" in caplog.text and "0.weight" not in caplog.text
