"""What a little more of each resource is worth, and who could be left out: found by solving again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphpar.cluster import Cluster
from graphpar.scenarios.study import Solver
from graphpar.scenarios.types import Answer, Setting, Worth

MEMORY_STEP_BYTES = 2**30
SPEED_STEP = 1.1
LINK_STEP = 1.1


def shadow_prices(solver: Solver, setting: Setting, answer: Answer) -> tuple[Worth, ...]:
    """Step time saved by 1 GiB more on a device, 10 % more speed of it, 10 % more of each link.

    Equal devices of a node are asked for once. A difference within both plans' gaps proves nothing;
    `noise_s` says how large that is.
    """
    if answer.step_s is None:
        return ()
    asked = [*_device_questions(setting), *_link_questions(setting)]
    found = solver.answers([question for _, question in asked])
    noise_s = (answer.gap or 0.0) * answer.step_s
    return tuple(
        Worth(what, answer.step_s - other.step_s, noise_s + (other.gap or 0.0) * other.step_s)
        for (what, _), other in zip(asked, found, strict=True)
        if other.step_s is not None
    )


def leave_one_out(solver: Solver, setting: Setting) -> list[tuple[str, Answer]]:
    """The plans without each device (equal devices of a node once), by device name."""
    if len(setting.cluster.devices) < 2:
        return []
    names = _representatives(setting.cluster)
    data = setting.cluster.to_dict()
    settings = [replace(setting, cluster=_without(data, setting.cluster, name)) for name in names]
    return list(zip(names, solver.answers(settings), strict=True))


def _representatives(cluster: Cluster) -> list[str]:
    """The last device of every set of equal ones in a node."""
    last = {(d.node, repr(d.to_dict())): d.name for d in cluster.devices}
    return list(last.values())


def _without(data: dict[str, object], cluster: Cluster, name: str) -> Cluster:
    nodes = []
    for node in cluster.nodes:
        kept = tuple(d for d in node.devices if d.name != name)
        if kept:
            nodes.append(replace(node, devices=kept))
    names = {n.name for n in nodes}
    pairs = tuple((pair, link) for pair, link in cluster.pairs if set(pair) <= names)
    return Cluster(tuple(nodes), cluster.network, pairs)


def _device_questions(setting: Setting) -> list[tuple[str, Setting]]:
    questions = []
    for name in _representatives(setting.cluster):
        device = setting.cluster.device(name)
        more = {"memory_bytes": device.memory_bytes + MEMORY_STEP_BYTES}
        questions.append((f"1 GiB more on {name}", _with_device(setting, name, more)))
        faster = {"slowdown": device.slowdown / SPEED_STEP}
        questions.append((f"10 % more speed of {name}", _with_device(setting, name, faster)))
    return questions


def _with_device(setting: Setting, name: str, fields: Mapping[str, float]) -> Setting:
    nodes = tuple(
        replace(
            node,
            devices=tuple(
                replace(d, **fields) if d.name == name else d  # type: ignore[arg-type]
                for d in node.devices
            ),
        )
        for node in setting.cluster.nodes
    )
    return replace(setting, cluster=replace(setting.cluster, nodes=nodes))


def _link_questions(setting: Setting) -> list[tuple[str, Setting]]:
    cluster = setting.cluster
    questions = []
    for node in cluster.nodes:
        if len(node.devices) > 1:
            link = replace(node.link, bytes_per_s=node.link.bytes_per_s * LINK_STEP, kind="")
            nodes = tuple(replace(n, link=link) if n.name == node.name else n for n in cluster.nodes)
            changed = replace(cluster, nodes=nodes)
            questions.append(
                (f"10 % more bandwidth inside node {node.name}", replace(setting, cluster=changed))
            )
    if len(cluster.nodes) > 1:
        network = replace(cluster.network, bytes_per_s=cluster.network.bytes_per_s * LINK_STEP, kind="")
        nodes = tuple(
            n
            if n.network is None
            else replace(
                n,
                network=replace(n.network, bytes_per_s=n.network.bytes_per_s * LINK_STEP, kind=""),
            )
            for n in cluster.nodes
        )
        changed = replace(cluster, nodes=nodes, network=network)
        questions.append(("10 % more network bandwidth", replace(setting, cluster=changed)))
    return questions


def useless(baseline: Answer, without: Sequence[tuple[str, Answer]]) -> list[tuple[str, float]]:
    """Devices without which the job is at least as fast, with the gain in throughput."""
    found = []
    for name, answer in without:
        change = answer.change(baseline)
        if change is not None and change >= -1e-6:
            found.append((name, change))
    return found
