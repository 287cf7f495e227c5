"""Settings of optimisers are those of one device: by name, over steps, and whatever a rank holds."""

import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Line, check_training, cpus, force, sent_whole, straight
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

import graphpar
from graphpar.errors import RunError
from graphpar.optimizer_probe import OptimizerFactory
from graphpar.runtime.checkpoint import read_manifest
from graphpar.runtime.optimizers import Intended, Recipe, made_as_intended, on_one_device
from graphpar.training import Training

sent_whole(__name__)
BATCH = (torch.randn(6, 4), torch.randn(6, 4))


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(4, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4, bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x))))
        result: torch.Tensor = nn.functional.mse_loss(self.head(hidden), y)
        return result


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, betas=(0.8, 0.9))


def by_name(name: str, parameter: nn.Parameter) -> dict[str, Any] | None:
    if name.startswith("head"):
        return {"lr": 0.2, "betas": (0.5, 0.6)}
    return {"weight_decay": 0.0} if parameter.ndim < 2 else None


def warm(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=9)  # changes momentum, too


@pytest.mark.distributed
@pytest.mark.parametrize("lines", [straight(3, 2), (Line((1, 2), 4),)])
def test_settings_by_name_and_a_scheduler(lines: tuple[Line, ...]) -> None:
    training = Training(optimizer=adamw, settings=by_name, scheduler=warm, max_grad_norm=1.0)
    check_training(Net(), BATCH, lines=lines, train=training, steps=4, by_op=True)


@pytest.mark.distributed
def test_zero_steps_rows_with_the_same_settings() -> None:
    training = Training(optimizer=adamw, settings=by_name, scheduler=warm, zero=1)
    check_training(Net(), BATCH, lines=(Line((2,), 2),), train=training, steps=3, zero=1)


@pytest.mark.distributed
@pytest.mark.parametrize("scheduler", [warm, pytest.param(cycle, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_in_the_schedule(
    tmp_path: Path, scheduler: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    training = Training(optimizer=adamw, settings=by_name, scheduler=scheduler)

    def start(*lines: Line) -> Any:
        return force(Net(), BATCH, lines=lines, train=training, by_op=True).start()

    with start(*straight(2)) as job:
        for _ in range(3):
            job.step(*BATCH)
        job.save(tmp_path / "c")
        wanted = [float(job.step(*BATCH)) for _ in range(3)]
    with start(*straight(3, 2)) as job:
        job.step(*BATCH)
        job.load(tmp_path / "c")
        assert [float(job.step(*BATCH)) for _ in range(3)] == pytest.approx(wanted, rel=1e-5)


def refused(optimizer: OptimizerFactory, message: str, **more: Any) -> None:
    def start() -> None:
        training = Training(optimizer=optimizer, **more)
        graphpar.compile(Net(), cpus(1), BATCH, train=training, measure_s=0)

    with pytest.raises(ValueError, match=message):
        start()


def test_what_would_train_nothing_is_refused() -> None:
    model = Net()
    refused(lambda p: torch.optim.SGD(model.parameters(), lr=0.1), "parameters that it was not given")
    refused(lambda p: torch.optim.SGD([q for q in p if q.ndim > 9] or [{"params": []}]), "left out all")
    refused(adamw, "made a ReduceLROnPlateau", scheduler=ReduceLROnPlateau)
    refused(adamw, "must be a function, not 'cosine'", scheduler="cosine")
    refused(adamw, r"gave \{'lr': <built-in.*for first.weight", settings=lambda n, p: {"lr": print})
    frozen = Net().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        graphpar.compile(frozen, cpus(1), BATCH, train=Training(optimizer=adamw), measure_s=0)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1 / len(list(p))),
        lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.5}, {"params": p[1:]}], lr=0.1),
    ],
)
def test_what_goes_by_place_is_refused(optimizer: Any) -> None:
    training = Training(optimizer=optimizer)
    with pytest.raises(RunError, match=r"(?s)treats \S+ otherwise.*Training\(settings"):
        force(Net(), BATCH, lines=straight(2), train=training, by_op=True).start()


@pytest.mark.distributed
def test_what_is_left_out_may_be_all_a_rank_holds() -> None:
    training = Training(optimizer=lambda p: torch.optim.SGD([q for q in p if q.shape != (4, 8)], lr=0.1))
    lines = (Line((1, 1), cuts=(4,)),)
    check_training(Net(bias=False), BATCH, lines=lines, train=training, by_op=True)


def test_every_rank_has_the_same_groups_in_the_same_order() -> None:
    def by_group(optimizer: torch.optim.Optimizer) -> LRScheduler:
        def rate(number: int, _step: int) -> float:
            return 0.5**number

        return LambdaLR(optimizer, [partial(rate, n) for n in range(len(optimizer.param_groups))])

    training = Training(optimizer=adamw, settings=by_name, scheduler=by_group)
    parameters = dict(Net().named_parameters())
    whole, _ = on_one_device(training, parameters)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    intended = Intended.of(training, shapes, dict.fromkeys(shapes, torch.float32))
    held = {"head.weight": parameters["head.weight"]}
    recipe = Recipe(adamw, by_group)
    part = made_as_intended(recipe, held, *intended.part(held))
    assert part is not None
    recipe.scheduled(part)
    rates = [[group["lr"] for group in made.param_groups] for made in (part, whole)]
    assert rates[0] == rates[1] and len(rates[0]) == 3


def test_what_a_checkpoint_says_of_its_step_is_of_one_turn(tmp_path: Path) -> None:
    made = force(Net(), BATCH, lines=straight(1), train=Training(optimizer=adamw))
    with made.start() as job:
        job.step(*BATCH)
        with job._turn:
            saver = threading.Thread(target=job.save, args=(tmp_path / "kept",))
            saver.start()
            saver.join(0.1)
            assert saver.is_alive()  # waits for its turn
            job.step(*BATCH)
        saver.join()
    assert read_manifest(tmp_path / "kept").step == 2
