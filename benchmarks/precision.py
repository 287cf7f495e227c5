"""Error and step time of formats chosen under a budget, against float32, all bfloat16 and autocast.

    python benchmarks/precision.py [--json] [--rounds N] [--width W] [--layers L]

Every variant trains the same GPT on the same batch with SGD, on one thread. Rounds are interleaved, so
that whatever disturbs the machine disturbs all alike; ratios are medians over rounds of times within a
round. "Equal error" is the loosest budget whose measured error is no larger than autocast's (by 2 %).
Errors are relative, of the loss and of all gradients together in the Euclidean norm, against float32.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click
import torch
from torch import nn

import graphpar
from graphpar.commands.output import print_json
from graphpar.examples.gpt import GPT
from graphpar.measure import calibrate
from graphpar.partition.formats import Errors
from graphpar.plans import Plan
from graphpar.preparation import prepare, trial_of
from graphpar.runtime.job import CompiledModel
from graphpar.sensitivity import true_errors
from graphpar.training import Training

LEARNING_RATE = 1e-3
CLUSTER = {"devices": [{"kind": "cpu", "count": 1}]}
BUDGETS = (1.0, 0.3, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 7e-3, 5e-3, 3e-3, 2e-3, 1e-3)

EQUAL = 0.02
"""Errors that differ by less than this share are equal."""

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[], float]


class Eager:
    """The stock training loop, under autocast or with the whole model in a format."""

    def __init__(self, model: nn.Module, batch: Batch, *, autocast: bool, whole: torch.dtype) -> None:
        self.model = copy.deepcopy(model).to(whole)
        self.batch, self.autocast = batch, autocast
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def loss(self) -> torch.Tensor:
        """Forward and backward."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss: torch.Tensor = self.model(*self.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> float:
        """Seconds of one step."""
        began_s = time.perf_counter()
        self.loss()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began_s

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and all gradients, without a step."""
        self.optimizer.zero_grad()
        loss = self.loss().double()
        gradients = [p.grad.double().flatten() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return loss, torch.cat(gradients)


def errors_of(one: Eager, reference: Eager) -> Errors:
    """Relative errors of loss and gradient."""
    (loss, gradient), (wanted, exact) = one.numbers(), reference.numbers()
    return float((loss - wanted).abs() / wanted.abs()), float((gradient - exact).norm() / exact.norm())


def job_step(job: CompiledModel, batch: Batch) -> float:
    """Seconds of one step of a job, from its worker's start to its end."""
    job.step(*batch)
    assert job.last_step is not None
    return job.last_step.seconds


def formats_of(plan: Plan) -> tuple[str, ...]:
    """The format of every unit of a plan of one stage."""
    return tuple(f for stage in plan.partition.pipelines[0].stages for f in stage.formats)


def interleaved(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            spent = step()
            if number >= 2:
                seconds[name].append(spent)
    return seconds


@click.command()
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--width", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(rounds: int, width: int, layers: int, batch_size: int, as_json: bool) -> None:
    """Run the comparison."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT(width=width, layers=layers, heads=width // 64, length=128)
    ids = torch.randint(0, 256, (batch_size, 129))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    result = compare(model, batch, rounds)
    result["model"] = {"width": width, "layers": layers, "batch_size": batch_size, "length": 128}
    if as_json:
        print_json(result)
        return
    for name, row in result["variants"].items():
        click.echo(
            f"{name:<22} errors {row['output_error']:.2g} {row['gradient_error']:.2g}  "
            f"median step {row['median_step_s'] * 1e3:.2f} ms  "
            f"against autocast {row['ratio_to_autocast']:.3f}"
        )


def compare(model: nn.Module, batch: Batch, rounds: int) -> dict[str, Any]:
    """Errors and times of all variants."""
    calibration = calibrate(show_progress=False)
    training = Training(optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE), microbatches=1)
    eager = {
        "eager float32": Eager(model, batch, autocast=False, whole=torch.float32),
        "eager bfloat16": Eager(model, batch, autocast=False, whole=torch.bfloat16),
        "autocast bfloat16": Eager(model, batch, autocast=True, whole=torch.float32),
    }
    errors = {name: errors_of(one, eager["eager float32"]) for name, one in eager.items()}
    trial = trial_of(model, prepare(model, batch, {}, training), training)

    def plan(precision: str, budget: float = 1e-2) -> Plan:
        return graphpar.plan(
            model, CLUSTER, batch, train=training, precision=precision,
            precision_budget=budget, calibration=calibration,
        )  # fmt: skip

    def add(name: str, made: Plan) -> None:
        found = true_errors(trial, batch, {}, formats_of(made))
        assert found is not None
        plans[name], errors[name] = made, found

    plans: dict[str, Plan] = {}
    add("graphpar float32", plan("float32"))
    add("graphpar bfloat16", plan("bfloat16"))
    add("graphpar auto 1e-2", plan("auto"))
    allowed = max(errors["autocast bfloat16"])
    for budget in BUDGETS:
        add("graphpar auto, equal error", plan("auto", budget))
        if max(errors["graphpar auto, equal error"]) <= allowed * (1 + EQUAL):
            break
    jobs = {
        name: graphpar.compile(model, CLUSTER, batch, train=training, plan=made)
        for name, made in plans.items()
    }
    try:
        steps: dict[str, Step] = {name: one.step for name, one in eager.items()}
        steps |= {name: partial(job_step, job, batch) for name, job in jobs.items()}
        seconds = interleaved(steps, rounds)
    finally:
        for job in jobs.values():
            job.close()
    autocast = seconds["autocast bfloat16"]
    variants = {
        name: {
            "output_error": errors[name][0],
            "gradient_error": errors[name][1],
            "median_step_s": statistics.median(times),
            "step_s": times,
            "ratio_to_autocast": statistics.median(
                mine / theirs for mine, theirs in zip(times, autocast, strict=True)
            ),
            "formats": list(formats_of(plans[name])) if name in plans else None,
            "predicted_step_s": plans[name].predicted_step_s if name in plans else None,
        }
        for name, times in seconds.items()
    }
    return {"rounds": rounds, "equal_error_budget": budget, "variants": variants}


if __name__ == "__main__":
    main()
