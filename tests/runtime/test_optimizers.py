"""Optimisers that are not elementwise: gathered where that is exact, otherwise kept apart or refused."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from by_name import Common
from helpers import Line, check_training, force, sent_whole
from torch import nn

import graphpar
from graphpar.optimizer_memory import update_memory
from graphpar.optimizer_probe import optimizer_traits
from graphpar.runtime.optimizers import Intended
from graphpar.training import Training
from graphpar.verify import reference_for, train_on_one_device

sent_whole(__name__)

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
BATCH = (torch.randn(6, 6), torch.randn(6, 4))
CPUS = {"devices": [{"kind": "cpu", "count": 2}]}


class Matrices(nn.Module):
    """Weights of two dimensions alone, as Muon wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
        self.out = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x + self.down(torch.relu(self.up(x)))
        result: torch.Tensor = nn.functional.mse_loss(self.out(h), y)
        return result


class Lamb(torch.optim.Optimizer):
    """Adam's direction, as long as the weight is: its step needs the norms of whole weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                first = state.setdefault("first", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                second = state.setdefault("second", torch.zeros_like(p)).lerp_(p.grad.square(), 0.01)
                way = first / (second.sqrt() + 1e-4)
                p.sub_(way, alpha=group["lr"] * float(p.norm() / way.norm()))


class Factored(torch.optim.Optimizer):
    """Means of rows for large matrices, all squares for others, as factored optimisers do."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            squares = p.grad.square()
            p.sub_(p.grad / (squares.mean(1, True) if min(p.shape) >= 128 else squares).sqrt())


class Clipped(torch.optim.SGD):
    """Clips by the norm of all gradients together, but only large ones."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 500.0)
        return super().step(closure)


class Centred(torch.optim.SGD):
    """Takes the mean off the gradients of kernels alone."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad -= p.grad.mean((1, 2, 3), True) if p.ndim == 4 else 0.0
        return super().step(closure)


class Noisy(torch.optim.SGD):
    """Adds a little noise."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p), alpha=1e-6)


@pytest.mark.parametrize(
    "factory", [Factored, Centred, partial(torch.optim.Adafactor, lr=1e-6), partial(Lamb, lr=1e-7)]
)
def test_what_needs_whole_weights_is_found_out(factory: Factory) -> None:
    """Whatever shapes it looks at, and however short its steps are."""
    traits = optimizer_traits(factory)
    assert not traits.elementwise and traits.separable


def test_what_joins_parameters_when_gradients_are_large_is_found_out() -> None:
    assert not optimizer_traits(Clipped).separable


def test_steps_at_random_are_refused_by_name_on_several_devices() -> None:
    training = Training(optimizer=Noisy)
    with pytest.raises(ValueError, match=r"Noisy cannot train on several devices.*drift apart"):
        graphpar.plan(Matrices(), CPUS, BATCH, train=training)
    graphpar.plan(Matrices(), {"devices": [{"kind": "cpu"}]}, BATCH, train=training, measure_s=0)


ELEMENTWISE = "SGD Adam AdamW RMSprop Adagrad Adadelta NAdam RAdam Adamax ASGD Rprop".split()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimisers_step_on_slices(name: str) -> None:
    assert optimizer_traits(partial(getattr(torch.optim, name), lr=0.01)).by_slices


def first_apart(
    number: int, parameters: Iterable[nn.Parameter], each: bool = False
) -> torch.optim.Optimizer:
    """Adam with some parameters in a group of their own, or every one."""
    given = list(parameters)
    parts = [[p] for p in given] if each else [given[:number], given[number:]]
    return torch.optim.AdamW([{"params": part} for part in parts])


UPDATES: dict[Factory, float] = {
    partial(torch.optim.SGD, lr=0.1, momentum=0.9): 0.0,
    partial(torch.optim.SGD, lr=0.1, weight_decay=0.1): 1.0,
    partial(torch.optim.Adam, weight_decay=0.1, maximize=True): 1.0,
    partial(torch.optim.Adadelta, lr=0.1): 2.0,
    partial(torch.optim.AdamW, foreach=False): 0.0,
    partial(torch.optim.AdamW, lr=torch.tensor(0.1)): 0.0,
    # Left the choice, torch goes parameter by parameter.
    partial(torch.optim.Adafactor, lr=0.1): 0.0,
    partial(torch.optim.Adafactor, lr=0.1, foreach=True): 1.0,
    Lamb: 0.0,
    **{partial(first_apart, number): 1.0 for number in (2, 3, 4, 6, 9)},
    partial(first_apart, 1, each=True): 0.0,
    partial(torch.optim.AdamW, lr=-1.0): 1.0,  # cannot be tried
}
"""What updates of GPUs take, per byte of gradients."""


@pytest.mark.parametrize(("factory", "share"), UPDATES.items())
def test_what_an_update_takes_on_a_gpu_is_seen(factory: Factory, share: float) -> None:
    assert update_memory(factory, on_gpu=True).share == share


def test_updates_on_processors_count_where_activations_are_small() -> None:
    """Tensor by tensor it is two copies of the largest one, all together a value for every gradient."""
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64), nn.Linear(64, 512, bias=False))
    largest, every = 4 * 64 * 512, 4 * sum(p.numel() for p in model.parameters())
    batch = torch.randn(1, 256), torch.randn(1, 512)
    above = []
    for how in ("fused", "", "foreach"):
        settings: dict[str, Any] = {how: True} if how else {}
        training = Training(optimizer=partial(torch.optim.AdamW, **settings), loss=nn.functional.mse_loss)
        cluster = {"devices": [{"kind": "cpu", "threads": 1}]}
        plan = graphpar.plan(model, cluster, batch, train=training, measure_s=0)
        (peak,) = plan.predicted_peak_bytes.values()
        above.append(peak - plan.timing.ranks[0].resident_bytes)
    fused, one_by_one, together = above
    assert fused < largest
    assert (one_by_one, together) == pytest.approx((2 * largest, every))


def test_what_a_script_makes_tensors_of_is_not_what_optimisers_are_tried_on() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert update_memory(torch.optim.AdamW, on_gpu=True).share == 1.0
            assert update_memory(partial(torch.optim.Adadelta, lr=0.1), on_gpu=True).share == 2.0
            assert optimizer_traits(torch.optim.AdamW).by_slices
    finally:
        torch.set_default_dtype(before)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("factory", [partial(torch.optim.Muon, lr=0.02), Lamb], ids=["Muon", "Lamb"])
def test_what_needs_whole_weights_has_them_in_a_group(factory: Factory) -> None:
    torch.manual_seed(0)
    model, training = Matrices(), Training(optimizer=factory)
    lines = (Line((1, 1), 2, cuts=(1,), groups=((0.6, 0.4), ())),)
    check_training(model, BATCH, lines=lines, train=training, steps=3, rounding=1e-3)
    plan = force(model, BATCH, lines=(Line((2,), 2),), train=training, zero=1).plan
    with pytest.raises(ValueError, match=r"(Muon|Lamb) needs whole parameters"):
        graphpar.compile(model, plan.cluster, BATCH, train=training, plan=plan)


@pytest.mark.distributed
def test_what_joins_parameters_gets_the_model_uncut() -> None:
    torch.manual_seed(0)
    model, training = Matrices(), Training(optimizer=partial(Common, lr=1.0))
    cut = force(model, BATCH, lines=(Line((1, 1), 2, cuts=(1,)),), train=training)
    with pytest.raises(ValueError, match="Common cannot train under this plan"):
        graphpar.compile(model, cut.cluster, BATCH, train=training, plan=cut.plan)
    plan = graphpar.plan(model, CPUS, BATCH, train=training, measure_s=0)
    assert {len(pipeline.stages) for pipeline in plan.partition.pipelines} == {1}
    assert any("the model is not cut: a step of Common" in note for note in plan.notes)
    both = force(model, BATCH, lines=(Line((2,), 2),), train=training)
    with both.start() as job:
        losses = [float(job.step(*BATCH)) for _ in range(3)]
    reference = reference_for(model, both.prepared, training)
    assert losses == pytest.approx(list(train_on_one_device(reference, training, BATCH, {}, 3)), rel=1e-4)


def test_a_closure_is_refused_by_name() -> None:
    training = Training(optimizer=lambda p: torch.optim.LBFGS(p))
    with pytest.raises(ValueError, match=r"LBFGS cannot train a parallel job.*closure"):
        graphpar.plan(Matrices(), CPUS, BATCH, train=training)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4)])
def test_settings_are_found_for_parameters_of_any_shape(shape: tuple[int, ...]) -> None:
    training = Training(optimizer=partial(torch.optim.SGD, lr=0.25))
    made = Intended.of(training, {"scale": shape}, {"scale": torch.float32})
    assert "0.25" in made.settings["scale"]


def test_an_optimiser_that_needs_values_is_not_compared_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def scaled(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        (only,) = parameters
        only.data.div_(
            float(only.detach().norm())
        )  # neither without values nor without memory of its own
        return torch.optim.SGD([only], lr=0.25)

    with caplog.at_level(logging.WARNING, "graphpar.job"):
        made = Intended.of(Training(optimizer=scaled), {"w": (3, 2)}, {"w": torch.float32})
    assert not made.settings
    assert "is not checked" in caplog.text and "Error: " in caplog.text
