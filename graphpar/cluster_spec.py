"""The written form of a cluster: what a YAML file or a dict may say, checked key by key.

Full form, with everything optional but the devices:

    nodes:
      - name: a
        devices: {kind: h100-sxm-80gb, count: 8}
        link: nvlink4
      - name: b
        devices: [{kind: v100-sxm2-32gb, count: 4}, {kind: cpu, count: 1, slowdown: 2.0}]
        link: {bytes_per_s: 25e9, latency_s: 5e-6}
        host: b.example.org
        network: {bytes_per_s: 3e9}          # this node's own card, when slower than the network
    network: {bytes_per_s: 12.5e9, latency_s: 10e-6, pairs: [{nodes: [a, b], bytes_per_s: 1e9}]}

Short form, one node of this machine: `devices: [{kind: cpu, count: 2}]`, with an optional `link`.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from graphpar import catalogue
from graphpar.errors import ClusterError

LOCAL_NODE = "local"
"""Name of the node of the short form."""


class KindSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A kind of device described in place; `family` picks the efficiency curve."""

    name: str
    peak_flops_per_s: dict[str, float]
    memory_bytes: float
    memory_bytes_per_s: float
    family: str = ""
    link: str = ""
    is_cpu: bool = False
    power_w: float | None = None


class DeviceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Some equal devices of a node."""

    kind: str | KindSpec
    count: int = 1
    slowdown: float = 1.0
    memory_bytes: float | None = None
    threads: int = 1


class LinkSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A link by name of its kind, by numbers, or a kind with numbers changed."""

    kind: str = ""
    bytes_per_s: float | None = None
    latency_s: float | None = None


MOST_DEVICES = 100_000
"""More than any plan could use; what stands for more is a slip, and would take the memory."""


class PairSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The network between two named nodes."""

    nodes: tuple[str, str]
    kind: str = ""
    bytes_per_s: float | None = None
    latency_s: float | None = None


class NetworkSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The network between nodes; `pairs` are exceptions."""

    kind: str = ""
    bytes_per_s: float | None = None
    latency_s: float | None = None
    pairs: tuple[PairSpec, ...] = ()


class NodeSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One machine."""

    name: str
    devices: DeviceSpec | tuple[DeviceSpec, ...]
    link: str | LinkSpec | None = None
    host: str | None = None
    network: str | LinkSpec | None = None


class ClusterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole cluster."""

    nodes: tuple[NodeSpec, ...]
    network: str | NetworkSpec | None = None


class _LocalSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices: DeviceSpec | tuple[DeviceSpec, ...]
    link: str | LinkSpec | None = None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Reads plain data and refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file.

    Raises:
        ClusterError: There is no such file, or it is no YAML, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"Cannot read the cluster file {path}: {error}") from error
    try:
        node = yaml.compose(text, _UniqueKeyLoader)
        _refuse_size(node, path)
        content = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        tabs = "; YAML takes no tabs, indent with spaces" if "\\t" in str(error) else ""
        raise ClusterError(f"The cluster file {path} is no valid YAML: {error}{tabs}") from error
    except RecursionError:
        raise ClusterError(
            f"The cluster file {path} nests its entries too deep; a cluster has a few levels of them."
        ) from None
    if not isinstance(content, dict):
        raise ClusterError(
            f"The cluster file {path} holds {_describe(content)} where a mapping with `nodes` or "
            "`devices` should stand."
        )
    return content


def _refuse_size(root: yaml.Node | None, path: str | Path) -> None:
    """
    Raises:
        ClusterError: References to anchors make more entries of the file than any cluster has.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, inside: frozenset[int]) -> int:
        if id(node) in inside:
            line = node.start_mark.line + 1
            raise ClusterError(f"The cluster file {path} refers to itself in line {line}.")
        if id(node) not in sizes:
            parts = [node.value] if isinstance(node, yaml.ScalarNode) else node.value
            children = [c for p in parts for c in (p if isinstance(p, tuple) else (p,))]
            here = inside | {id(node)}
            sizes[id(node)] = 1 + sum(size(c, here) for c in children if isinstance(c, yaml.Node))
        return sizes[id(node)]

    entries = size(root, frozenset()) if root is not None else 0
    if entries > MOST_DEVICES:
        raise ClusterError(
            f"The cluster file {path} stands for {entries} entries, most of them by reference to "
            "anchors; give each device group once, with its `count`."
        )


def parse(data: Mapping[str, Any], where: str = "cluster") -> ClusterSpec:
    """The checked form of a cluster dict, short form expanded.

    Raises:
        ClusterError: A key is unknown, missing, of the wrong type or impossible; names its path.
    """
    if not isinstance(data, Mapping):
        raise ClusterError(f"A {where} is a mapping with `nodes` or `devices`, not {_describe(data)}.")
    short = "nodes" not in data and "devices" in data
    form: type[ClusterSpec] | type[_LocalSpec] = _LocalSpec if short else ClusterSpec
    try:
        # Not strict because YAML reads 12.5e9 (no sign in the exponent) as text.
        spec = msgspec.convert(_plain(data), form, strict=False)
    except msgspec.ValidationError as error:
        raise ClusterError(f"In the {where}: {error}. {_unit_hint(error)}{_keys_hint(form)}") from error
    if isinstance(spec, _LocalSpec):
        spec = ClusterSpec((NodeSpec(LOCAL_NODE, spec.devices, link=spec.link),))
    _check(spec, where)
    return spec


_UNITS = re.compile(r"(?P<key>\w+_(?:bytes|bytes_per_s|flops_per_s|s|w)|bytes_per_s)`?$")


def _unit_hint(error: msgspec.ValidationError) -> str:
    """How a number with its unit in the key is written, where text stands instead."""
    found = _UNITS.search(str(error))
    if found is None or "got `str`" not in str(error):
        return ""
    return f"{found['key']} is a plain number in the unit of its name (16e9, not 16 GB). "


def _keys_hint(form: type) -> str:
    known = {
        "cluster": form,
        "node": NodeSpec,
        "device": DeviceSpec,
        "kind": KindSpec,
        "link": LinkSpec,
    }
    return "Known keys: " + "; ".join(
        f"{name}: {', '.join(f.name for f in msgspec.structs.fields(struct))}"
        for name, struct in known.items()
    )


def _plain(data: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists, which is what the converter knows."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return data


def _describe(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _check(spec: ClusterSpec, where: str) -> None:
    if not spec.nodes:
        raise ClusterError(f"The {where} has no nodes; a cluster needs at least one device.")
    seen: set[str] = set()
    for index, node in enumerate(spec.nodes):
        place = f"{where}: nodes[{index}]"
        if not node.name or "/" in node.name:
            raise ClusterError(f"{place}.name is {node.name!r}; a name is not empty and has no '/'.")
        if node.name in seen:
            raise ClusterError(f"{place}.name: two nodes are named {node.name!r}; rename one.")
        seen.add(node.name)
        _check_node(node, place)
    if isinstance(spec.network, NetworkSpec):
        _check_network(spec.network, seen, f"{where}: network")


def _check_node(node: NodeSpec, place: str) -> None:
    if not groups(node):
        raise ClusterError(f"{place} ({node.name}) has no devices; give at least one, or drop it.")
    for index, group in enumerate(groups(node)):
        at = f"{place}.devices" + ("" if isinstance(node.devices, DeviceSpec) else f"[{index}]")
        _check_whole(group.count, f"{at}.count")
        if group.count > MOST_DEVICES:
            raise ClusterError(f"{at}.count is {group.count}; it must be at most {MOST_DEVICES}.")
        _check_whole(group.threads, f"{at}.threads")
        _positive(group.slowdown, f"{at}.slowdown")
        if group.slowdown < 1:
            raise ClusterError(
                f"{at}.slowdown is {group.slowdown:g}; emulation can only wait, so it is at "
                "least 1. To make one device relatively faster, slow the others down."
            )
        _positive(group.memory_bytes, f"{at}.memory_bytes")
        if isinstance(group.kind, KindSpec):
            _check_kind(group.kind, f"{at}.kind")
    for name in ("link", "network"):
        _check_link(getattr(node, name), f"{place}.{name}")


def _check_kind(kind: KindSpec, at: str) -> None:
    if not kind.peak_flops_per_s:
        raise ClusterError(f"{at}.peak_flops_per_s is empty; give at least float32.")
    known = sorted(
        {dtype for device in catalogue.devices().values() for dtype in device.peak_flops_per_s}
    )
    for dtype, peak in kind.peak_flops_per_s.items():
        if dtype not in known:
            raise ClusterError(
                f"{at}.peak_flops_per_s has a peak for {dtype!r}, which is no format; formats are "
                f"{', '.join(known)}."
            )
        _positive(peak, f"{at}.peak_flops_per_s.{dtype}")
    for name in ("memory_bytes", "memory_bytes_per_s", "power_w"):
        _positive(getattr(kind, name), f"{at}.{name}")


def _check_link(link: str | LinkSpec | NetworkSpec | PairSpec | None, at: str) -> None:
    if link is None or isinstance(link, str):
        return
    _positive(link.bytes_per_s, f"{at}.bytes_per_s")
    if link.latency_s is not None and not (math.isfinite(link.latency_s) and link.latency_s >= 0):
        raise ClusterError(f"{at}.latency_s is {link.latency_s}; a latency is zero or more seconds.")


def _check_network(network: NetworkSpec, nodes: set[str], at: str) -> None:
    _check_link(network, at)
    seen: set[frozenset[str]] = set()
    for index, pair in enumerate(network.pairs):
        place = f"{at}.pairs[{index}]"
        _check_link(pair, place)
        unknown = [name for name in pair.nodes if name not in nodes]
        if unknown:
            raise ClusterError(
                f"{place}.nodes names {unknown[0]!r}, which is no node; nodes: {sorted(nodes)}."
            )
        key = frozenset(pair.nodes)
        if len(key) == 1 or key in seen:
            why = "names one node twice" if len(key) == 1 else "repeats an earlier pair"
            raise ClusterError(f"{place}.nodes {list(pair.nodes)} {why}; give two nodes, once.")
        seen.add(key)


def _positive(value: float | None, at: str) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ClusterError(f"{at} is {value}; it must be a positive number.")


def _check_whole(value: int, at: str) -> None:
    if value < 1:
        raise ClusterError(f"{at} is {value}; it must be at least 1.")


def groups(node: NodeSpec) -> tuple[DeviceSpec, ...]:
    """The node's device groups, whether one or several were written."""
    return (node.devices,) if isinstance(node.devices, DeviceSpec) else node.devices
