"""When one setting cannot be worse than another: every plan of the other is a plan of it, no slower.

More devices, memory or speed of a device, faster links, a lighter optimiser, or a choice left open
instead of made never make the best plan slower. A search cut short may miss what another scenario found;
so the answers of a study are compared along this order.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import inf

from graphpar.cluster import Cluster
from graphpar.device import Device, Link, Node
from graphpar.partition.types import TensorWidth
from graphpar.scenarios.pricing import only
from graphpar.scenarios.types import OPTIMIZER_STATES, OPTIMIZER_UPDATES, Setting


@dataclass(frozen=True)
class GivenOptimizer:
    """What the caller's own optimiser takes; infinite where that is not known.

    Attributes:
        state: Bytes of state per byte of parameters, where it works element by element.
        update_on_gpu: Bytes that its update takes on a GPU, per byte of gradients.
        update_on_cpu: The same on a processor, where those known by name take nothing.
    """

    state: float = inf
    update_on_gpu: float = inf
    update_on_cpu: float = inf


_UNKNOWN = GivenOptimizer()


def covers(large: Setting, small: Setting, given: GivenOptimizer = _UNKNOWN) -> bool:
    """Whether any plan of `small` runs under `large`, in no more time per sample; see `places`."""
    return places(large, small, given) is not None


def places(large: Setting, small: Setting, given: GivenOptimizer = _UNKNOWN) -> dict[str, str] | None:
    """Where any plan of `small` runs under `large` in no more time per sample: device by device.

    Equal devices of a node stand in for each other, and so do equal nodes. The batch of `large` may be a
    multiple of that of `small`: each pipeline then takes more microbatches of the same size before one
    update.

    Args:
        large: What may be better.
        small: What may be worse.
        given: What the caller's own optimiser takes.

    Returns:
        By device of `small` the one that takes its place; None where that is not so.
    """
    if not could_cover(large, small, given):
        return None
    return _places(large.cluster, small.cluster, large.layout is not None)


def could_cover(large: Setting, small: Setting, given: GivenOptimizer = _UNKNOWN) -> bool:
    """`covers` but for the clusters; cheap, for studies of many scenarios."""
    if large.layout is not None and large.layout != small.layout:
        return False
    alike = all(
        getattr(large, name) == getattr(small, name) for name in ("seq_len", "training", "precision")
    )
    return (
        alike
        and _batch_covers(large, small)
        and _optimizer_covers(large, small, given)
        and large.schedule in ("auto", small.schedule)
        and large.microbatches in ("auto", small.microbatches)
        and large.recompute in (None, small.recompute)
        and width(large.tensor) >= _width_used(small)
        and (large.tensor == small.tensor or not isinstance(small.tensor, tuple))
    )


def with_these_alone(setting: Setting, used: Collection[str]) -> Setting:
    """The setting without the devices that its plan leaves idle: the plan is one of this, too."""
    if setting.layout is not None:
        return setting
    return replace(setting, cluster=only(setting.cluster, used))


def width(tensor: TensorWidth) -> float:
    """The most members of a tensor group, as a number."""
    if isinstance(tensor, tuple):
        return tensor[0] * tensor[1]
    return inf if tensor == "auto" else tensor


def _width_used(setting: Setting) -> float:
    return width(setting.tensor) if setting.layout is None else setting.layout.tensor


def _batch_covers(large: Setting, small: Setting) -> bool:
    if large.batch == small.batch:
        return True
    free = large.microbatches == "auto" and large.layout is None and small.layout is None
    return free and large.batch % small.batch == 0


def _optimizer_covers(large: Setting, small: Setting, given: GivenOptimizer) -> bool:
    mine, other = large.optimizer, small.optimizer
    if mine == other:
        return True
    states = {**OPTIMIZER_STATES, "given": given.state}
    updates = {
        False: {**OPTIMIZER_UPDATES, "given": given.update_on_gpu},
        True: {**dict.fromkeys(OPTIMIZER_UPDATES, 0.0), "given": given.update_on_cpu},
    }
    here = [updates[on_cpu] for on_cpu in {device.is_cpu for device in small.cluster.devices}]
    return states[mine] <= states[other] < inf and all(u[mine] <= u[other] for u in here)


def _places(large: Cluster, small: Cluster, same_devices: bool) -> dict[str, str] | None:
    if same_devices and [d.name for d in large.devices] != [d.name for d in small.devices]:
        return None
    if len(small.nodes) > 1 and not _link_covers(large.network, small.network):
        return None
    moved = _places_of_nodes(large, small)
    if moved is None or not _pairs_cover(large, small):
        return None
    # A configuration made by hand takes devices as they come.
    return None if same_devices and any(mine != other for mine, other in moved.items()) else moved


def _places_of_nodes(large: Cluster, small: Cluster) -> dict[str, str] | None:
    """Each node in the one of its name where that is enough, else in any other that is."""
    free = {node.name: node for node in large.nodes}
    moved: dict[str, str] = {}
    waiting: list[Node] = []
    for node in small.nodes:
        own = free.get(node.name)
        found = _places_in_node(own, node, small) if own is not None else None
        if found is None:
            waiting.append(node)
            continue
        del free[node.name]
        moved |= found
    if waiting and (large.pairs or small.pairs):
        # Nodes with links of their own are not like others.
        return None
    for node in waiting:
        able = ((name, _places_in_node(other, node, small)) for name, other in free.items())
        name, there = next(((n, p) for n, p in able if p is not None), ("", None))
        if there is None:
            return None
        del free[name]
        moved |= there
    return moved


def _places_in_node(large: Node, small: Node, cluster: Cluster) -> dict[str, str] | None:
    """Each device in that of its name, or in an equal one, or else in the weakest that is no worse."""
    if len(small.devices) > 1 and not _link_covers(large.link, small.link):
        return None
    if len(cluster.nodes) > 1 and not _card_covers(large, small, cluster.network):
        return None
    free = sorted(large.devices, key=lambda d: (d.memory_bytes, -d.slowdown))
    moved: dict[str, str] = {}
    # Who may only stand where few may is placed first.
    for device in sorted(small.devices, key=lambda d: (-d.memory_bytes, d.slowdown)):
        able = [d for d in free if _device_covers(d, device)]
        if not able:
            return None
        own = next((d for d in able if d.name == device.name), able[0])
        free.remove(own)
        moved[device.name] = own.name
    return moved


def _device_covers(large: Device, small: Device) -> bool:
    return (
        large.to_dict() | {"memory_bytes": 0, "slowdown": 1.0}
        == small.to_dict() | {"memory_bytes": 0, "slowdown": 1.0}
        and large.memory_bytes >= small.memory_bytes
        and large.slowdown <= small.slowdown
        # Messages cost workers time but those that make up for it in their pauses.
        and (not large.is_local_cpu or (large.slowdown > 1) == (small.slowdown > 1))
    )


def _pairs_cover(large: Cluster, small: Cluster) -> bool:
    names = {node.name for node in small.nodes}
    faster = {frozenset(pair): link for pair, link in large.pairs if set(pair) <= names}
    slower = {frozenset(pair): link for pair, link in small.pairs}
    return faster.keys() == slower.keys() and all(_link_covers(faster[k], slower[k]) for k in slower)


def _card_covers(large: Node, small: Node, network: Link) -> bool:
    """Whether a node's own network limits it no more than in the other cluster."""
    return large.network is None or _link_covers(large.network, small.network or network)


def _link_covers(large: Link, small: Link) -> bool:
    # What messages of emulated links are late by, their numbers do not say.
    return large.emulated == small.emulated and large.cost.at_least(small.cost)
