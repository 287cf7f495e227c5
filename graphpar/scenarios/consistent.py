"""More devices never make the best plan slower: answers of one study are made to agree with that.

A plan for some devices of a cluster is a plan for the whole cluster that leaves the others out. A
search cut short may miss it; another scenario of the study may have found it.
"""

from collections.abc import Sequence
from dataclasses import replace

from graphpar.scenarios.types import Answer, Setting


def consistent(settings: Sequence[Setting], answers: Sequence[Answer]) -> list[Answer]:
    """The answers, each no slower than that of any setting with a part of its devices."""
    parts = [_parts(setting) for setting in settings]
    order = sorted(range(len(settings)), key=lambda i: len(parts[i][1]))
    result = list(answers)
    for place, large in enumerate(order):
        for small in order[:place]:
            if parts[small][0] == parts[large][0] and parts[small][1] < parts[large][1]:
                result[large] = _better(result[large], result[small], settings[large])
    return result


def _parts(setting: Setting) -> tuple[str, frozenset[str]]:
    """What two settings must share, and the devices in which one may be a part of the other."""
    if setting.layout is not None:
        return f"a configuration of its own {id(setting)}", frozenset()
    rest = {k: v for k, v in setting.to_dict().items() if k not in ("cluster", "devices", "usd_per_h")}
    cluster = setting.cluster
    links = {node.name: (str(node.link), str(node.network)) for node in cluster.nodes}
    pairs = sorted((sorted(names), str(link)) for names, link in cluster.pairs)
    devices = frozenset(
        f"{d.name} {sorted(d.to_dict().items())} {links[d.node]}" for d in cluster.devices
    )
    return f"{sorted(rest.items(), key=lambda kv: kv[0])} {cluster.network} {pairs}", devices


def _better(large: Answer, small: Answer, setting: Setting) -> Answer:
    """The small setting's plan in the large one's place, where it is faster."""
    if small.status != "ok" or small.step_s is None or large.status == "invalid":
        return large
    if large.step_s is not None and large.status == "ok" and large.step_s <= small.step_s:
        return large
    used = set(small.used)
    bound = large.bound_s if large.bound_s is not None else 0.0
    return replace(
        small,
        title=large.title,
        changes=large.changes,
        bound_s=bound,
        gap=max(small.gap or 0.0, 1 - bound / small.step_s if small.step_s > 0 else 0.0),
        left_out=tuple(d.name for d in setting.cluster.devices if d.name not in used),
        remarks=tuple(dict.fromkeys((*large.remarks, *small.remarks))),
        seconds=large.seconds + small.seconds,
    )
