"""Changes to the cluster of a setting: devices and nodes come, go or become others; their links."""

import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graphpar import catalogue
from graphpar.cluster import Cluster
from graphpar.device import Device
from graphpar.errors import ClusterError
from graphpar.scenarios.prices import instance_price
from graphpar.scenarios.types import Setting

PATHS = (
    "batch, seq_len, precision, optimizer, schedule, microbatches, recompute, tensor, "
    "network.bytes_per_s, network.latency_s, NODE.link.bytes_per_s, NODE.link.latency_s, "
    "NODE.network.bytes_per_s, NODE.network.latency_s, NODE.count, NODE.copies, NODE.usd_per_h, "
    "DEVICE.memory_bytes, DEVICE.slowdown"
)
MOST_DEVICES = 10_000
"""More than any plan could use; what asks for more is a slip, and would take the memory."""

MOST_TOLD = 8
"""So many nodes are named where none was meant."""

MOST_SAMPLES = 1_000_000
"""The largest whole number that anything may be set to."""


NAME = "_name"
"""Key under which a written device carries its name while changes are made."""


def _written(cluster: Cluster) -> dict[str, Any]:
    """The cluster's dict with one group per device, each with its name, to take single ones out."""
    data = copy.deepcopy(cluster.to_dict())
    for node, real in zip(data["nodes"], cluster.nodes, strict=True):
        singles = [{**group, "count": 1} for group in node["devices"] for _ in range(group["count"])]
        node["devices"] = [
            {**group, NAME: device.name} for group, device in zip(singles, real.devices, strict=True)
        ]
    return data


def _rebuilt(setting: Setting, data: dict[str, Any]) -> Setting:
    """The setting on the cluster that was written; devices keep their names."""
    data["nodes"] = [node for node in data["nodes"] if node["devices"]]
    if not data["nodes"]:
        raise ClusterError("no device would be left")
    names = {node["name"] for node in data["nodes"]}
    if isinstance(data["network"], dict) and "pairs" in data["network"]:
        pairs = [p for p in data["network"]["pairs"] if set(p["nodes"]) <= names]
        data["network"] = {**data["network"], "pairs": pairs}
        if not pairs:
            del data["network"]["pairs"]
    device_names = [_device_names(node) for node in data["nodes"]]
    cluster = Cluster.from_dict(data)
    nodes = tuple(
        replace(
            node,
            devices=tuple(replace(d, name=n) for d, n in zip(node.devices, own, strict=True)),
        )
        for node, own in zip(cluster.nodes, device_names, strict=True)
    )
    bought = {node.name: _kinds(node.devices) for node in setting.cluster.nodes}
    # Nobody has told the price of a node with other or more devices; one with fewer is paid whole.
    same = {node.name for node in nodes if _kinds(node.devices) <= bought.get(node.name, Counter())}
    prices = tuple((n, p) for n, p in setting.usd_per_h if n in same)
    return replace(setting, cluster=replace(cluster, nodes=nodes), usd_per_h=prices)


def _kinds(devices: Sequence[Device]) -> Counter[str]:
    return Counter(device.kind for device in devices)


def _device_names(node: dict[str, Any]) -> list[str]:
    """Names of a written node's devices, new ones numbered on; the names are taken out."""
    given = [group.pop(NAME, None) for group in node["devices"]]
    taken = {name for name in given if name}
    free = (name for i in itertools.count() if (name := f"{node['name']}/{i}") not in taken)
    counts = [group.get("count", 1) for group in node["devices"]]
    names = []
    for name, count in zip(given, counts, strict=True):
        names += [name] if name and count == 1 else [next(free) for _ in range(count)]
    return names


def _chosen(setting: Setting, name: str) -> list[tuple[int, int]]:
    """Places (node, device) that a name means: a device, a node, or a kind.

    Raises:
        ValueError: It means nothing.
    """
    cluster = setting.cluster
    places = [
        (i, j)
        for i, node in enumerate(cluster.nodes)
        for j, device in enumerate(node.devices)
        if name in (device.name, node.name, device.kind)
    ]
    if places:
        return places
    kinds = {device.kind for device in cluster.devices}
    known = [*(n.name for n in cluster.nodes), *(d.name for d in cluster.devices), *kinds]
    near = ", ".join(catalogue.nearest(name, known, 3))
    nodes = ", ".join([node.name for node in cluster.nodes[:MOST_TOLD]])
    more = ", ..." if len(cluster.nodes) > MOST_TOLD else ""
    raise ValueError(
        f"{name!r} names no device, node or kind of this cluster; the nearest: {near}; "
        f"nodes: {nodes}{more}; kinds: {', '.join(sorted(kinds))}"
    )


def drop(setting: Setting, name: str) -> Setting:
    """Without a device, a node or a kind."""
    places = set(_chosen(setting, name))
    data = _written(setting.cluster)
    for i, node in enumerate(data["nodes"]):
        node["devices"] = [d for j, d in enumerate(node["devices"]) if (i, j) not in places]
    return _rebuilt(setting, data)


def replace_devices(setting: Setting, rest: str) -> Setting:
    """With a kind in place of devices, or an instance in place of a node."""
    name, word, kind = (part.strip() for part in rest.partition(" with "))
    if not word:
        raise ValueError(f"replace {rest!r} is not understood; write: replace NAME with KIND")
    if name in {node.name for node in setting.cluster.nodes} and _is_instance(kind):
        return _replace_with_instance(setting, name, catalogue.find_instance(kind))
    key = catalogue.find_device(kind)
    data = _written(setting.cluster)
    for i, j in _chosen(setting, name):
        old = data["nodes"][i]["devices"][j]
        data["nodes"][i]["devices"][j] = {"kind": key, "count": 1, NAME: old[NAME]}
    for node in data["nodes"]:
        if all(group["kind"] == key for group in node["devices"]):
            # A node of new cards has their link, not that of the cards it had.
            node.pop("link", None)
    return _rebuilt(setting, data)


def _is_instance(word: str) -> bool:
    try:
        catalogue.find_instance(word)
    except ClusterError:
        return False
    return True


def _replace_with_instance(setting: Setting, name: str, key: str) -> Setting:
    """A cloud instance in the place of a node, under its name."""
    data = _written(setting.cluster)
    number = next(i for i, node in enumerate(data["nodes"]) if node["name"] == name)
    data["nodes"][number] = {**Cluster.of(key, 1).to_dict()["nodes"][0], "name": name}
    made, usd_per_h = _rebuilt(setting, data), instance_price(key)
    return made if usd_per_h is None else replace(made, usd_per_h=(*made.usd_per_h, (name, usd_per_h)))


def add(setting: Setting, rest: str) -> Setting:
    """With more devices, in a node or in one of their own, or with instances."""
    match = re.fullmatch(r"(?:(\d+)\s+)?(\S+)(?:\s+to\s+(\S+))?", rest)
    if match is None or match[1] == "0":
        raise ValueError(f"add {rest!r} is not understood; write: add [N] KIND [to NODE]")
    count, what, where = int(match[1] or 1), match[2], match[3]
    _check_room(setting, count)
    if where is not None:
        return _add_devices(setting, count, what, where)
    if not _is_instance(what):
        return _add_node(setting, count, what)
    for _ in range(count):
        setting = _add_instance(setting, catalogue.find_instance(what))
    return setting


def _add_devices(setting: Setting, count: int, what: str, where: str) -> Setting:
    kind = catalogue.find_device(what)
    setting.cluster.node(where)
    data = _written(setting.cluster)
    node = next(n for n in data["nodes"] if n["name"] == where)
    node["devices"] += [{"kind": kind, "count": 1} for _ in range(count)]
    return _rebuilt(setting, data)


def _add_node(setting: Setting, count: int, what: str) -> Setting:
    kind = catalogue.find_device(what)
    data = _written(setting.cluster)
    name = _free_name(setting.cluster, kind.split("-")[0])
    data["nodes"].append({"name": name, "devices": [{"kind": kind, "count": count}]})
    return _rebuilt(setting, data)


def _add_instance(setting: Setting, key: str) -> Setting:
    node = Cluster.of(key, 1).to_dict()["nodes"][0]
    node["name"] = _free_name(setting.cluster, key.split(".")[0])
    data = _written(setting.cluster)
    data["nodes"].append(node)
    made = _rebuilt(setting, data)
    usd_per_h = instance_price(key)
    if usd_per_h is None:
        return made
    return replace(made, usd_per_h=(*made.usd_per_h, (node["name"], usd_per_h)))


def _check_room(setting: Setting, more: int) -> None:
    number = len(setting.cluster.devices) + more
    if number > MOST_DEVICES:
        raise ValueError(f"the cluster would have {number} devices; at most {MOST_DEVICES} are planned")


def _free_name(cluster: Cluster, stem: str) -> str:
    taken = {node.name for node in cluster.nodes}
    return next(name for i in range(len(taken) + 1) if (name := f"{stem}-{i}") not in taken)


def set_in_cluster(setting: Setting, owner: str, field: str, text: str) -> Setting:
    """With another number of a link, a device or a node; `text` as it was written."""
    value = number_of(f"{owner}.{field}", text, or_zero=field in ("latency_s", "usd_per_h"))
    data = _written(setting.cluster)
    if field in ("bytes_per_s", "latency_s"):
        _set_link(setting, data, owner, field, value)
    elif field in ("memory_bytes", "slowdown"):
        for i, j in _chosen(setting, owner):
            data["nodes"][i]["devices"][j][field] = value
    elif field == "count":
        _set_count(setting, data, owner, whole(f"{owner}.count", text))
    elif field == "copies":
        return _set_copies(setting, data, owner, whole(f"{owner}.copies", text))
    elif field == "usd_per_h":
        setting.cluster.node(owner)
        prices = {**dict(setting.usd_per_h), owner: value}
        return replace(setting, usd_per_h=tuple(prices.items()))
    else:
        raise ValueError(f"{owner}.{field} cannot be set; known: {PATHS}")
    return _rebuilt(setting, data)


def _set_link(setting: Setting, data: dict[str, Any], owner: str, field: str, value: float) -> None:
    if owner == "network":
        data["network"] = _link_with(data["network"], setting.cluster.network.cost, field, value)
        for node, found in zip(data["nodes"], setting.cluster.nodes, strict=True):
            # A node's own card would otherwise still be the limit.
            if field == "bytes_per_s":
                node.pop("network", None)
            elif found.network is not None:
                node["network"] = _link_with(None, found.network.cost, field, value)
        return
    name, _, part = owner.rpartition(".")
    if part not in ("link", "network"):
        raise ValueError(f"{owner}.{field} cannot be set; known: {PATHS}")
    found = setting.cluster.node(name)
    node = next(n for n in data["nodes"] if n["name"] == name)
    present = found.link if part == "link" else (found.network or setting.cluster.network)
    node[part] = _link_with(node.get(part), present.cost, field, value)


def _link_with(written: Any, cost: Any, field: str, value: float) -> dict[str, Any]:
    body = {"bytes_per_s": cost.bytes_per_s, "latency_s": cost.latency_s, field: value}
    if isinstance(written, dict) and "pairs" in written:
        body["pairs"] = written["pairs"]
    return body


def _set_count(setting: Setting, data: dict[str, Any], owner: str, count: int) -> None:
    setting.cluster.node(owner)
    node = next(n for n in data["nodes"] if n["name"] == owner)
    groups = node["devices"]
    _check_room(setting, count - len(groups))
    first = {**groups[0], NAME: ""}
    if any({**g, NAME: ""} != first for g in groups):
        raise ValueError(f"{owner}.count cannot be set: the node's devices are unlike")
    more = [{k: v for k, v in first.items() if k != NAME} for _ in range(count - len(groups))]
    node["devices"] = [*groups[:count], *more]


def _set_copies(setting: Setting, data: dict[str, Any], owner: str, copies: int) -> Setting:
    setting.cluster.node(owner)
    node = next(n for n in data["nodes"] if n["name"] == owner)
    _check_room(setting, (copies - 1) * len(node["devices"]))
    taken = {n["name"] for n in data["nodes"]}
    names = [name for i in range(2, copies + len(taken) + 2) if (name := f"{owner}-{i}") not in taken]
    for name in names[: copies - 1]:
        copied = {**copy.deepcopy(node), "name": name}
        for group in copied["devices"]:
            group.pop(NAME, None)
        data["nodes"].append(copied)
    made = _rebuilt(setting, data)
    price = dict(setting.usd_per_h).get(owner)
    if price is None:
        return made
    more = tuple((name, price) for name in names[: copies - 1])
    return replace(made, usd_per_h=(*setting.usd_per_h, *more))


def number_of(path: str, text: str, *, or_zero: bool = False) -> float:
    """A positive, finite number, or zero where that makes sense; ValueError otherwise."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{path} is {text!r}; it must be a number") from None
    if or_zero and value == 0:
        return 0.0
    if not 0 < value < math.inf:
        kind = "zero, or positive" if or_zero else "positive"
        raise ValueError(f"{path} is {text}; it must be {kind} and finite")
    return value


def whole(path: str, text: str) -> int:
    """A positive whole number; ValueError otherwise."""
    value = number_of(path, text)
    if value > MOST_SAMPLES:
        raise ValueError(f"{path} is {text}; it must be at most {MOST_SAMPLES}")
    if value != int(value):
        raise ValueError(f"{path} is {text}; it must be a whole number")
    return int(value)
