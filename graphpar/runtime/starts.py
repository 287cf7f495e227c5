"""What ranks start with: which tensors they hold, and which torch device a device of the cluster is."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from graphpar.cluster import Cluster
from graphpar.errors import ClusterError
from graphpar.frontend.capture import Captured
from graphpar.ir.formats import base_format
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.program import EmulatedLink, Slice, WorkerSetup
from graphpar.runtime.slices import take
from graphpar.runtime.workers import RankStart
from graphpar.training import Training


def all_tensors(model: nn.Module, captured: Captured) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and constant by label.

    Raises:
        ValueError: The model has no weights.
    """
    tensors: dict[str, torch.Tensor] = dict(captured.constants)
    tensors.update(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    meta = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if meta:
        raise ValueError(
            f"The model has no weights: {meta[0]} (and {len(meta) - 1} more) are on the meta device. "
            "Load weights before compile; graphpar.plan needs none."
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def buffers_and_constants(captured: Captured, model: nn.Module) -> dict[str, torch.Tensor]:
    """What a prologue may read besides the inputs, by label."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **captured.constants}


def rank_starts(
    cluster: Cluster,
    training: Training | None,
    lowered: Lowered,
    tensors: Mapping[str, torch.Tensor],
    *,
    measures_norm: bool = False,
) -> list[RankStart]:
    """What each rank of a job starts with, in rank order."""
    names = lowered.partition.used_devices
    starts = []
    for rank, (name, placement) in enumerate(zip(names, lowered.placements, strict=True)):
        device = cluster.device(name)
        setup = WorkerSetup(
            rank=rank,
            world_size=len(names),
            device=torch_device(cluster, name),
            threads=device.threads,
            slowdown=device.slowdown,
            links=_emulated_links(cluster, names, rank),
            groups=lowered.groups,
            seed=training.seed if training else 0,
            max_grad_norm=training.max_grad_norm if training else None,
            measures_norm=measures_norm,
            scales_loss=training is not None and _uses_float16(lowered),
        )
        own = {la: sliced(tensors[la], placement.slices.get(la)) for la in placement.labels}
        starts.append(RankStart(name, setup, own))
    return starts


def _uses_float16(lowered: Lowered) -> bool:
    """Whether any stage of any pipeline computes in float16."""
    stages = [stage for pipeline in lowered.partition.pipelines for stage in pipeline.stages]
    return any("float16" in map(base_format, stage.formats) for stage in stages)


def sliced(tensor: torch.Tensor, cut: Slice | None) -> torch.Tensor:
    """What a rank holds of a tensor."""
    return tensor if cut is None else take(tensor, cut.dim, cut.counts, cut.inner, cut.member)


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
