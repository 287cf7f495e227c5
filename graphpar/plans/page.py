"""The page a plan prints as: head lines, table of stages, cut edges, timeline, what is left out.

Plain text, no colour, 80 columns unless names are longer than that leaves room for.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import wrap

from graphpar.partition.types import Replica
from graphpar.plans.precision import precision_lines, stage_format
from graphpar.plans.records import PlanEdge, PlanRecord, PlanReplica, PlanStage
from graphpar.schedule import Action
from graphpar.schedule.simulate import Timeline
from graphpar.units import format_bytes, format_percent, format_rate, format_seconds

PAGE_COLUMNS = 80
_LARGEST_GRID_RANKS = 16
_MOST_ROWS = 64
_MOST_EDGES = 24
_MOST_LEFT_OUT = 8
_MOST_GROUPS = 3
_MOST_MEMBERS = 4
_MOST_WHOLE = 6
_MOST_BINDING = 3


def format_plan(plan: PlanRecord) -> str:
    """The page of a plan."""
    parts = [
        _head(plan),
        _stage_table(plan),
        _unit_lines(plan),
        _precision_lines(plan),
        _edge_lines(plan),
        _timeline_lines(plan),
        _remarks(plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _head(plan: PlanRecord) -> list[str]:
    mode = "training" if plan.training else "inference"
    slowest = plan.bottleneck
    partition = plan.partition
    certificate = (
        f"{plan.status}, gap {format_percent(plan.gap)}: programme's objective "
        f"{format_seconds(partition.objective_s)}, its bound {format_seconds(plan.bound_s)}, "
        f"bound for any plan {format_seconds(partition.physical_bound_s)}"
    )
    if partition.truncated_by:
        certificate += f"; search cut short by {', '.join(partition.truncated_by)}"
    lines = [
        f"plan for {plan.model}, {mode}, {plan.precision}, on {_describe_cluster(plan)}",
        f"predicted step {format_seconds(plan.predicted_step_s)}, "
        f"{format_rate(plan.batch / plan.predicted_step_s, 'sample')}"
        if plan.predicted_step_s > 0
        else "predicted step 0 s",
        f"bottleneck {slowest.device}, busy {format_percent(slowest.busy_share)}; "
        f"bubbles {format_percent(plan.bubble_share)} of device time",
        certificate,
        f"batch of {plan.batch}, schedule {partition.schedule}: {_describe_batch(plan)}",
    ]
    return [piece for line in lines for piece in _wrapped(line)]


def _describe_cluster(plan: PlanRecord) -> str:
    kinds = Counter(r.kind for r in plan.replicas)
    total = kinds + Counter(plan.left_out.values())
    return " + ".join(
        f"{count} {kind}" if kinds[kind] == count else f"{kinds[kind] or 'none'} of {count} {kind}"
        for kind, count in total.items()
    )


def _describe_batch(plan: PlanRecord) -> str:
    shares = [
        f"{p.microbatches} microbatches of {_span(p.sizes())}"
        if p.microbatches > 1
        else f"1 microbatch of {p.samples}"
        for p in plan.partition.pipelines
    ]
    counted = Counter(shares)
    text = " + ".join(s if n == 1 else f"{n} pipelines with {s} each" for s, n in counted.items())
    return f"{text}; not split further: {plan.batch_reason}" if plan.batch_reason else text


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


_COLUMNS = ("stage", "device", "kind", "units", "mb", "forward", "backward", "comm", "peak memory")
_LEFT_COLUMNS = 3


def _stage_table(plan: PlanRecord) -> list[str]:
    rows = [row for stage in plan.stages for row in _stage_rows(stage)]
    table = [_COLUMNS, *rows[:_MOST_ROWS]]
    if not plan.training:
        backward = _COLUMNS.index("backward")
        table = [row[:backward] + row[backward + 1 :] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [_aligned(row, widths) for row in table] + _more(len(rows), _MOST_ROWS)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        f"{cell:<{width}}" if 0 < i < _LEFT_COLUMNS else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return " ".join(cells).rstrip()


def _stage_rows(stage: PlanStage) -> Iterator[tuple[str, ...]]:
    """One row for all replicas whose rows would differ in the name only."""
    alike: dict[tuple[str, ...], list[PlanReplica]] = {}
    for replica in stage.replicas:
        alike.setdefault(_numbers(replica), []).append(replica)
    for replicas in alike.values():
        yield _row(stage, replicas[0], len(replicas) - 1)


def _numbers(replica: PlanReplica) -> tuple[str, ...]:
    return (
        replica.kind,
        str(replica.microbatches),
        format_seconds(replica.forward_s),
        format_seconds(replica.backward_s),
        format_seconds(replica.comm_s),
        _memory(replica),
    )


def _memory(replica: PlanReplica) -> str:
    if replica.capacity_bytes <= 0:
        return format_bytes(replica.peak_bytes)
    share = replica.peak_bytes / replica.capacity_bytes
    return f"{format_bytes(replica.peak_bytes)} {100 * share:.0f}%"


def _row(stage: PlanStage, replica: PlanReplica, others: int) -> tuple[str, ...]:
    units = f"{stage.first}-{stage.last - 1}" if stage.last - stage.first > 1 else str(stage.first)
    device = _shortened(replica.device, 20) + (f" +{others}" if others else "")
    kind, *numbers = _numbers(replica)
    return (str(stage.index), device, _shortened(kind, 18), units, *numbers)


def _shortened(name: str, limit: int) -> str:
    """A long name keeps its end, which is where device names differ."""
    return name if len(name) <= limit else ".." + name[2 - limit :]


def _unit_lines(plan: PlanRecord) -> list[str]:
    lines = ["units and weights"]
    choices = [choice for pipeline in plan.partition.pipelines for choice in pipeline.stages]
    plain = {name for choice in choices for name in choice.formats} == {"float32"}
    for stage, choice in list(zip(plan.stages, choices, strict=True))[:_MOST_ROWS]:
        first, last = plan.units[stage.first], plan.units[stage.last - 1]
        names = first if first == last else f"{first} .. {last}"
        told = [
            f"{stage.index:>5} {names} ({stage.last - stage.first} of {len(plan.units)})",
            format_bytes(stage.weight_bytes),
            *([] if plain else [stage_format(choice)]),
            *(["recomputes activations"] if choice.recompute else []),
            *([f"ZeRO {choice.zero}"] if choice.zero else []),
            *_group_texts(choice.replicas),
        ]
        lines += _wrapped(", ".join(told))
    return lines + _more(len(plan.stages), _MOST_ROWS)


def _precision_lines(plan: PlanRecord) -> list[str]:
    if plan.error_budget is None:
        return []
    return [piece for line in precision_lines(plan.error_budget, plan.units) for piece in _wrapped(line)]


def _group_texts(replicas: Sequence[Replica]) -> Iterator[str]:
    """Tensor groups: who shares the work on a microbatch, and how; alike ones are counted."""
    groups = [r for r in replicas if r.others]
    for replica in groups[:_MOST_GROUPS]:
        members = " & ".join(_shortened(d, 20) for d in replica.devices[:_MOST_MEMBERS])
        more = len(replica.devices) - _MOST_MEMBERS
        shares = " : ".join(f"{100 * s:.0f}" for s in replica.member_shares[:_MOST_MEMBERS])
        mesh = " of " + " x ".join(map(str, replica.mesh)) if replica.mesh else ""
        yield f"tensor group{mesh} {members}{f' & {more} more' if more > 0 else ''} ({shares} %)"
        if replica.lean:
            yield f"shared so that members hold less and take longer (price of memory {replica.lean})"
    if len(groups) > _MOST_GROUPS:
        yield f"and {len(groups) - _MOST_GROUPS} more tensor groups"


def whole_notes(plan: PlanRecord) -> list[str]:
    """What members of tensor groups compute whole, each kind of op once."""
    found: dict[str, float] = {}
    for sharding in plan.partition.shardings:
        for whole in sharding.whole:
            found[str(whole)] = max(found.get(str(whole), 0.0), whole.seconds)
    listed = sorted(found.items(), key=lambda item: -item[1])
    notes = [
        f"every member of the tensor group computes {text}; {format_seconds(seconds)} a microbatch"
        for text, seconds in listed[:_MOST_WHOLE]
    ]
    more = len(listed) - _MOST_WHOLE
    return [*notes, f"members compute {more} more kinds of ops whole"] if more > 0 else notes


def _edge_lines(plan: PlanRecord) -> list[str]:
    if not plan.edges:
        return []
    lines = ["cut edges, bytes per sample"]
    lines += [piece for e in plan.edges[:_MOST_EDGES] for piece in _wrapped(_edge_line(e))]
    return lines + _more(len(plan.edges), _MOST_EDGES)


def _edge_line(edge: PlanEdge) -> str:
    ahead = _amount(edge.forward_bytes_per_sample, edge.forward_fixed_bytes)
    back = _amount(edge.backward_bytes_per_sample, edge.backward_fixed_bytes)
    rate = f"{format_rate(edge.bytes_per_s, 'B')}, {format_seconds(edge.latency_s)}"
    return (
        f"{edge.source:>5} > {edge.target}  {ahead} forward"
        f"{f', {back} back' if edge.link.has_gradient else ''}, "
        f"{edge.source_device} - {edge.target_device} at {rate}"
    )


def _amount(per_sample: float, fixed: float) -> str:
    if fixed > 0:
        return f"{format_bytes(per_sample)} + {format_bytes(fixed)} fixed"
    return format_bytes(per_sample)


def _timeline_lines(plan: PlanRecord) -> list[str]:
    if len(plan.devices) > _LARGEST_GRID_RANKS:
        return []
    labels = [_shortened(d, 14) for d in plan.devices]
    width = max(map(len, labels))
    columns = PAGE_COLUMNS - width - 3
    bars = timeline_bars(plan.timeline(), columns)
    legend = "digit: forward of a microbatch (its last digit)"
    if plan.training:
        legend += ", letter: its backward (a is 0), +: gradient sum, #: optimiser"
        if plan.partition.schedule == "zero-bubble":
            legend += ", w: gradients of weights"
    return [
        *_wrapped(f"timeline, {format_seconds(plan.predicted_step_s / columns)} per column"),
        *(f"{label:<{width}} |{bar}|" for label, bar in zip(labels, bars, strict=True)),
        *_wrapped(f"{legend}, dot: waits"),
    ]


def timeline_bars(timeline: Timeline, columns: int) -> list[str]:
    """For each rank a bar of `columns` characters: what it does in the middle of each slice."""
    return [_bar(timeline, rank, columns) for rank in range(len(timeline.compute_s))]


def _bar(timeline: Timeline, rank: int, columns: int) -> str:
    bar = ["."] * columns
    if timeline.step_s <= 0:
        return "".join(bar)
    per_s = columns / timeline.step_s
    for event in timeline.events(rank):
        if event.action.kind in "FBIWAO":
            begin, end = (max(0, round(t * per_s)) for t in (event.start_s, event.end_s))
            bar[begin:end] = _symbol(event.action) * (min(end, columns) - begin)
    return "".join(bar)


def _symbol(action: Action) -> str:
    if action.microbatch is None:
        return "+" if action.kind == "A" else "#"
    digit = action.microbatch % 10
    if action.kind == "W":
        return "w"
    return str(digit) if action.kind == "F" else "abcdefghij"[digit]


def _remarks(plan: PlanRecord) -> list[str]:
    lines = []
    if plan.left_out:
        names = [f"{device} ({kind})" for device, kind in sorted(plan.left_out.items())]
        more = len(names) - _MOST_LEFT_OUT
        text = ", ".join(names[:_MOST_LEFT_OUT]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"without work: {text}")
    if plan.explanation is not None:
        lines += [f"held back by: {text}" for text in plan.explanation.binding[:_MOST_BINDING]]
    lines += [f"note: {note}" for note in (*plan.partition.notes, *plan.notes, *whole_notes(plan))]
    lines += [f"assumed: {assumption}" for assumption in plan.assumptions]
    lines.append(f"certified among: {plan.partition.family}")
    return [piece for line in lines for piece in _wrapped(line)]


def _more(count: int, shown: int) -> list[str]:
    return [f"      and {count - shown} more"] if count > shown else []


def _wrapped(line: str) -> list[str]:
    indent = len(line) - len(line.lstrip())
    return wrap(
        line.strip(),
        PAGE_COLUMNS,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
