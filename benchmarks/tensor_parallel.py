"""A tensor group of two processes: graphpar's rewritten graph, the split by hand, and torch's DTensor.

    OMP_NUM_THREADS=1 python benchmarks/tensor_parallel.py --json

Two gloo workers, one thread each, train the same blocks on the same batch with SGD. The three take turns
step by step in the same two processes; ratios are medians over rounds of times within a round. graphpar's
step is that of its runtime on each rank: the graph that the sharding programme chose and the passes
rewrote, backward, and the optimiser.

Bytes are those that a ring sends per member and step: 2 (n-1)/n of what is summed, (n-1)/n of what is
gathered or scattered. Megatron's count is two sums of an activation per block and direction.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from in_turn import RANKS, WARM_UP, begin_rank, end_rank, furthest_apart, ratios, result_of, timed
from tensor_models import BLOCKS, Size, Stack, split_by_dtensor, split_by_hand
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphpar.cluster import Cluster
from graphpar.partition.types import Replica
from graphpar.preparation import lower, prepare
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.optimizers import Recipe
from graphpar.runtime.program import WorkerSetup
from graphpar.runtime.reference import whole_on_one_device
from graphpar.runtime.slices import take
from graphpar.runtime.weights import Weights
from graphpar.runtime.worker import Worker
from graphpar.training import Training

Step = Callable[[], float]
"""Trains once; returns the loss."""
sgd = partial(torch.optim.SGD, lr=0.01)


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what collectives send, as a ring does, and how many there are."""

    RING: Mapping[str, float] = {
        "allreduce": 2.0, "all_reduce": 2.0, "alltoall": 1.0, "allgather": 1.0, "all_gather": 1.0,
        "reduce_scatter": 1.0,
    }  # fmt: skip
    """Times (n-1)/n of the whole."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes, self.calls = 0.0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = str(func).partition(".")
        if space in ("c10d", "_c10d_functional"):
            for start, times in self.RING.items():
                if name.startswith("alltoall"):  # of one's own nothing is sent
                    self.num_bytes += _bytes(args[1])
                    self.calls += 1
                    break
                if name.startswith(start):
                    whole = max(_bytes(args), _bytes(result))
                    self.num_bytes += times * whole * (RANKS - 1) / RANKS
                    self.calls += 1
                    break
        return result


def _bytes(value: Any) -> float:
    """The largest tensor among arguments."""
    if isinstance(value, torch.Tensor):
        return float(value.nbytes)
    if isinstance(value, list | tuple):
        return max((_bytes(v) for v in value), default=0.0)
    return 0.0


def eager_step(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> Step:
    """The stock training loop."""
    optimizer = sgd(model.parameters())

    def step() -> float:
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def graphpar_step(model: Stack, batch: tuple[torch.Tensor, ...], rank: int) -> Step:
    """The runtime's step of one member of the group."""
    training = Training(optimizer=sgd)
    prepared = prepare(model, batch, {}, training)
    cluster = Cluster.from_dict({"devices": [{"kind": "cpu", "count": RANKS, "threads": 1}]})
    alone = whole_on_one_device(prepared.graph)
    (pipeline,) = alone.pipelines
    names = [device.name for device in cluster.devices]
    stage = replace(pipeline.stages[0], replicas=(Replica(names[0], 1, tuple(names[1:])),))
    found = replace(alone, pipelines=(replace(pipeline, stages=(stage,)),))
    lowered = lower(prepared.graph, found, True, cluster=cluster, train=training)
    worker = worker_of(lowered, model, rank)
    batch_size = prepared.graph.batch
    program = lowered.programs(lowered.schedule(batch_size), batch_size)[rank]
    worker.install("train", program)
    inputs = prepared.captured.signature.bind(batch, {})
    number = iter(range(10**9))
    return lambda: float(worker.step("train", inputs, next(number)).results.get((0, 0), torch.zeros(())))


def worker_of(lowered: Lowered, model: nn.Module, rank: int) -> Worker:
    """A rank with its slices of the model's weights."""
    placement = lowered.placements[rank]
    tensors = {}
    for label in placement.labels:
        whole, cut = model.get_parameter(label).detach(), placement.slices.get(label)
        tensors[label] = take(whole, cut.dim, cut.counts, cut.inner, rank) if cut else whole
    setup = WorkerSetup(
        rank=rank, world_size=RANKS, device="cpu", threads=1, slowdown=1.0, links=(),
        groups=lowered.groups, seed=0, max_grad_norm=None,
    )  # fmt: skip
    return Worker(setup, Weights(tensors), lowered.trained, Recipe(sgd), range(RANKS))


def work(rank: int, name: str, size: Size, rounds: int, port: int, folder: str) -> None:
    """One rank: all contestants in turn; the first one writes down what was measured."""
    begin_rank(rank, port)
    model = Stack(name, size)
    batch = (
        torch.randn(size.batch, size.length, size.width),
        torch.randn(size.batch, size.length, size.width),
    )
    steps = {
        "graphpar": graphpar_step(model, batch, rank),
        "by hand": eager_step(split_by_hand(model, rank, RANKS), batch),
        "dtensor": eager_step(split_by_dtensor(model, RANKS), batch),
    }
    losses: dict[str, list[float]] = {n: [] for n in steps}
    wall: dict[str, list[float]] = {n: [] for n in steps}
    cpu: dict[str, list[float]] = {n: [] for n in steps}
    sent = {}
    for number in range(rounds + WARM_UP):
        for contestant, step in steps.items():
            loss, wall_s, cpu_s = timed(step)
            losses[contestant].append(loss)
            if number >= WARM_UP:
                wall[contestant].append(wall_s)
                cpu[contestant].append(cpu_s)
    for contestant, step in steps.items():
        with Sent() as counter:
            step()
        sent[contestant] = {"bytes": counter.num_bytes, "collectives": counter.calls}
    result = {"wall_s": wall, "cpu_s": cpu, "losses": losses, "sent": sent}
    end_rank(folder, result if rank == 0 else None)


@dataclass(frozen=True)
class Row:
    """What came out for one kind of block; ratios are graphpar's over each other's."""

    model: str
    size: Size
    rounds: int
    median_s: dict[str, float]
    ratio: dict[str, float]
    cpu_ratio: dict[str, float]
    sent: dict[str, dict[str, float]]
    megatron_bytes: float
    loss_difference: float
    wall_s: dict[str, list[float]]


def compare(name: str, size: Size, rounds: int) -> Row:
    """Run two ranks and work out medians and ratios."""
    result = result_of(work, name, size, rounds)
    activation = 4 * size.batch * size.length * size.width
    return Row(
        model=name,
        size=size,
        rounds=rounds,
        median_s={k: median(v) for k, v in result["wall_s"].items()},
        ratio=ratios(result["wall_s"]),
        cpu_ratio=ratios(result["cpu_s"]),
        sent=result["sent"],
        megatron_bytes=size.layers * 4 * activation * 2 * (RANKS - 1) / RANKS,
        loss_difference=furthest_apart(result["losses"]),
        wall_s=result["wall_s"],
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--rounds", type=int, default=20)
    for name in ("width", "heads", "layers", "length", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Size, name))
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    given = parser.parse_args()
    size = Size(given.width, given.heads, given.layers, given.length, given.batch)
    rows = [compare(name, size, given.rounds) for name in given.models]
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        against = ", ".join(f"{r:.3f} x {name}" for name, r in row.ratio.items())
        cpu = ", ".join(f"{r:.3f} x {name}" for name, r in row.cpu_ratio.items())
        print(f"{row.model}: {row.median_s['graphpar']:.3f} s, {against}; processor time {cpu}")
        sent = ", ".join(
            f"{n} {s['bytes'] / 1e6:.2f} MB in {s['collectives']}" for n, s in row.sent.items()
        )
        print(f"  sent {sent}; Megatron's count {row.megatron_bytes / 1e6:.2f} MB")
        print(f"  losses {row.loss_difference:.1e} apart")


if __name__ == "__main__":
    main()
