"""Predicted against measured on this machine: `benchmarks/prediction.py --json`.

Plans of one to four workers on emulated unlike clusters, for several models, after calibrating. Of every
job: the raw error of its step time (predicted over measured minus one, the median of several steps), of
each worker's peak memory, and the overlap of predicted and measured actions (time that both show the
rank in the same action, over the time that either does; nothing is shifted but to a common start).

Where the error comes from is found by simulating again with what was measured in place of what was
predicted, part by part: computing, then the optimiser, then gradient sums. What is left is messages,
waiting for a core, and the time between actions.

Workers are slowed down so that together they need less than one and a half cores: an emulated device
computes at its own pace only where a core is free when it wants one. A machine with other work on it
makes the measured steps longer, not the predicted ones.

Every plan runs twice, in two jobs one right after the other. How far the second one's step is from the
first one's (`rerun_pct`) is what a forecast by running the very job would be off by.

`--memory` compares peak memory alone, which other work on the machine does not disturb: plans by curves,
every one run once.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from torch import nn

import graphpar
from graphpar.examples.gpt import GPT, example_inputs
from graphpar.plans.plan import Plan
from graphpar.runtime.last_step import LastStep
from graphpar.schedule import Action, Schedule
from graphpar.schedule.simulate import simulate
from graphpar.schedule.timing import GradientGroup, SizeTiming
from graphpar.view.measured import measured_timeline

WARM_UP = 1

CLUSTERS: dict[str, tuple[float, ...]] = {
    "1": (1.0,),
    "2 equal": (1.5, 1.5),
    "2 unlike": (1.5, 3.0),
    "3 unlike": (2.0, 4.0, 4.0),
    "4 equal": (3.0, 3.0, 3.0, 3.0),
    "4 unlike": (2.0, 4.0, 4.0, 4.0),
    "2 slow link": (1.5, 1.5),
    "3 slow link": (2.0, 4.0, 4.0),
    "4 slow link": (3.0, 3.0, 3.0, 3.0),
}
"""How many times slower than a core each worker is; together they need less than one and a half cores."""


TRAINING = graphpar.Training(optimizer=torch.optim.AdamW)


def workers(cluster: str, slowdowns: Sequence[float]) -> dict[str, Any]:
    """Single-threaded workers; over a slow link stages in a row win, over others workers side by side."""
    link = {"bytes_per_s": 2e7 if "slow" in cluster else 4e8, "latency_s": 2e-4}
    return {"devices": [{"kind": "cpu", "slowdown": s, "threads": 1} for s in slowdowns], "link": link}


class Tower(nn.Module):
    """A deep multilayer perceptron with residual connections."""

    def __init__(self, width: int = 512, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, width) to the mean of squares."""
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


class Convolutions(nn.Module):
    """Residual convolutions with normalisation within samples, then a linear layer."""

    def __init__(self, channels: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.last = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) to the mean of squares of ten results."""
        x = self.first(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        results: torch.Tensor = self.last(x.mean((2, 3)))
        return results.square().mean()


@dataclass(frozen=True)
class Row:
    """One job."""

    model: str
    cluster: str
    workers: int
    predicted_s: float
    measured_s: float
    again_s: float
    spread: float
    memory_errors_pct: tuple[float, ...]
    overlap: float
    parts_pct: dict[str, float]

    @property
    def error_pct(self) -> float:
        """Raw error of the step time."""
        return 100 * (self.predicted_s / self.measured_s - 1)

    @property
    def rerun_pct(self) -> float:
        """How far the step of the same plan in another job is from the first one's."""
        return 100 * (self.again_s / self.measured_s - 1)


def cases() -> Iterator[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Models with one global batch each."""
    torch.manual_seed(0)
    ids, targets = example_inputs(12, 64)
    yield "gpt 6x192", GPT(width=192, layers=6, heads=6, length=64), (ids,), {"targets": targets}
    ids, targets = example_inputs(6, 128)
    yield "gpt 4x384", GPT(width=384, layers=4, heads=6, length=128), (ids,), {"targets": targets}
    yield "tower 8x512", Tower(), (torch.randn(256, 512),), {}
    yield "cnn 4x64", Convolutions(), (torch.randn(12, 3, 32, 32),), {}
    yield from stock_models()


def stock_models() -> Iterator[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Models of transformers, built from their configurations."""
    import transformers  # an optional extra

    ids = torch.randint(0, 1000, (12, 64))
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
    words = {**sizes, "hidden_size": 256, "vocab_size": 1000, "max_position_embeddings": 64}
    llama = transformers.LlamaConfig(**words, num_key_value_heads=2, use_cache=False)
    yield (
        "llama 4x256",
        transformers.LlamaForCausalLM(llama),
        (),
        {"input_ids": ids, "labels": ids.clone()},
    )
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = transformers.BertConfig(**words, **quiet)
    yield "bert 4x256", transformers.BertForMaskedLM(bert), (), {"input_ids": ids, "labels": ids.clone()}
    vit = transformers.ViTConfig(**sizes, hidden_size=256, image_size=64, patch_size=8, num_labels=10)
    pixels, labels = torch.randn(12, 3, 64, 64), torch.randint(0, 10, (12,))
    yield (
        "vit 4x256",
        transformers.ViTForImageClassification(vit),
        (),
        {"pixel_values": pixels, "labels": labels},
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--cached", action="store_true", help="Use the calibration at hand.")
    parser.add_argument("--memory", action="store_true", help="Peak memory alone.")
    parser.add_argument("--model", default="", help="Only models whose name holds this.")
    parser.add_argument("--cluster", default="", help="Only clusters whose name holds this.")
    options = parser.parse_args()
    asked = [
        (*case, cluster, slowdowns)
        for case in cases()
        for cluster, slowdowns in CLUSTERS.items()
        if options.model in case[0] and options.cluster in cluster
    ]
    if not asked:
        parser.error(f"no such job; clusters are {', '.join(CLUSTERS)}")
    calibration = graphpar.Calibration.cached() if options.cached else None
    calibration = calibration or graphpar.calibrate(refresh=True)
    chosen = [(*job, calibration, options.steps) for job in asked]
    if options.memory:
        compare_memory(chosen, options.json)
        return
    rows = [measure(*case) for case in chosen]
    report = summary(rows)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    heads = ("measured ms", "error %", "rerun %", "spread %", "overlap", "memory %", *PARTS)
    print(f"{'model':<13}{'cluster':<10}" + "".join(f"{head:>12}" for head in heads))
    for row in rows:
        worst = max(row.memory_errors_pct, key=abs, default=float("nan"))
        print(
            f"{row.model:<13}{row.cluster:<10}{1e3 * row.measured_s:>12.1f}{row.error_pct:>+12.1f}"
            f"{row.rerun_pct:>+12.1f}{100 * row.spread:>12.1f}{row.overlap:>12.2f}{worst:>+12.1f}"
            + "".join(f"{row.parts_pct[part]:>+12.1f}" for part in PARTS)
        )
    for key in ("step_error_pct", "rerun_pct", "memory_error_pct", "overlap"):
        print(key, report[key])


def measure(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cluster: str,
    slowdowns: Sequence[float],
    calibration: graphpar.Calibration,
    steps: int,
) -> Row:
    """Plan, run, compare."""
    where = workers(cluster, slowdowns)
    with graphpar.compile(
        model, where, args, kwargs, train=TRAINING, calibration=calibration, time_limit_s=5.0
    ) as job:
        plan, kept = job.plan, run(job, args, kwargs, steps)
    with graphpar.compile(model, where, args, kwargs, train=TRAINING, plan=plan) as job:
        again = run(job, args, kwargs, steps)
    seconds = [step.seconds for step in kept]
    middle = median(seconds)
    return Row(
        model=name,
        cluster=cluster,
        workers=len(plan.devices),
        predicted_s=plan.predicted_step_s,
        measured_s=middle,
        again_s=median(step.seconds for step in again),
        spread=(max(seconds) - min(seconds)) / middle,
        memory_errors_pct=memory_errors_pct(plan, kept[-1]),
        overlap=median(overlap(plan, step) for step in kept),
        parts_pct=error_parts(plan, kept, middle),
    )


def measure_memory(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cluster: str,
    slowdowns: Sequence[float],
    calibration: graphpar.Calibration,
    steps: int,
) -> tuple[float, ...]:
    """Errors of the workers' peaks of one job, planned without timing the model."""
    where = workers(cluster, slowdowns)
    with graphpar.compile(
        model, where, args, kwargs, train=TRAINING, calibration=calibration, time_limit_s=2.0, measure_s=0
    ) as job:
        return memory_errors_pct(job.plan, run(job, args, kwargs, steps)[-1])


def memory_errors_pct(plan: Plan, step: LastStep) -> tuple[float, ...]:
    """Predicted over measured peaks by rank, minus one."""
    peaks = {r.rank: r.peak_bytes for r in step.reports}
    predicted = [plan.predicted_peak_bytes[d] for d in plan.devices]
    return tuple(100 * (p / peaks[r] - 1) for r, p in enumerate(predicted) if peaks.get(r))


def compare_memory(chosen: Sequence[tuple[Any, ...]], as_json: bool) -> None:
    """Run jobs and tell their errors, each when it is known."""
    rows = []
    for case in chosen:
        errors = measure_memory(*case)
        rows.append({"model": case[0], "cluster": case[4], "memory_errors_pct": errors})
        if not as_json:
            print(f"{case[0]:<13}{case[4]:<12}" + "".join(f"{e:>+7.1f}" for e in errors), flush=True)
    total = memory_summary([e for row in rows for e in row["memory_errors_pct"]])
    if as_json:
        print(json.dumps({"memory_error_pct": total, "rows": rows}, indent=1))
    else:
        print("memory_error_pct", total)


def memory_summary(errors: Sequence[float]) -> dict[str, float]:
    """Median and worst size of errors, and their mean with signs."""
    sizes = [abs(e) for e in errors]
    return {"median": median(sizes), "worst": max(sizes), "bias": mean(errors)}


def run(
    job: graphpar.CompiledModel, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int
) -> list[LastStep]:
    """The steps that count."""
    kept = []
    for _ in range(WARM_UP + steps):
        job.step(*args, **kwargs)
        assert job.last_step is not None
        kept.append(job.last_step)
    return kept[WARM_UP:]


def error_parts(plan: Plan, steps: Sequence[LastStep], measured_s: float) -> dict[str, float]:
    """What each part adds to the error of the step, in per cent of the measured step."""
    schedule, timing = plan.timeline().schedule, plan.timing
    spent = _durations(schedule, steps)
    predicted_s = [simulate(schedule, timing).step_s]
    ranks = [
        replace(numbers, sizes=tuple(_with_measured(row, rank, spent) for row in numbers.sizes))
        for rank, numbers in enumerate(timing.ranks)
    ]
    # What was measured holds what workers cost each other already.
    timing = replace(timing, ranks=tuple(ranks), shared=None)
    predicted_s.append(simulate(schedule, timing).step_s)
    ranks = [
        replace(numbers, optimizer_s=spent.get((rank, "O", 0, None), numbers.optimizer_s))
        for rank, numbers in enumerate(ranks)
    ]
    timing = replace(timing, ranks=tuple(ranks))
    predicted_s.append(simulate(schedule, timing).step_s)
    groups = [_with_measured_sum(group, spent) for group in timing.gradient_groups]
    predicted_s.append(simulate(schedule, replace(timing, gradient_groups=tuple(groups))).step_s)
    predicted_s.append(measured_s)
    changes = [100 * (a - b) / measured_s for a, b in pairwise(predicted_s)]
    return dict(zip(PARTS, changes, strict=True))


_Key = tuple[int, str, int, int | None]
"""Rank, kind of action, microbatch size (0 where there is none), stage (None for all together)."""

PARTS = ("compute", "optimizer", "sums", "rest")


def _durations(schedule: Schedule, steps: Sequence[LastStep]) -> dict[_Key, float]:
    """Median seconds of actions by rank, kind, microbatch size and stage."""
    found: dict[_Key, list[float]] = {}
    for step in steps:
        for report in step.reports:
            for event in report.events:
                action = Action.parse(event.token)
                batch = action.microbatch
                size = 0 if batch is None else schedule.microbatch_sizes[batch]
                for stage in (None, action.stage):
                    spent = found.setdefault((report.rank, action.kind, size, stage), [])
                    spent.append(event.end_s - event.start_s)
    return {key: median(values) for key, values in found.items()}


def _with_measured(row: SizeTiming, rank: int, spent: dict[_Key, float]) -> SizeTiming:
    ahead, back, first, later = (spent.get((rank, kind, row.size, row.stage)) for kind in "FBIW")
    row = replace(row, forward_s=row.forward_s if ahead is None else ahead)
    if first is not None and later is not None:
        return replace(row, backward_s=first + later, weight_s=later, split_s=0.0)
    return row if back is None else replace(row, backward_s=back)


def _with_measured_sum(group: GradientGroup, spent: dict[_Key, float]) -> GradientGroup:
    """The rank that comes last waits for nobody: the shortest of the group's times is the sum's own."""
    times = [spent[rank, "A", 0, None] for rank in group.ranks if (rank, "A", 0, None) in spent]
    return replace(group, seconds=min(times, default=group.seconds))


def overlap(plan: Plan, step: Any) -> float:
    """Shared time of predicted and measured compute actions over their joint time."""
    predicted = plan.timeline()
    measured = measured_timeline(plan, predicted.schedule, step)
    if measured is None:
        return 0.0
    shared = joint = 0.0
    for rank, lane in enumerate(measured.lanes):
        spans = {
            (a.kind, a.stage, a.microbatch): (start, end)
            for a, start, end in zip(lane.actions, lane.starts_s, lane.ends_s, strict=True)
        }
        for event in predicted.events(rank):
            if event.action.kind not in "FBIW":
                continue
            action = event.action
            start, end = spans.get((action.kind, action.stage, action.microbatch), (0.0, 0.0))
            common = max(min(end, event.end_s) - max(start, event.start_s), 0.0)
            shared += common
            joint += (end - start) + (event.end_s - event.start_s) - common
    return shared / joint if joint > 0 else 1.0


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """All rows, and their medians and worst."""
    errors = [abs(r.error_pct) for r in rows]
    reruns = [abs(r.rerun_pct) for r in rows]
    return {
        "step_error_pct": {"median": median(errors), "worst": max(errors), "mean": mean(errors)},
        "rerun_pct": {"median": median(reruns), "worst": max(reruns), "mean": mean(reruns)},
        "memory_error_pct": memory_summary([e for r in rows for e in r.memory_errors_pct]),
        "overlap": {"median": median(r.overlap for r in rows), "worst": min(r.overlap for r in rows)},
        "rows": [{**asdict(r), "error_pct": r.error_pct, "rerun_pct": r.rerun_pct} for r in rows],
    }


if __name__ == "__main__":
    main()
