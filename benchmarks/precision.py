"""Error and step time of formats chosen under a budget, against float32, all bfloat16 and autocast.

    python benchmarks/precision.py [--json] [--rounds N] [--width W] [--layers L] [MODEL ...]

Models: gpt (this repository's example), llama and bert (of transformers, built from a configuration).
Every variant trains the same model on the same batch with SGD, on one thread. Rounds are interleaved, so
that whatever disturbs the machine disturbs all alike; ratios are medians over rounds of times within a
round. "Equal error" is `precision="auto"` with autocast's own error as its budget: its error is no
larger. Errors are relative, of the loss and of all gradients together in the Euclidean norm, against
float32; `estimated` is what the plan takes its units' errors to be together, before it runs the whole.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
from torch import nn

import graphpar
from graphpar.calibration import Calibration
from graphpar.commands.output import print_json
from graphpar.examples.gpt import GPT
from graphpar.frontend.export import find_loss
from graphpar.local.measure import calibrate
from graphpar.partition.formats import Errors
from graphpar.plans.plan import Plan
from graphpar.precision.sensitivity import TrueErrors
from graphpar.preparation import prepare, trial_of
from graphpar.runtime.job import CompiledModel
from graphpar.training import Training

LEARNING_RATE = 1e-3
CLUSTER = {"devices": [{"kind": "cpu", "count": 1}]}
DEFAULT_BUDGET = 1e-2
VOCABULARY = 256

Step = Callable[[], float]


@dataclass(frozen=True)
class Size:
    """How large a model and its batch are."""

    width: int
    layers: int
    batch: int
    length: int = 128


@dataclass(frozen=True)
class Case:
    """A model that returns its loss, and a batch."""

    model: nn.Module
    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, torch.Tensor]


def gpt(size: Size) -> Case:
    """The GPT of the examples."""
    ids = torch.randint(0, VOCABULARY, (size.batch, size.length + 1))
    model = GPT(size.width, size.layers, size.width // 64, size.length)
    return Case(model, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), {})


def llama(size: Size) -> Case:
    """A Llama with half as many heads for keys as for queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size.width, intermediate_size=size.width * 8 // 3,
        num_hidden_layers=size.layers, num_attention_heads=size.width // 32,
        num_key_value_heads=size.width // 64, use_cache=False,
    )  # fmt: skip
    return Case(LlamaForCausalLM(config), (), _tokens(size))


def bert(size: Size) -> Case:
    """A BERT that fills in words, without dropout."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=size.width, intermediate_size=4 * size.width,
        num_hidden_layers=size.layers, num_attention_heads=size.width // 64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Case(BertForMaskedLM(config), (), _tokens(size))


def _tokens(size: Size) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (size.batch, size.length))
    return {"input_ids": ids, "labels": ids.clone()}


CASES: dict[str, Callable[[Size], Case]] = {"gpt": gpt, "llama": llama, "bert": bert}


class Eager:
    """The stock training loop, under autocast or with the whole model in a format."""

    def __init__(self, case: Case, *, autocast: bool = False, whole: torch.dtype = torch.float32) -> None:
        self.case, self.autocast = case, autocast
        self.model = copy.deepcopy(case.model).to(whole)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def loss(self) -> torch.Tensor:
        """Forward and backward."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss = find_loss(self.model(*self.case.args, **self.case.kwargs))
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


def job_step(job: CompiledModel, case: Case) -> float:
    """Seconds of one step of a job, from its worker's start to its end."""
    job.step(*case.args, **case.kwargs)
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
@click.argument("models", nargs=-1, type=click.Choice(list(CASES)))
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--width", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--cached", is_flag=True, help="Use this machine's cached calibration if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    models: tuple[str, ...],
    rounds: int,
    width: int,
    layers: int,
    batch_size: int,
    cached: bool,
    as_json: bool,
) -> None:
    """Run the comparison."""
    torch.set_num_threads(1)
    calibration = (Calibration.cached() if cached else None) or calibrate(show_progress=False)
    size = Size(width, layers, batch_size)
    results = {}
    for name in models or tuple(CASES):
        torch.manual_seed(0)
        results[name] = compare(CASES[name](size), rounds, calibration)
        if not as_json:
            show(name, results[name])
    if as_json:
        size_told = {"width": width, "layers": layers, "batch_size": batch_size, "length": size.length}
        print_json({"rounds": rounds, "size": size_told, "models": results})


def show(name: str, result: dict[str, Any]) -> None:
    """A model's variants as lines."""
    for variant, row in result["variants"].items():
        estimated = row["estimated"]
        told = f"  estimated {estimated[0]:.2g} {estimated[1]:.2g}" if estimated else ""
        click.echo(
            f"{name:<6} {variant:<26} errors {row['output_error']:.2g} {row['gradient_error']:.2g}  "
            f"median step {row['median_step_s'] * 1e3:.2f} ms  "
            f"against autocast {row['ratio_to_autocast']:.3f}{told}"
        )


def compare(case: Case, rounds: int, calibration: Calibration) -> dict[str, Any]:
    """Errors and times of all variants of a model."""
    training = Training(optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE), microbatches=1)
    eager = {
        "eager float32": Eager(case),
        "eager bfloat16": Eager(case, whole=torch.bfloat16),
        "autocast bfloat16": Eager(case, autocast=True),
    }
    errors = {name: errors_of(one, eager["eager float32"]) for name, one in eager.items()}
    prepared = prepare(case.model, case.args, case.kwargs, training)
    true = TrueErrors(trial_of(case.model, prepared, training), case.args, case.kwargs)
    equal = max(errors["autocast bfloat16"])
    asked = {
        "graphpar float32": ("float32", DEFAULT_BUDGET),
        "graphpar bfloat16": ("bfloat16", DEFAULT_BUDGET),
        "graphpar auto, equal error": ("auto", equal),
        "graphpar auto 1e-2": ("auto", DEFAULT_BUDGET),
    }
    plans: dict[str, Plan] = {}
    for name, (precision, budget) in asked.items():
        plans[name] = graphpar.plan(
            case.model, CLUSTER, case.args, case.kwargs, train=training, precision=precision,
            precision_budget=budget, calibration=calibration,
        )  # fmt: skip
        found = true.of(formats_of(plans[name]))
        assert found is not None
        errors[name] = found
    jobs = {
        name: graphpar.compile(case.model, CLUSTER, case.args, case.kwargs, train=training, plan=plan)
        for name, plan in plans.items()
    }
    try:
        steps: dict[str, Step] = {name: one.step for name, one in eager.items()}
        steps |= {name: partial(job_step, job, case) for name, job in jobs.items()}
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
            "budget": asked[name][1] if name in asked and asked[name][0] == "auto" else None,
            "estimated": _estimated(plans.get(name)),
            "formats": list(formats_of(plans[name])) if name in plans else None,
            "predicted_step_s": plans[name].predicted_step_s if name in plans else None,
        }
        for name, times in seconds.items()
    }
    return {"variants": variants}


def _estimated(plan: Plan | None) -> Errors | None:
    """What a plan took its units' errors to be together."""
    report = plan.error_budget if plan is not None else None
    return (report.output_error, report.gradient_error) if report is not None else None


if __name__ == "__main__":
    main()
