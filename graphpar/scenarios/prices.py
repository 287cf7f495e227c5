"""What clusters cost: the catalogue's dated on-demand prices, or the caller's own."""

from dataclasses import replace

from graphpar import catalogue
from graphpar.cluster import Cluster
from graphpar.device import Node
from graphpar.scenarios.types import Answer, Setting

_UNKNOWN = "no cost, for the price of"


def instance_price(key: str) -> float | None:
    """Dollars per hour of an instance type, where the catalogue knows them."""
    return catalogue.instances()[key].usd_per_h


def instance_of(node: Node) -> str | None:
    """The instance type that a node was made from by `Cluster.of`, told by its name and devices."""
    stem = node.name.rpartition("-")[0]
    kinds = {device.kind for device in node.devices}
    for key, instance in catalogue.instances().items():
        same = kinds == {instance.device} and len(node.devices) == instance.count
        if same and key.split(".")[0] == stem:
            return key
    return None


def known_prices(cluster: Cluster) -> tuple[tuple[str, float], ...]:
    """Dollars per hour of the nodes that are known instance types."""
    found = []
    for node in cluster.nodes:
        key = instance_of(node)
        price = instance_price(key) if key else None
        if price is not None:
            found.append((node.name, price))
    return tuple(found)


def with_price(answer: Answer, setting: Setting) -> Answer:
    """The answer with what all nodes that hold a used device cost in this setting, if that is known."""
    prices = dict(setting.usd_per_h)
    nodes = {setting.cluster.device(name).node for name in answer.used}
    unknown = sorted(nodes - prices.keys())
    remarks = tuple(remark for remark in answer.remarks if not remark.startswith(_UNKNOWN))
    if prices and unknown:
        told = f"{_UNKNOWN} {', '.join(unknown)} is not known: set NODE.usd_per_h"
        remarks = (*remarks, told)
    known = sum(prices[name] for name in nodes) if nodes and not unknown else None
    return replace(answer, usd_per_h=known, remarks=remarks)


def price_dates() -> str:
    """When the catalogue's prices were collected."""
    dates = sorted({str(i.price_date) for i in catalogue.instances().values() if i.price_date})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
