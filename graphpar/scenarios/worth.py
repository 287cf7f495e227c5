"""What a little more of each resource is worth, and who could be left out: found by solving again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphpar.cluster import Cluster
from graphpar.device import Link
from graphpar.scenarios.pricing import only
from graphpar.scenarios.study import Solver
from graphpar.scenarios.types import Answer, Setting, Worth, renamed
from graphpar.schedule.simulated import has_formula

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
    asked = [*_device_questions(setting), *_link_questions(solver.book.with_links_as_priced(setting))]
    found = solver.answers([question for _, question in asked])
    noise_s = (answer.gap or 0.0) * answer.step_s
    return tuple(
        Worth(
            what,
            answer.step_s - other.step_s,
            noise_s + (other.gap or 0.0) * other.step_s,
            _other_order(answer, other),
        )
        for (what, _), other in zip(asked, found, strict=True)
        if other.step_s is not None
    )


def _other_order(answer: Answer, other: Answer) -> str:
    """The order of work of the other plan, where it had to be so much shorter than that of the first."""
    if answer.plan is None or other.plan is None or not has_formula(answer.plan.schedule):
        return ""
    return "" if has_formula(other.plan.schedule) else other.plan.schedule


def leave_one_out(solver: Solver, setting: Setting, answer: Answer) -> list[tuple[str, Answer]]:
    """The plans without each device, by device name.

    Of equal ones, which stand in for each other, that is asked once: of one that the plan leaves idle,
    if it does.
    """
    if len(setting.cluster.devices) < 2:
        return []
    used = set(answer.used)
    names = [next((n for n in e if n not in used), e[-1]) for e in _equals(setting.cluster)]
    numbers = map(len, _equals(setting.cluster))
    everyone = {device.name for device in setting.cluster.devices}
    settings = [replace(setting, cluster=only(setting.cluster, everyone - {name})) for name in names]
    return [
        (name, renamed(found, f"{name}, one of {n} equal devices" if n > 1 else name, ()))
        for name, n, found in zip(names, numbers, solver.answers(settings), strict=True)
    ]


def _equals(cluster: Cluster) -> list[list[str]]:
    """Devices that stand in for each other: equal ones of a node, or of equal nodes."""
    linked = {name for pair, _ in cluster.pairs for name in pair}
    found: dict[tuple[str, str], list[str]] = {}
    for node in cluster.nodes:
        kind = node.name if node.name in linked else repr({**node.to_dict(), "name": ""})
        for device in node.devices:
            found.setdefault((kind, repr(device.to_dict())), []).append(device.name)
    return list(found.values())


def _device_questions(setting: Setting) -> list[tuple[str, Setting]]:
    questions = []
    for name in (equal[-1] for equal in _equals(setting.cluster)):
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
            link = _faster(node.link)
            nodes = tuple(replace(n, link=link) if n.name == node.name else n for n in cluster.nodes)
            changed = replace(cluster, nodes=nodes)
            questions.append(
                (f"10 % more bandwidth inside node {node.name}", replace(setting, cluster=changed))
            )
    if len(cluster.nodes) > 1:
        network = _faster(cluster.network)
        nodes = tuple(replace(n, network=n.network and _faster(n.network)) for n in cluster.nodes)
        pairs = tuple((names, _faster(link)) for names, link in cluster.pairs)
        changed = Cluster(nodes, network, pairs)
        questions.append(("10 % more network bandwidth", replace(setting, cluster=changed)))
    return questions


def _faster(link: Link) -> Link:
    return replace(link, bytes_per_s=link.bytes_per_s * LINK_STEP, kind="")


def useless(baseline: Answer, without: Sequence[tuple[str, Answer]]) -> list[tuple[str, float]]:
    """Devices, in words, without which the job is at least as fast, with the gain in throughput."""
    found = []
    for _, answer in without:
        change = answer.change(baseline)
        if change is not None and change >= -1e-6:
            found.append((answer.title, change))
    return found
