"""What ranks start with: which tensors they hold, and which torch device a device of the cluster is."""

from collections.abc import Sequence
from itertools import combinations

import torch

from graphpar.cluster import Cluster
from graphpar.errors import ClusterError
from graphpar.ir.formats import base_format
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.optimizers import Intended
from graphpar.runtime.program import EmulatedLink, WorkerSetup
from graphpar.runtime.weights import Weights
from graphpar.runtime.workers import RankStart
from graphpar.training import Training


def rank_starts(
    cluster: Cluster,
    training: Training | None,
    lowered: Lowered,
    tensors: Weights,
    *,
    measures_norm: bool = False,
) -> list[RankStart]:
    """What each rank of a job starts with, in rank order.

    Raises:
        ValueError: The optimiser is not made of what it is given.
    """
    names = lowered.partition.used_devices
    intended = Intended.of(training, *_trained(lowered)) if training is not None else Intended({}, {})
    timed = _timed_groups(cluster, names, lowered.groups)
    starts = []
    for rank, (name, placement) in enumerate(zip(names, lowered.placements, strict=True)):
        device = cluster.device(name)
        own_settings, settings = intended.part(placement.labels)
        setup = WorkerSetup(
            rank=rank,
            world_size=len(names),
            device=torch_device(cluster, name),
            threads=device.threads,
            slowdown=device.slowdown,
            links=_emulated_links(cluster, names, rank),
            groups=lowered.groups,
            timed_groups=timed,
            seed=training.seed if training else 0,
            max_grad_norm=training.max_grad_norm if training else None,
            measures_norm=measures_norm,
            scales_loss=training is not None and _uses_float16(lowered),
            shards=dict(lowered.shards[rank]),
            shard_groups={la: lowered.groups.index(lowered.divided[rank]) for la in lowered.shards[rank]},
            own_settings=own_settings,
            settings=settings,
        )
        own = tensors.part(placement.labels, placement.slices)
        starts.append(RankStart(name, setup, own))
    return starts


def _trained(lowered: Lowered) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Shapes and number formats of all trained parameters by label, in the model's order."""
    types = {str(op.args[0]): op.type for op in lowered.graphs[0].sources("parameter")}
    shapes = {
        la: tuple(size for size in types[la].shape if isinstance(size, int)) for la in lowered.trained
    }
    return shapes, {label: getattr(torch, types[label].dtype) for label in shapes}


def _uses_float16(lowered: Lowered) -> bool:
    """Whether any stage of any pipeline computes in float16."""
    stages = [stage for pipeline in lowered.partition.pipelines for stage in pipeline.stages]
    return any("float16" in map(base_format, stage.formats) for stage in stages)


def gpu_index(cluster: Cluster, name: str) -> int:
    """Place of a device among its node's devices that are no CPUs."""
    node = cluster.device(name).node
    return [d.name for d in cluster.devices if d.node == node and not d.is_cpu].index(name)


def torch_device(cluster: Cluster, name: str) -> str:
    """The torch device that a device of the cluster is on its own machine."""
    return "cpu" if cluster.device(name).is_cpu else f"cuda:{gpu_index(cluster, name)}"


def _emulated_links(cluster: Cluster, names: Sequence[str], rank: int) -> tuple[EmulatedLink, ...]:
    links = []
    for other, name in enumerate(names):
        link = cluster.link(names[rank], name) if other != rank else None
        if link is not None and link.emulated:
            links.append(EmulatedLink(other, link.latency_s, link.bytes_per_s))
    return tuple(links)


def _timed_groups(
    cluster: Cluster, names: Sequence[str], groups: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Groups, by number, with an emulated link between any two of their ranks."""
    return tuple(
        number
        for number, ranks in enumerate(groups)
        if any(cluster.link(names[a], names[b]).emulated for a, b in combinations(ranks, 2))
    )


def refuse_foreign_devices(cluster: Cluster, lowered: Lowered) -> None:
    """A local job runs on this machine: its CPU, and its CUDA devices.

    Raises:
        ClusterError: A device is elsewhere; names it.
    """
    gpus = torch.cuda.device_count()
    for name in lowered.partition.used_devices:
        device = cluster.device(name)
        here = device.is_local_cpu or (not device.is_cpu and gpu_index(cluster, name) < gpus)
        if not here:
            raise ClusterError(
                f"Device {name} ({device.kind}) is not on this machine, so the job cannot be started "
                "from here. Start the script with torchrun on the machines of the cluster, or use "
                "graphpar.plan, which needs no devices."
            )
