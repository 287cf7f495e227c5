"""Changes to a setting, in words: how they are read, and what they do.

drop NAME                      a device (a/0), a node, or all devices of a kind
down NAME                      the same, for the question of a failure
add [N] KIND [to NODE]         devices of the catalogue, in a node or in one of their own
add [N] INSTANCE               cloud instances
replace NAME with KIND         a device, or all devices of a node or of a kind
set PATH=VALUE                 see `PATHS`
tp=A pp=B dp=C [m=D]           a hand-made configuration
"""

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from graphpar import catalogue
from graphpar.cluster import Cluster
from graphpar.errors import ClusterError
from graphpar.ir.formats import FORMATS as PRECISIONS
from graphpar.partition.settings import ScheduleWish
from graphpar.scenarios.prices import instance_price
from graphpar.scenarios.types import OPTIMIZER_STATES, Layout, Setting

PATHS = (
    "batch, seq_len, precision, optimizer, schedule, microbatches, recompute, tensor, "
    "network.bytes_per_s, network.latency_s, NODE.link.bytes_per_s, NODE.link.latency_s, "
    "NODE.network.bytes_per_s, NODE.network.latency_s, NODE.count, NODE.copies, NODE.usd_per_h, "
    "DEVICE.memory_bytes, DEVICE.slowdown"
)
MOST_DEVICES = 10_000
"""More than any plan could use; what asks for more is a slip, and would take the memory."""

MOST_SAMPLES = 1_000_000
"""The largest whole number that anything may be set to."""

FORMS = "drop, down, add, replace, set PATH=VALUE, or a configuration such as tp=2 pp=4"


def apply(setting: Setting, changes: Sequence[str]) -> Setting:
    """The setting with all changes made, in order.

    Raises:
        ValueError: A change is not understood, names nothing, or contradicts another.
    """
    if not changes:
        raise ValueError(f"a scenario changes nothing; the forms of a change are {FORMS}")
    _check_contradictions(changes)
    for number, change in enumerate(changes):
        try:
            setting = _apply_one(setting, change.strip())
        except ValueError as error:
            if not number:
                raise
            raise ValueError(f"{error} (after {'; '.join(changes[:number])})") from error
    return setting


def _apply_one(setting: Setting, change: str) -> Setting:
    verb, _, rest = change.partition(" ")
    rest = rest.strip()
    verbs: dict[str, Callable[[Setting, str], Setting]] = {
        "drop": _drop,
        "down": _drop,
        "add": _add,
        "replace": _replace,
        "set": _set,
    }
    if verb in verbs and rest:
        try:
            return verbs[verb](setting, rest)
        except ClusterError as error:
            raise ValueError(f"change {change!r}: {error}") from error
    if re.fullmatch(r"((tp|pp|dp|m)=\d+\s*)+", change):
        return replace(setting, layout=parse_layout(change))
    raise ValueError(f"change {change!r} is not understood; the forms are {FORMS}")


def parse_layout(text: str) -> Layout:
    """A configuration from words such as `tp=2 pp=4 dp=2 m=16`.

    >>> parse_layout("pp=4 m=8")
    Layout(tensor=1, pipeline=4, data=1, microbatches=8)
    """
    values = dict(re.findall(r"(tp|pp|dp|m)=(\d+)", text))
    if not values.keys() & {"tp", "pp", "dp"}:
        raise ValueError(
            f"configuration {text!r} says nothing of tp, pp or dp, which would be one device; write for "
            "example dp=4 m=2, or set microbatches=2 to leave the devices to the planner"
        )
    count = int(values["m"]) if "m" in values else None
    return Layout(int(values.get("tp", 1)), int(values.get("pp", 1)), int(values.get("dp", 1)), count)


def _check_contradictions(changes: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for change in changes:
        for topic in _topics(change.strip()):
            if topic in seen and seen[topic] != change:
                raise ValueError(
                    f"changes {seen[topic]!r} and {change!r} contradict each other: both are about "
                    f"{topic}; leave one out"
                )
            seen[topic] = change


def _topics(change: str) -> list[str]:
    """What a change decides, so that a second decision can be told."""
    if match := re.match(r"(?:drop|down)\s+(\S+)$|replace\s+(\S+)\s+with\s", change):
        return [match[1] or match[2]]
    if match := re.match(r"set\s+([^=\s]+)\s*=", change):
        return [match[1]]
    if re.match(r"(tp|pp|dp|m)=", change):
        return ["the configuration", "tensor", *(["microbatches"] if re.search(r"\bm=", change) else [])]
    return []


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
    prices = tuple((n, p) for n, p in setting.usd_per_h if n in names)
    return replace(setting, cluster=replace(cluster, nodes=nodes), usd_per_h=prices)


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
    raise ValueError(f"{name!r} names no device, node or kind of this cluster; the nearest: {near}")


def _drop(setting: Setting, name: str) -> Setting:
    places = set(_chosen(setting, name))
    data = _written(setting.cluster)
    for i, node in enumerate(data["nodes"]):
        node["devices"] = [d for j, d in enumerate(node["devices"]) if (i, j) not in places]
    return _rebuilt(setting, data)


def _replace(setting: Setting, rest: str) -> Setting:
    name, word, kind = rest.partition(" with ")
    if not word:
        raise ValueError(f"replace {rest!r} is not understood; write: replace NAME with KIND")
    key = catalogue.find_device(kind.strip())
    data = _written(setting.cluster)
    for i, j in _chosen(setting, name.strip()):
        old = data["nodes"][i]["devices"][j]
        data["nodes"][i]["devices"][j] = {"kind": key, "count": 1, NAME: old[NAME]}
    for node in data["nodes"]:
        if all(group["kind"] == key for group in node["devices"]):
            # A node of new cards has their link, not that of the cards it had.
            node.pop("link", None)
    return _rebuilt(setting, data)


def _add(setting: Setting, rest: str) -> Setting:
    match = re.fullmatch(r"(?:(\d+)\s+)?(\S+)(?:\s+to\s+(\S+))?", rest)
    if match is None or match[1] == "0":
        raise ValueError(f"add {rest!r} is not understood; write: add [N] KIND [to NODE]")
    count, what, where = int(match[1] or 1), match[2], match[3]
    _check_room(setting, count)
    if where is not None:
        return _add_devices(setting, count, what, where)
    try:
        key = catalogue.find_instance(what)
    except ClusterError:
        return _add_node(setting, count, what)
    for _ in range(count):
        setting = _add_instance(setting, key)
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


def _set(setting: Setting, rest: str) -> Setting:
    path, sign, text = (part.strip() for part in rest.partition("="))
    if not sign or not text:
        raise ValueError(f"set {rest!r} is not understood; write: set PATH=VALUE")
    scalars: dict[str, Callable[[Setting, str], Setting]] = {
        "batch": lambda s, t: replace(s, batch=_whole(path, t)),
        "seq_len": lambda s, t: replace(s, seq_len=_whole(path, t)),
        "precision": _set_precision,
        "optimizer": _set_optimizer,
        "schedule": _set_schedule,
        "microbatches": _set_microbatches,
        "recompute": _set_recompute,
        "tensor": _set_tensor,
    }
    if path in scalars:
        return scalars[path](setting, text)
    owner, _, field = path.rpartition(".")
    if not owner:
        near = catalogue.nearest(path, [*scalars, "network.bytes_per_s", "network.latency_s"], 3)
        raise ValueError(f"{path!r} cannot be set; the nearest: {', '.join(near)}. Known: {PATHS}")
    return _set_in_cluster(setting, owner, field, text)


def _set_in_cluster(setting: Setting, owner: str, field: str, text: str) -> Setting:
    value = _number(f"{owner}.{field}", text)
    data = _written(setting.cluster)
    if field in ("bytes_per_s", "latency_s"):
        _set_link(setting, data, owner, field, value)
    elif field in ("memory_bytes", "slowdown"):
        for i, j in _chosen(setting, owner):
            data["nodes"][i]["devices"][j][field] = value
    elif field == "count":
        _set_count(setting, data, owner, _whole(f"{owner}.count", text))
    elif field == "copies":
        return _set_copies(setting, data, owner, _whole(f"{owner}.copies", text))
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
        for node in data["nodes"]:
            if field == "bytes_per_s":
                # A node's own card would otherwise still be the limit.
                node.pop("network", None)
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


def _set_precision(setting: Setting, text: str) -> Setting:
    if text not in PRECISIONS:
        raise ValueError(f"precision {text!r} is not known; give one of {', '.join(PRECISIONS)}")
    return replace(setting, precision=text)


def _set_optimizer(setting: Setting, text: str) -> Setting:
    if not setting.training:
        raise ValueError("an optimizer can only be set for training; add --train, or give train=")
    if text not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer {text!r} is not known; give one of {', '.join(OPTIMIZER_STATES)}")
    return replace(setting, optimizer=text)


def _set_schedule(setting: Setting, text: str) -> Setting:
    if text not in get_args(ScheduleWish):
        raise ValueError(f"schedule {text!r} is not known; give {', '.join(get_args(ScheduleWish))}")
    return replace(setting, schedule=cast(Any, text))


def _set_microbatches(setting: Setting, text: str) -> Setting:
    return replace(setting, microbatches="auto" if text == "auto" else _whole("microbatches", text))


def _set_tensor(setting: Setting, text: str) -> Setting:
    if "x" in text:
        first, _, second = text.partition("x")
        return replace(setting, tensor=(_whole("tensor", first), _whole("tensor", second)))
    return replace(setting, tensor="auto" if text == "auto" else _whole("tensor", text))


def _set_recompute(setting: Setting, text: str) -> Setting:
    values = {"on": True, "true": True, "off": False, "false": False, "auto": None}
    if text not in values:
        raise ValueError(f"recompute {text!r} is not known; give on, off or auto")
    return replace(setting, recompute=values[text])


def _number(path: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{path} is {text!r}; it must be a number") from None
    if not 0 < value < float("inf"):
        raise ValueError(f"{path} is {text}; it must be positive")
    return value


def _whole(path: str, text: str) -> int:
    value = _number(path, text)
    if value > MOST_SAMPLES:
        raise ValueError(f"{path} is {text}; it must be at most {MOST_SAMPLES}")
    if value != int(value):
        raise ValueError(f"{path} is {text}; it must be a whole number")
    return int(value)
