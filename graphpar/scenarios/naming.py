"""Devices by their number in a node: questions that differ in names alone are one question.

A device that went leaves a gap in the names of its node (`a/0`, `a/2`); what is left is the same
whichever of several equal devices went. Settings are planned with devices numbered anew, and answers
are told in the names of whoever asked.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from graphpar.cluster import Cluster
from graphpar.scenarios.types import Answer, Setting


def essential(setting: Setting) -> Setting:
    """The setting without what makes no difference to its plan, which is no other question.

    That is what it costs; the network of a single node; and in inference, orders of backwards and what is
    kept for them.
    """
    nodes = setting.cluster.nodes
    network = nodes[0].link if len(nodes) == 1 else setting.cluster.network
    setting = replace(setting, cluster=replace(setting.cluster, network=network), usd_per_h=())
    return setting if setting.training else replace(setting, schedule="auto", recompute=None)


def numbered(setting: Setting) -> Setting:
    """What is essential of the setting, with the devices of each node counted from 0.

    >>> cluster = Cluster.from_dict({"devices": [{"kind": "t4", "count": 2}]})
    >>> (node,) = cluster.nodes
    >>> cluster = replace(cluster, nodes=(replace(node, devices=node.devices[1:]),))
    >>> [device.name for device in numbered(Setting(cluster, 1)).cluster.devices]
    ['local/0']
    """
    nodes = tuple(
        replace(
            node, devices=tuple(replace(d, name=f"{node.name}/{i}") for i, d in enumerate(node.devices))
        )
        for node in setting.cluster.nodes
    )
    return essential(replace(setting, cluster=replace(setting.cluster, nodes=nodes)))


def with_names(answer: Answer, numbers: Cluster, named: Cluster) -> Answer:
    """An answer in the names of a cluster instead of those of the same one with numbers."""
    names = {
        mine.name: other.name
        for mine, other in zip(numbers.devices, named.devices, strict=True)
        if mine.name != other.name
    }
    if not names:
        return answer
    neck = answer.bottleneck
    if neck is not None:
        relief, where = _in_words(neck.relief, names), names.get(neck.where, neck.where)
        neck = replace(neck, where=where, relief=relief)
    return replace(
        answer,
        problem=_in_words(answer.problem, names),
        bottleneck=neck,
        headroom_bytes={names.get(k, k): v for k, v in answer.headroom_bytes.items()},
        used=tuple(names.get(name, name) for name in answer.used),
        left_out=tuple(names.get(name, name) for name in answer.left_out),
        remarks=tuple(_in_words(remark, names) for remark in answer.remarks),
        one_device=names.get(answer.one_device, answer.one_device),
    )


def _in_words(text: str, names: Mapping[str, str]) -> str:
    """Text with names exchanged, all at once.

    >>> _in_words("a/1 and a/10 wait for a/2", {"a/1": "a/2", "a/2": "a/3"})
    'a/2 and a/10 wait for a/3'
    """
    known = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w/])(?:{known})(?![\w/])", lambda found: names[found[0]], text)
