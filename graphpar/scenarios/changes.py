"""Changes to a setting, in words: how they are read, and what they do.

drop NAME                      a device (a/0), a node, or all devices of a kind
down NAME                      the same, for the question of a failure
add [N] KIND [to NODE]         devices of the catalogue, in a node or in one of their own
add [N] INSTANCE               cloud instances
replace NAME with KIND         a device, or all devices of a node or of a kind
replace NODE with INSTANCE     a cloud instance in a node's place
set PATH=VALUE                 see `PATHS`
tp=A pp=B dp=C [m=D]           a hand-made configuration
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from graphpar import catalogue
from graphpar.errors import ClusterError
from graphpar.ir.formats import FORMATS as PRECISIONS
from graphpar.partition.settings import ScheduleWish
from graphpar.scenarios.cluster_changes import PATHS, add, drop, replace_devices, set_in_cluster, whole
from graphpar.scenarios.types import OPTIMIZER_STATES, Layout, Setting

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
    _check_undone(setting, changes)
    return setting


def _check_undone(made: Setting, changes: Sequence[str]) -> None:
    """Refuse what a later change took back: made once more, it would change something."""
    for number, change in enumerate(changes[:-1]):
        path = (_topics(change.strip()) or [""])[0]
        if not change.strip().startswith("set ") or path.startswith("network.") or ".copies" in path:
            continue
        try:
            kept = _apply_one(made, change.strip()).to_dict() == made.to_dict()
        except ValueError:
            kept = False
        if not kept:
            raise ValueError(
                f"change {change!r} is undone by what follows it ({'; '.join(changes[number + 1 :])}); "
                "put it last, or leave it out"
            )


def idle(setting: Setting, changes: Sequence[str]) -> tuple[str, ...]:
    """What of the changes makes no difference to a job of this setting, in words."""
    nodes = {node.name: node for node in setting.cluster.nodes}
    told = []
    for path in (topic for change in changes for topic in _topics(change.strip()) if "=" in change):
        owner = path.rpartition(".")[0]
        name, _, part = owner.rpartition(".")
        if (owner == "network" or part == "network") and len(nodes) < 2:
            told.append(f"{path} makes no difference: there is one node")
        elif owner == "network" and setting.cluster.pairs:
            told.append(f"{path} is not that of pairs of nodes that have links of their own")
        elif part == "link" and name in nodes and len(nodes[name].devices) < 2:
            told.append(f"{path} makes no difference: node {name} has one device")
        elif path in ("recompute", "schedule") and not setting.training:
            told.append(f"{path} makes no difference to inference")
    return tuple(told)


def _apply_one(setting: Setting, change: str) -> Setting:
    verb, _, rest = change.partition(" ")
    rest = rest.strip()
    verbs: dict[str, Callable[[Setting, str], Setting]] = {
        "drop": drop,
        "down": drop,
        "add": add,
        "replace": replace_devices,
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
    given = re.findall(r"(tp|pp|dp|m)=(\d+)", text)
    values = dict(given)
    if len(values) < len(given):
        raise ValueError(f"configuration {text!r} says the same twice; leave one out")
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


def _set(setting: Setting, rest: str) -> Setting:
    path, sign, text = (part.strip() for part in rest.partition("="))
    if not sign or not text:
        raise ValueError(f"set {rest!r} is not understood; write: set PATH=VALUE")
    scalars: dict[str, Callable[[Setting, str], Setting]] = {
        "batch": lambda s, t: replace(s, batch=whole(path, t)),
        "seq_len": lambda s, t: replace(s, seq_len=whole(path, t)),
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
    return set_in_cluster(setting, owner, field, text)


def check_format(precision: str) -> None:
    """Make sure that a whole job can be planned in a format.

    Raises:
        ValueError: It cannot.
    """
    if precision == "auto":
        raise ValueError(
            "precision=auto chooses formats unit by unit, by errors that are measured; what-if plans in "
            f"one format: give one of {', '.join(PRECISIONS)}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; give one of {', '.join(PRECISIONS)}")


def _set_precision(setting: Setting, text: str) -> Setting:
    check_format(text)
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
    return replace(setting, microbatches="auto" if text == "auto" else whole("microbatches", text))


def _set_tensor(setting: Setting, text: str) -> Setting:
    if text == "auto":
        return replace(setting, tensor="auto")
    numbers = text.split("x")
    if len(numbers) > 2 or not all(numbers):
        raise ValueError(f"tensor={text} is not understood; give a number, two as in 2x4, or auto")
    widths = [whole("tensor", number) for number in numbers]
    return replace(setting, tensor=(widths[0], widths[1]) if len(widths) == 2 else widths[0])


def _set_recompute(setting: Setting, text: str) -> Setting:
    values = {"on": True, "true": True, "off": False, "false": False, "auto": None}
    if text not in values:
        raise ValueError(f"recompute {text!r} is not known; give on, off or auto")
    return replace(setting, recompute=values[text])
