"""What changed from one plan to another."""

from collections.abc import Callable, Iterable, Iterator
from textwrap import wrap

import msgspec

from graphpar.partition.types import StageChoice
from graphpar.plans.records import PlanRecord
from graphpar.units import format_bytes, format_percent, format_seconds

_COLUMNS = 80
_WIDEST_FACT = 24


class Change(msgspec.Struct, frozen=True):
    """A fact that differs between two plans, as text for people."""

    what: str
    before: str
    after: str


class Move(msgspec.Struct, frozen=True):
    """Units `first` to `last - 1` that run on other devices than before."""

    first: int
    last: int
    names: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class PlanDiff(msgspec.Struct, frozen=True):
    """All differences between two plans; `str` is the page."""

    changes: tuple[Change, ...]
    moves: tuple[Move, ...]
    comparable: bool
    """Whether both chains have the same units, so that moves can be told."""

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def diff_plans(before: PlanRecord, after: PlanRecord) -> PlanDiff:
    """Compare two plans: what they are for, how fast, how sure, who runs what."""
    comparable = before.units == after.units
    return PlanDiff(
        changes=tuple(_changes(before, after)),
        moves=tuple(_moves(before, after)) if comparable else (),
        comparable=comparable,
    )


def _choices(plan: PlanRecord) -> Iterator[StageChoice]:
    for pipeline in plan.partition.pipelines:
        yield from pipeline.stages


def _stages_where(plan: PlanRecord, holds: Callable[[StageChoice], bool]) -> Iterator[str]:
    return (f"stage {i}" for i, choice in enumerate(_choices(plan)) if holds(choice))


def _told(values: Iterable[str]) -> str:
    """Different values in order, `none` for none."""
    return ", ".join(dict.fromkeys(values)) or "none"


_FACTS: tuple[tuple[str, Callable[[PlanRecord], str]], ...] = (
    ("model", lambda p: f"{p.model} ({p.model_hash[:12]})"),
    ("cluster", lambda p: p.cluster_hash[:12]),
    ("mode", lambda p: "training" if p.training else "inference"),
    ("precision", lambda p: p.precision),
    ("batch", lambda p: str(p.batch)),
    ("schedule", lambda p: p.partition.schedule),
    ("pipelines", lambda p: str(len(p.partition.pipelines))),
    (
        "microbatches",
        lambda p: " + ".join(str(x.microbatches) for x in p.partition.pipelines),
    ),
    ("stages", lambda p: str(len(p.stages))),
    ("computes in", lambda p: _told(f for choice in _choices(p) for f in choice.formats)),
    ("recomputes", lambda p: _told(_stages_where(p, lambda c: c.recompute))),
    ("ZeRO", lambda p: _told(f"level {c.zero}" for c in _choices(p) if c.zero)),
    ("tensor widths", lambda p: _told(r.width for c in _choices(p) for r in c.replicas)),
    ("price of memory", lambda p: _told(str(r.lean) for c in _choices(p) for r in c.replicas if r.lean)),
    ("status", lambda p: p.status),
    ("gap", lambda p: format_percent(p.gap)),
    ("left out", lambda p: ", ".join(sorted(p.left_out)) or "none"),
)
"""Facts compared as text."""


def _changes(before: PlanRecord, after: PlanRecord) -> Iterator[Change]:
    yield from _changed_seconds("predicted step", before.predicted_step_s, after.predicted_step_s)
    yield from _changed_seconds("objective", before.partition.objective_s, after.partition.objective_s)
    yield from _changed_seconds("bound", before.bound_s, after.bound_s)
    for what, fact in _FACTS:
        if fact(before) != fact(after):
            yield Change(what, fact(before), fact(after))
    for option in sorted(before.options.keys() | after.options.keys()):
        was, now = before.options.get(option), after.options.get(option)
        if was != now:
            yield Change(f"option {option}", str(was), str(now))
    peaks = before.predicted_peak_bytes, after.predicted_peak_bytes
    for device in sorted(peaks[0].keys() & peaks[1].keys()):
        was_bytes, now_bytes = (format_bytes(p[device]) for p in peaks)
        if was_bytes != now_bytes:
            yield Change(f"peak of {device}", was_bytes, now_bytes)


def _changed_seconds(what: str, before: float, after: float) -> Iterator[Change]:
    if before != after:
        change = f" ({100 * (after / before - 1):+.1f} %)" if before > 0 else ""
        yield Change(what, format_seconds(before), format_seconds(after) + change)


def _holders(plan: PlanRecord) -> list[tuple[str, ...]]:
    """For each unit the devices that run it."""
    holders: list[list[str]] = [[] for _ in plan.units]
    for stage in plan.stages:
        for unit in range(stage.first, stage.last):
            holders[unit] += stage.devices
    return [tuple(sorted(h)) for h in holders]


def _moves(before: PlanRecord, after: PlanRecord) -> Iterator[Move]:
    """Neighbouring units that moved alike are told together."""
    pairs = list(zip(_holders(before), _holders(after), strict=True))
    first = 0
    for unit in range(1, len(pairs) + 1):
        if unit < len(pairs) and pairs[unit] == pairs[first]:
            continue
        was, now = pairs[first]
        if was != now:
            names = before.units[first], before.units[unit - 1]
            joined = names[0] if names[0] == names[1] else f"{names[0]} .. {names[1]}"
            yield Move(first, unit, joined, was, now)
        first = unit


def _lines(diff: PlanDiff) -> Iterator[str]:
    if not diff.changes and not diff.moves and diff.comparable:
        yield "no differences"
        return
    width = min(max((len(c.what) for c in diff.changes), default=0), _WIDEST_FACT)
    for change in diff.changes:
        yield from _wrapped(f"{change.what:<{width}}", f"{change.before} -> {change.after}")
    if not diff.comparable:
        yield "units differ: the two models are cut into unlike chains, moves cannot be told"
    for move in diff.moves:
        count = move.last - move.first
        units = f"unit {move.first}" if count == 1 else f"units {move.first}-{move.last - 1}"
        yield from _wrapped(
            "moved", f"{units} ({move.names}): {_names(move.before)} -> {_names(move.after)}"
        )


def _wrapped(head: str, text: str) -> list[str]:
    """At most 80 columns where names allow it; further lines stand under the text of the first."""
    gap = " " if head == "moved" else "  "
    return wrap(
        f"{head}{gap}{text}",
        _COLUMNS,
        subsequent_indent=" " * len(f"{head}{gap}"),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def _names(devices: tuple[str, ...]) -> str:
    shown = ", ".join(devices[:3])
    return f"{shown} and {len(devices) - 3} more" if len(devices) > 3 else shown
