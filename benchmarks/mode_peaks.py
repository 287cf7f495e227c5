"""Peak memory in ways to run that `benchmarks/prediction.py` does not hold: `benchmarks/mode_peaks.py`.

Number formats, frozen weights, odd batches, recomputation, ZeRO, tensor groups, other optimisers and
inference, each for several models on one or two workers, whose stages, replicas and microbatches are
given rather than planned. Two steps each (the optimiser's state comes with the first); the peak of every
process is compared with what the plan says. Other work on the machine does not disturb it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from local_peaks import CASES, AdamW
from prediction import Convolutions, memory_errors_pct, memory_summary, run
from torch import nn

import graphpar
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.groups.modes import with_group_modes
from graphpar.partition.handmade import evaluate
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice
from graphpar.planner import plan_of, price
from graphpar.plans.plan import Plan
from graphpar.precision.formats import labelled, uniform_formats, with_formats
from graphpar.preparation import prepare
from graphpar.training import Training

LINK = {"bytes_per_s": 4e8, "latency_s": 2e-4}


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        stages: Stages in a row.
        replicas: Replicas of each.
        members: Devices of each replica, a tensor group where there are several.
        microbatches: Of the whole batch.
        precision: Format of all units.
        schedule: Order of work.
        recompute: Whether activations are computed again.
        zero: ZeRO level.
        batch: Samples; 0 for as many as the model's example has.
        frozen: Whether the first half of the parameters is not trained.
        train: Changes to how it is trained; None for inference.
    """

    stages: int = 1
    replicas: int = 1
    members: int = 1
    microbatches: int = 2
    precision: str = "float32"
    schedule: ScheduleName = "1f1b"
    recompute: bool = False
    zero: int = 0
    batch: int = 0
    frozen: bool = False
    train: dict[str, Any] | None = field(default_factory=dict)

    def training(self) -> Training | None:
        """How it trains; None for inference."""
        if self.train is None:
            return None
        given: dict[str, Any] = {"optimizer": AdamW, "zero": self.zero, **self.train}
        return Training(**given)


def _by(optimizer: Callable[..., torch.optim.Optimizer], **settings: Any) -> dict[str, Any]:
    return {"optimizer": partial(optimizer, **settings)}


WAYS: dict[str, Way] = {
    "plain": Way(),
    "one microbatch": Way(microbatches=1),
    "float16": Way(precision="float16"),
    "float16 once": Way(precision="float16", microbatches=1),
    "bfloat16": Way(precision="bfloat16"),
    "bfloat16 2 stages": Way(precision="bfloat16", stages=2, microbatches=4),
    "frozen": Way(frozen=True),
    "odd batch": Way(batch=7, microbatches=3),
    "odd 2 stages": Way(batch=7, microbatches=3, stages=2),
    "recompute": Way(recompute=True),
    "recompute once": Way(recompute=True, microbatches=1),
    "recompute 2 stages": Way(recompute=True, stages=2, microbatches=4),
    "tensor 2": Way(members=2),
    "replicas": Way(replicas=2),
    "zero 1": Way(replicas=2, zero=1),
    "zero 1 in 4": Way(replicas=2, zero=1, microbatches=4),
    "zero 2": Way(replicas=2, zero=2),
    "zero 2 in 4": Way(replicas=2, zero=2, microbatches=4),
    "gpipe": Way(stages=2, microbatches=4, schedule="gpipe"),
    "zero-bubble": Way(stages=2, microbatches=4, schedule="zero-bubble"),
    "sgd": Way(train=_by(torch.optim.SGD, lr=0.1)),
    "momentum": Way(train=_by(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "adafactor": Way(train=_by(torch.optim.Adafactor)),
    "adagrad": Way(train=_by(torch.optim.Adagrad)),
    "foreach": Way(train=_by(AdamW, foreach=True)),
    "one sample": Way(batch=1, microbatches=1),
    "one, foreach": Way(batch=1, microbatches=1, train=_by(AdamW, foreach=True)),
    "one, fused": Way(batch=1, microbatches=1, train=_by(AdamW, fused=True)),
    "clipped": Way(train={"max_grad_norm": 1.0}),
    "inference": Way(train=None),
    "inference once": Way(train=None, microbatches=1),
    "inference 2 stages": Way(train=None, stages=2, microbatches=4),
    "inference bfloat16": Way(train=None, precision="bfloat16"),
}

Made = tuple[nn.Module, dict[str, Any]]


def _gpt(width: int, length: int, layers: int = 4) -> Made:
    ids, targets = example_inputs(8, length)
    return GPT(width=width, layers=layers, heads=width // 64, length=length), {
        "ids": ids,
        "targets": targets,
    }


MODELS: dict[str, Callable[[], Made]] = {
    "gpt": lambda: _gpt(384, 128),
    "tiny": lambda: _gpt(64, 32, layers=2),
    "llama": lambda: CASES["llama clipped"]()[:2],
    "vit": lambda: CASES["vit"]()[:2],
    "cnn": lambda: (Convolutions(), {"x": torch.randn(16, 3, 64, 64)}),
    "words": lambda: CASES["llama 32k words"]()[:2],
}


def made(name: str, way: Way) -> Made:
    """A model with as many samples, and as much of it trained, as the way has."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    parameters = list(model.parameters())
    for parameter in parameters[: len(parameters) // 2 * way.frozen]:
        parameter.requires_grad_(False)
    return model, {k: v[: way.batch] if way.batch else v for k, v in inputs.items()}


def planned(
    model: nn.Module, inputs: dict[str, Any], way: Way, calibration: graphpar.Calibration
) -> tuple[graphpar.Cluster, Plan]:
    """A cluster of just enough workers, and the plan that runs the model in the way asked for."""
    count, train = way.stages * way.replicas * way.members, way.training()
    devices = {"kind": "cpu", "threads": 1, "count": count}
    cluster = graphpar.Cluster.from_dict({"devices": [devices], "link": LINK})
    prepared = prepare(model, (), inputs, train)
    units = len(prepared.chain.units)
    formats = uniform_formats(cluster, way.precision, units)
    table = price(prepared, cluster, train=train, calibration=calibration, formats=formats)
    stages = _stages(way, [device.name for device in cluster.devices], units)
    replicas = [replica for stage in stages for replica in stage.replicas]
    if way.members > 1:
        table = with_group_modes(table, prepared.graph, cluster, replicas, calibration, train)
    table = with_modes(table, StageOptions(recompute=way.recompute, zero=(way.zero,) if way.zero else ()))
    pipeline = PipelineChoice(prepared.graph.batch, way.microbatches, stages)
    found = evaluate(table, (pipeline,), "gpipe" if train is None else "1f1b")
    found = found if train is None else replace(found, schedule=way.schedule)
    plan = plan_of(
        prepared,
        cluster,
        labelled(table, formats),
        with_formats(found, formats),
        precision=way.precision,
        calibration=calibration,
        train=train,
    )
    return cluster, plan


def _stages(way: Way, names: list[str], units: int) -> tuple[StageChoice, ...]:
    teams = [names[k : k + way.members] for k in range(0, len(names), way.members)]
    replicas = [Replica(own[0], way.microbatches // way.replicas, tuple(own[1:])) for own in teams]
    return tuple(
        StageChoice(
            units * n // way.stages,
            units * (n + 1) // way.stages,
            tuple(replicas[n * way.replicas : (n + 1) * way.replicas]),
            recompute=way.recompute,
            zero=way.zero,
        )
        for n in range(way.stages)
    )


def measure(
    name: str, way: Way, calibration: graphpar.Calibration
) -> tuple[tuple[float, ...], list[float]]:
    """Errors of the workers' peaks in per cent, and these in megabytes."""
    model, inputs = made(name, way)
    cluster, plan = planned(model, inputs, way, calibration)
    train = way.training()
    with graphpar.compile(
        model, cluster, (), inputs, train=train, plan=plan, precision=way.precision
    ) as job:
        if train is not None:
            step = run(job, (), inputs, steps=1)[-1]
        else:
            job(**inputs), job(**inputs)
            assert job.last_step is not None
            step = job.last_step
        errors = memory_errors_pct(job.plan, step)
    return errors, [report.peak_bytes / 1e6 for report in step.reports]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="Only this one, maybe several times.")
    parser.add_argument("--way", action="append", help="Only this one, maybe several times.")
    options = parser.parse_args()
    unknown = {*(options.model or ())} - {*MODELS} | {*(options.way or ())} - {*WAYS}
    if unknown:
        parser.error(f"no {sorted(unknown)[0]!r}; there are {', '.join((*MODELS, *WAYS))}")
    calibration = graphpar.Calibration.cached() or graphpar.calibrate()
    found: list[float] = []
    for name in options.model or MODELS:
        for how in options.way or WAYS:
            errors, peaks = measure(name, WAYS[how], calibration)
            told = "".join(f"{e:>+7.1f}" for e in errors)
            print(f"{name:<8}{how:<20}{told}   of {', '.join(f'{p:.0f}' for p in peaks)} MB", flush=True)
            found += errors
    print("memory_error_pct", memory_summary(found))


if __name__ == "__main__":
    main()
