"""What graphpar's runtime costs beside torch's own pipelining and a hand-written loop.

    python benchmarks/overhead.py --json

Two ranks, one thread each, 1F1B, the same model cut at the same layer, the same optimiser. The three
take turns step by step in the same two processes, so that whatever else the machine does hits all of
them; only ratios of steps of one round are used, and their median. graphpar's step is the public
`CompiledModel.step`, with its inputs taken apart and its results exchanged.

The processor time of both ranks is reported too: it does not see waiting, but hardly any noise either.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from in_turn import WARM_UP, begin_rank, end_rank, furthest_apart, ratios, result_of, timed
from split_models import FAMILIES, VOCABULARY, Family, Size, causal_loss
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import graphpar
from graphpar.partition.handmade import evaluate
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, price
from graphpar.plans.plan import Plan
from graphpar.preparation import prepare

Step = Callable[[torch.Tensor, torch.Tensor], float]
"""Trains on (ids, labels) and returns the loss; what ranks other than the last return is not used."""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The optimiser of all three."""
    return torch.optim.SGD(parameters, lr=0.01)


# --- the contestants ---


def graphpar_step(model: Any, family: Family, size: Size, batch: dict[str, torch.Tensor]) -> Step:
    """The compiled model, its partition set to the same cut and microbatches."""
    cluster = graphpar.Cluster.local(slowdowns=(1.0, 1.0))
    training = graphpar.Training(optimizer=sgd)
    plan = plan_with_cut(model, family, size, batch, cluster, training)
    job = graphpar.compile(model, cluster, kwargs=batch, train=training, plan=plan)
    return lambda ids, labels: float(job.step(input_ids=ids, labels=labels))


def plan_with_cut(
    model: Any,
    family: Family,
    size: Size,
    batch: dict[str, torch.Tensor],
    cluster: graphpar.Cluster,
    training: graphpar.Training,
) -> Plan:
    """A plan whose second stage begins at the layer that the others are cut at."""
    prepared = prepare(model, (), batch, training)
    table = price(prepared, cluster, train=training, precision="float32", calibration=None)
    names = [unit.name for unit in prepared.chain.units]
    cut = next(i for i, name in enumerate(names) if name.startswith(f"{family.layer_name}.{size.cut}"))
    ends = ((0, cut), (cut, len(names)))
    stages = tuple(
        StageChoice(*end, (Replica(device.name, size.microbatches),))
        for end, device in zip(ends, cluster.devices, strict=True)
    )
    pipeline = PipelineChoice(size.batch, size.microbatches, stages)
    return plan_of(prepared, cluster, table, evaluate(table, (pipeline,), "1f1b"))


def pipelining_step(model: Any, family: Family, size: Size) -> Step:
    """torch.distributed.pipelining's 1F1B schedule."""
    rank = dist.get_rank()
    module = family.stages(model, size.cut)[rank]
    optimizer = sgd(module.parameters())
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, size.microbatches, loss_fn=causal_loss)

    def step(ids: torch.Tensor, labels: torch.Tensor) -> float:
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=labels, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).mean()) if losses else 0.0

    return step


@dataclass
class ByHand:
    """A two-stage 1F1B loop on plain send and receive."""

    module: nn.Module
    size: Size
    optimizer: torch.optim.Optimizer = field(init=False)
    sends: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = sgd(self.module.parameters())

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> float:
        """One optimiser step."""
        chunks = self.size.microbatches
        if dist.get_rank() == 0:
            self._first(ids.chunk(chunks))
            loss = 0.0
        else:
            loss = self._second(labels.chunk(chunks))
        for sending, _ in self.sends:
            sending.wait()
        self.sends.clear()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _send(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().contiguous()
        self.sends.append((dist.isend(tensor, dst=1 - dist.get_rank()), tensor))

    def _hidden(self, samples: int) -> torch.Tensor:
        return torch.empty(samples, self.size.length, self.size.width)

    def _first(self, chunks: tuple[torch.Tensor, ...]) -> None:
        outputs: list[torch.Tensor] = []
        for number in range(len(chunks) + 1):
            if number < len(chunks):
                outputs.append(self.module(chunks[number]))
                self._send(outputs[-1])
            if number > 0:
                gradient = self._hidden(len(chunks[number - 1]))
                dist.recv(gradient, src=1)
                outputs[number - 1].backward(gradient)  # type: ignore[no-untyped-call]
                outputs[number - 1] = gradient

    def _second(self, chunks: tuple[torch.Tensor, ...]) -> float:
        hidden = [self._hidden(len(chunk)) for chunk in chunks]
        arrivals: list[Any] = [dist.irecv(hidden[0], src=0)]
        total = 0.0
        for number, chunk in enumerate(chunks):
            if number + 1 < len(chunks):
                arrivals.append(dist.irecv(hidden[number + 1], src=0))
            arrivals[number].wait()
            x = hidden[number].requires_grad_()
            loss = causal_loss(self.module(x), chunk) / len(chunks)
            loss.backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
            self._send(x.grad)
            total += float(loss.detach())
        return total


# --- measuring ---


@dataclass(frozen=True)
class Row:
    """What came out for one model.

    `ratio` is graphpar's time over each other's, the median over rounds; `over_faster` is how much
    longer graphpar takes than the faster of the others, as a fraction.
    """

    model: str
    size: Size
    rounds: int
    median_s: dict[str, float]
    ratio: dict[str, float]
    over_faster: float
    median_cpu_s: dict[str, float]
    cpu_ratio: dict[str, float]
    loss_difference: float


def work(rank: int, name: str, size: Size, rounds: int, port: int, folder: str) -> None:
    """One rank: all contestants in turn; the last one writes down what was measured."""
    begin_rank(rank, port)
    family = FAMILIES[name]
    model = family.build(size)
    batches = [torch.randint(VOCABULARY, (size.batch, size.length)) for _ in range(rounds + WARM_UP)]
    example = {"input_ids": batches[0], "labels": batches[0].clone()}
    contestants: dict[str, Step] = {
        "graphpar": graphpar_step(copy.deepcopy(model), family, size, example),
        "pipelining": pipelining_step(copy.deepcopy(model), family, size),
        "by hand": ByHand(family.stages(copy.deepcopy(model), size.cut)[rank], size).step,
    }
    result = take_turns(contestants, batches)
    end_rank(folder, result if rank == 1 else None)


def take_turns(
    contestants: dict[str, Step], batches: list[torch.Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Every contestant trains on every batch, one step each in turn: losses and seconds by contestant."""
    names = ("losses", "wall_s", "cpu_s")
    found: dict[str, dict[str, list[float]]] = {n: {c: [] for c in contestants} for n in names}
    for batch in batches:
        labels = batch.clone()
        for contestant, step in contestants.items():
            for n, value in zip(names, timed(partial(step, batch, labels)), strict=True):
                found[n][contestant].append(value)
    return found


def compare(name: str, size: Size, rounds: int) -> Row:
    """Run two ranks and work out medians and ratios."""
    result = result_of(work, name, size, rounds)
    wall = {k: v[WARM_UP:] for k, v in result["wall_s"].items()}
    cpu = {k: v[WARM_UP:] for k, v in result["cpu_s"].items()}
    ratio = ratios(wall)
    return Row(
        model=name,
        size=size,
        rounds=rounds,
        median_s={k: median(v) for k, v in wall.items()},
        ratio=ratio,
        over_faster=max(ratio.values()) - 1,
        median_cpu_s={k: median(v) for k, v in cpu.items()},
        cpu_ratio=ratios(cpu),
        loss_difference=furthest_apart(result["losses"]),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--width", type=int, default=Size.width)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--microbatches", type=int, default=Size.microbatches)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args()
    size = replace(Size(), width=options.width, layers=options.layers, microbatches=options.microbatches)
    rows = [compare(name, size, options.rounds) for name in options.models]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        against = ", ".join(f"{r:.3f} x {name}" for name, r in row.ratio.items())
        cpu = ", ".join(f"{r:.3f} x {name}" for name, r in row.cpu_ratio.items())
        print(f"{row.model}: graphpar {row.median_s['graphpar']:.3f} s, {against}; processor time {cpu}")
        print(f"  {100 * row.over_faster:+.1f} % over the faster, losses {row.loss_difference:.1e} apart")


if __name__ == "__main__":
    main()
