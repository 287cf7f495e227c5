"""From the written form of a node to its devices and links: names resolved, defaults filled in."""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from graphpar import catalogue
from graphpar.cluster_spec import (
    DeviceSpec,
    KindSpec,
    LinkSpec,
    NetworkSpec,
    NodeSpec,
    PairSpec,
    groups,
)
from graphpar.device import LOCAL_KIND, Device, Link, Node
from graphpar.errors import ClusterError

DEFAULT_NETWORK = "ethernet-10g"


@dataclass(frozen=True)
class Ends:
    """What a link joins: how many devices, and whether all of them reach each other's memory."""

    count: int = 2
    peer_access: bool = True


ANY_TWO = Ends()


def build_node(spec: NodeSpec, where: str, num_local_cpus: int) -> Node:
    """One node with its devices and links.

    Args:
        spec: The written form.
        where: Its place, for errors.
        num_local_cpus: Workers that share this machine's memory.
    """
    devices: list[Device] = []
    kinds: list[Device] = []
    for i, group in enumerate(groups(spec)):
        at = f"{where}.devices[{i}].kind"
        base = _device(group, spec.name, at, num_local_cpus)
        kinds.append(base)
        for _ in range(group.count):
            devices.append(replace(base, name=f"{spec.name}/{len(devices)}"))
    bare = Node(spec.name, tuple(devices), Link(1.0, 0.0), spec.host)
    here = runs_here(bare)
    ends = Ends(len(devices), all(map(_has_peer_access, kinds)))
    link = build_link(spec.link, _default_link(spec, kinds), here, f"{where}.link", ends)
    network = None
    if spec.network is not None:
        network = build_link(spec.network, DEFAULT_NETWORK, here, f"{where}.network")
    return replace(bare, link=link, network=network)


def _device(group: DeviceSpec, node: str, at: str, num_local_cpus: int) -> Device:
    if isinstance(group.kind, KindSpec):
        return _custom_device(group, group.kind, node, at)
    key = catalogue.find_device(group.kind, at)
    kind = catalogue.devices()[key]
    memory_bytes = group.memory_bytes
    if memory_bytes is None:
        memory_bytes = kind.memory_bytes
        if key == LOCAL_KIND:
            memory_bytes = system_memory_bytes(kind.memory_bytes) / max(num_local_cpus, 1)
    threads = group.threads if kind.is_cpu else 1
    scale = threads if key == LOCAL_KIND else 1
    return Device(
        name="",
        node=node,
        kind=key,
        family=kind.family,
        memory_bytes=int(memory_bytes),
        memory_bytes_per_s=kind.memory_bytes_per_s,
        peak_flops_per_s={t: peak * scale for t, peak in kind.peak_flops_per_s.items()},
        slowdown=group.slowdown,
        is_cpu=kind.is_cpu,
        threads=threads,
        power_w=kind.power_w,
    )


def _custom_device(group: DeviceSpec, kind: KindSpec, node: str, at: str) -> Device:
    family = kind.family or ("cpu" if kind.is_cpu else "ampere")
    if family not in catalogue.families():
        raise ClusterError(
            f"{at}.family is {family!r}; known families: {', '.join(catalogue.families())}."
        )
    return Device(
        name="",
        node=node,
        kind=kind.name,
        family=family,
        memory_bytes=int(group.memory_bytes or kind.memory_bytes),
        memory_bytes_per_s=kind.memory_bytes_per_s,
        peak_flops_per_s=dict(kind.peak_flops_per_s),
        slowdown=group.slowdown,
        is_cpu=kind.is_cpu,
        threads=group.threads,
        power_w=kind.power_w,
        in_catalogue=False,
    )


def _default_link(spec: NodeSpec, devices: list[Device]) -> str:
    """The slowest of the links that the node's kinds come with.

    What a worker on the node's processor exchanges with one on a GPU goes through main memory and the
    loopback interface, whatever the GPU's own link could do.
    """
    real = [device.kind == LOCAL_KIND for device in devices]
    if any(real) and not all(real):
        return "loopback"
    names = []
    for group, device in zip(groups(spec), devices, strict=True):
        if isinstance(group.kind, KindSpec):
            names.append(group.kind.link or ("loopback" if device.is_cpu else "pcie4"))
        else:
            names.append(catalogue.devices()[catalogue.find_device(group.kind)].link)
    known = [catalogue.find_link(name) for name in dict.fromkeys(names)]
    unlike = len(known) > 1 and not all(device.is_cpu for device in devices)
    # Unlike devices of one node meet on its PCIe bus, whatever each could do among its own kind.
    candidates = [*known, "pcie4"] if unlike else known
    candidates = [k for k in candidates if k != "loopback" or len(candidates) == 1] or known
    return min(candidates, key=lambda name: catalogue.links()[name].pair_bytes_per_s)


def build_link(
    written: str | LinkSpec | NetworkSpec | PairSpec | None,
    default: str | Link,
    here: bool,
    at: str,
    ends: Ends = ANY_TWO,
) -> Link:
    """The link that is written, what is missing taken from the default.

    Args:
        written: A kind's name, or a kind or numbers or both.
        default: A kind's name, or a link.
        here: Whether both ends run on this machine, so that numbers given must be emulated.
        at: Where it is written, for errors.
        ends: What it joins. A bridge between two devices leaves more of them to their bus, and a bus what
            cannot pass from memory to memory to the host.
    """
    if written is None and isinstance(default, Link):
        return default
    if written is None or isinstance(written, str):
        return _emulated(_catalogue_link(written or str(default), at, ends), here)
    base = _catalogue_link(written.kind, at, ends) if written.kind else default
    if isinstance(base, str):
        base = _catalogue_link(base, at, ends)
    if written.bytes_per_s is None and written.latency_s is None:
        return _emulated(base, here) if base.kind else base
    return Link(
        bytes_per_s=base.bytes_per_s if written.bytes_per_s is None else written.bytes_per_s,
        latency_s=base.latency_s if written.latency_s is None else written.latency_s,
        emulated=here,
    )


def _emulated(link: Link, here: bool) -> Link:
    return replace(link, emulated=here and link.kind != "loopback")


def _catalogue_link(name: str, at: str, ends: Ends) -> Link:
    key = catalogue.find_link(name, at)
    kind = catalogue.links()[key]
    if kind.beyond_pairs and ends.count > 2:
        key, kind = kind.beyond_pairs, catalogue.links()[kind.beyond_pairs]
    return Link(kind.pair_bytes_per_s * kind.reached(ends.peer_access), kind.latency_s, kind=key)


def _has_peer_access(device: Device) -> bool:
    """As the catalogue says; a device that is not of it is taken to have it."""
    return not device.in_catalogue or catalogue.devices()[device.kind].peer_access


def runs_here(node: Node) -> bool:
    """Whether every device of the node is this machine's processor."""
    return node.host is None and all(device.kind == LOCAL_KIND for device in node.devices)


def num_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system_memory_bytes(otherwise: float) -> float:
    """Main memory, or the container's limit when that is smaller."""
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return otherwise
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, float(limit)) if limit.isdigit() else total


def cuda_devices() -> list[dict[str, Any]]:
    """The written form of this machine's CUDA devices; empty when torch could not use them.

    Raises:
        ClusterError: A card is not in the catalogue.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None or not _torch_has_cuda():
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    cards = [line.rpartition(",") for line in lines.splitlines() if line.strip()]
    return [
        {
            "kind": catalogue.find_device(name.strip(), "nvidia-smi's list of this machine"),
            "memory_bytes": int(mebibytes) * 2**20,
        }
        for index, (name, _, mebibytes) in enumerate(cards)
        if _is_visible(index)
    ]


def _torch_has_cuda() -> bool:
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _is_visible(index: int) -> bool:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return True
    numbers = [item.strip() for item in listed.split(",")]
    # Cards may also be listed by unique id, which says how many there are but not which.
    return str(index) in numbers if all(n.isdigit() for n in numbers if n) else index < len(numbers)
