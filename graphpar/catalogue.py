"""The catalogue of devices, links and cloud instances: data from TOML files, no code.

The files live beside the cost models (`devices.toml`, `links.toml`, `instances.toml`). Every entry
names its source; a key the catalogue does not know is an error, so a misspelt one is not ignored.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from graphpar.errors import ClusterError


class DeviceKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of device; peaks are dense FLOP/s by dtype; `peer_access` over PCIe, from card to card."""

    vendor: str
    family: str
    memory_bytes: float
    memory_bytes_per_s: float
    peak_flops_per_s: dict[str, float]
    link: str
    source: str
    aliases: tuple[str, ...] = ()
    is_cpu: bool = False
    multiprocessors: int | None = None
    measured_matmul_fraction: float | None = None
    measured_float8_fraction: float | None = None
    measured_float32_fraction: float | None = None
    power_w: float | None = None
    peer_access: bool = True
    note: str = ""

    def measured_fraction(self, dtype: str) -> float | None:
        """Best measured rate of products over the peak; that of float32 and of float8 if known."""
        narrow = dtype.startswith(("float8", "float4"))
        own = self.measured_float8_fraction if narrow else self.measured_float32_fraction
        return (own if narrow or dtype == "float32" else None) or self.measured_matmul_fraction


class Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What kernels of one architecture reach of the peaks.

    `matmul_efficiency` holds pairs of FLOPs of one call and the fraction of the peak at that size, where
    the peak is `matmul_peak_flops_per_s`; `attention_by_head`, where it was measured, pairs of head size
    and the fraction over long sequences.
    """

    matmul_efficiency: tuple[tuple[float, float], ...]
    matmul_peak_flops_per_s: float
    bandwidth_fraction: float
    attention_fraction: float
    launch_s: float
    host_op_s: float
    source: str
    attention_by_head: tuple[tuple[float, float], ...] = ()


class LinkKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of link, one direction; `beyond_pairs` is what joins more devices than two.

    `staged_efficiency` stands for `efficiency` between devices that do not reach each other's memory.
    """

    bytes_per_s: float
    pair_bytes_per_s: float
    efficiency: float
    latency_s: float
    source: str
    aliases: tuple[str, ...] = ()
    beyond_pairs: str = ""
    staged_efficiency: float | None = None
    note: str = ""

    def reached(self, peer_access: bool) -> float:
        """The share of its rate that large messages get, from memory to memory or by way of the host's.

        >>> bus = links()["pcie4"]
        >>> bus.reached(True), bus.reached(False), links()["nvlink4"].reached(False)
        (0.83, 0.35, 0.81)
        """
        return self.efficiency if peer_access else self.staged_efficiency or self.efficiency


class InstanceKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One cloud instance type; prices are indicative and dated."""

    cloud: str
    device: str
    count: int
    link: str
    fabric: str
    source: str
    network_bytes_per_s: float | None = None
    nics: int = 1
    aliases: tuple[str, ...] = ()
    usd_per_h: float | None = None
    price_date: date | None = None
    note: str = ""


class _DeviceFile(msgspec.Struct, forbid_unknown_fields=True):
    sources: dict[str, str]
    families: dict[str, Family]
    devices: dict[str, DeviceKind]


class _LinkFile(msgspec.Struct, forbid_unknown_fields=True):
    sources: dict[str, str]
    links: dict[str, LinkKind]


class _InstanceFile(msgspec.Struct, forbid_unknown_fields=True):
    sources: dict[str, str]
    instances: dict[str, InstanceKind]


_File = TypeVar("_File", _DeviceFile, _LinkFile, _InstanceFile)


@cache
def data_directory() -> Path:
    """The folder of the TOML files, in a wheel and in a source tree alike."""
    spec = find_spec("graphpar.cost_models")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _read(name: str, form: type[_File]) -> _File:
    path = data_directory() / name
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), form)
    except (msgspec.ValidationError, tomllib.TOMLDecodeError) as error:
        raise ClusterError(f"The catalogue file {path} is damaged: {error}") from error


@cache
def _device_file() -> _DeviceFile:
    return _read("devices.toml", _DeviceFile)


def devices() -> Mapping[str, DeviceKind]:
    """All kinds of devices by name.

    >>> devices()["h100-sxm-80gb"].memory_bytes == 80 * 2**30
    True
    """
    return _device_file().devices


def families() -> Mapping[str, Family]:
    """Efficiency curves by architecture."""
    return _device_file().families


@cache
def links() -> Mapping[str, LinkKind]:
    """All kinds of links by name."""
    return _read("links.toml", _LinkFile).links


@cache
def instances() -> Mapping[str, InstanceKind]:
    """All cloud instance types by name."""
    return _read("instances.toml", _InstanceFile).instances


def normalize(name: str) -> str:
    """A name as the catalogue compares it: lower case, runs of other characters become one dash.

    >>> normalize("NVIDIA A100-SXM4-80GB"), normalize("RTX 4090")
    ('nvidia-a100-sxm4-80gb', 'rtx-4090')
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _find(name: str, table: Mapping[str, Any], what: str, where: str) -> str:
    """The table's own name for a name or alias.

    Raises:
        ClusterError: No entry has the name; the nearest three are given.
    """
    index = {normalize(alias): key for key, entry in table.items() for alias in entry.aliases}
    index |= {normalize(key): key for key in table}
    wanted = normalize(name)
    if wanted in index:
        return index[wanted]
    near = nearest(wanted, index)
    unique = list(dict.fromkeys(index[n] for n in near))[:3]
    place = f" at {where}" if where else ""
    raise ClusterError(
        f"Unknown {what} {name!r}{place}. The nearest known: {', '.join(unique)}. "
        f"All names are in cost_models/{what.split()[0]}s.toml"
        + (", or describe your own inline." if what != "instance type" else ".")
    )


def nearest(wanted: str, known: Iterable[str], count: int = 9) -> list[str]:
    """The known names that look most like the wanted one, best first."""
    return difflib.get_close_matches(wanted, sorted(known), n=count, cutoff=0.0)


def find_device(name: str, where: str = "") -> str:
    """The catalogue's name for a device name or alias; `where` is told in the error.

    >>> find_device("NVIDIA H100 80GB HBM3")
    'h100-sxm-80gb'
    """
    return _find(name, devices(), "device kind", where)


def find_link(name: str, where: str = "") -> str:
    """The catalogue's name for a link name or alias."""
    return _find(name, links(), "link kind", where)


def find_instance(name: str) -> str:
    """The catalogue's name for an instance type or alias."""
    return _find(name, instances(), "instance type", "")
