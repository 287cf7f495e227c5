"""A study's answers as a table for people, as CSV, as JSON."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graphpar.choice.played import no_gain
from graphpar.scenarios.types import Answer, Worth
from graphpar.units import format_bytes, format_percent, format_seconds

COLUMNS = (
    "scenario", "step", "change", "samples/s", "$/Msample", "kWh/Msample", "free memory", "bottleneck",
    "gap", "plan",
)  # fmt: skip

CSV_COLUMNS = (
    "scenario", "status", "problem", "step_s", "error_bar", "bound_s", "gap", "change", "samples_per_s",
    "usd_per_h", "usd_per_million_samples", "watts", "kwh_per_million_samples", "least_headroom_bytes",
    "bottleneck", "bottleneck_where", "bottleneck_share", "relief", "used", "left_out", "plan", "remarks",
)  # fmt: skip


CUT_SHORT = "search cut short"
"""How the remark begins that a search ended before its proof."""

IN_DATA_ONLY = (
    CUT_SHORT,
    "schedules",
    "the search itself ended",
    "like pipelines",
    "left out",
    "no gain",
)
"""Remarks on single scenarios that the page leaves to JSON and CSV."""


def table_lines(baseline: Answer, answers: Sequence[Answer]) -> list[str]:
    """The table, one line per scenario."""
    rows = [COLUMNS, *(_row(a, baseline) for a in (baseline, *answers))]
    # Columns that nobody fills are left out.
    kept = [i for i in range(len(COLUMNS)) if any(row[i] != "-" for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    return [
        "  ".join(row[i].ljust(w) for i, w in zip(kept, widths, strict=True)).rstrip() for row in rows
    ]


def _row(answer: Answer, baseline: Answer) -> tuple[str, ...]:
    if answer.status == "invalid" or answer.step_s is None:
        return (answer.title, answer.status, *("-" for _ in COLUMNS[2:-1]), answer.problem)
    change = answer.change(baseline)
    money, energy = answer.usd_per_million_samples, answer.kwh_per_million_samples
    least = min(answer.headroom_bytes.values(), default=0.0)
    neck = answer.bottleneck
    fits = answer.status == "ok"
    return (
        answer.title,
        f"{format_seconds(answer.step_s)} ±{100 * answer.error_bar:.0f}%",
        "-" if change is None or answer is baseline else f"{100 * change:+.1f}%",
        f"{answer.samples_per_s:.4g}",
        "-" if money is None else f"{money:.4g}",
        "-" if energy is None else f"{energy:.4g}",
        format_bytes(least) if fits else f"lacks {format_bytes(-least)}",
        "-" if neck is None else f"{neck.kind} {neck.where} {format_percent(neck.share)}",
        "-" if answer.gap is None else format_percent(answer.gap),
        answer.shape,
    )


def remark_lines(baseline: Answer, answers: Sequence[Answer]) -> list[str]:
    """Findings and assumptions below the table."""
    lines = []
    if baseline.needless and baseline.one_device_s is not None:
        lines.append(no_gain(baseline.one_device, baseline.one_device_s))
    if baseline.bottleneck is not None:
        lines.append(f"what would relieve the baseline: {baseline.bottleneck.relief}")
    if baseline.left_out:
        lines.append(f"the baseline's plan leaves out {some(baseline.left_out)}")
    lines += _verdict((baseline, *answers))
    lines += [
        remark
        for remark in baseline.remarks
        if not remark.startswith(("schedules", "left out", "no gain"))
    ]
    seen: dict[str, list[str]] = {}
    cut = [a.title for a in answers if any(r.startswith(CUT_SHORT) for r in a.remarks)]
    for answer in answers:
        for remark in answer.remarks:
            if remark not in baseline.remarks and not remark.startswith(IN_DATA_ONLY):
                seen.setdefault(remark, []).append(answer.title)
    for answer in answers:
        if answer.status == "ok" and answer.needless and len(answer.used) > 1:
            seen.setdefault("no gain over one device", []).append(answer.title)
        if answer.status == "ok" and answer.left_out and answer.left_out != baseline.left_out:
            told = f"the plan leaves out {some(answer.left_out)}"
            seen.setdefault(told, []).append(answer.title)
    lines += [f"{remark} ({some(titles)})" for remark, titles in seen.items()]
    if cut:
        lines.append(f"{CUT_SHORT} by time, which the gaps allow for ({some(cut)})")
    return lines


def _verdict(answers: Sequence[Answer]) -> list[str]:
    """Which is fastest and which is cheapest, where prices are known of several."""
    priced = [a for a in answers if a.status == "ok" and a.usd_per_million_samples is not None]
    if len(priced) < 2:
        return []
    fastest = max(priced, key=lambda a: a.samples_per_s or 0.0)
    cheapest = min(priced, key=lambda a: a.usd_per_million_samples or 0.0)
    if fastest is cheapest:
        return [f"fastest, and cheapest per sample: {fastest.title}"]
    return [f"fastest: {fastest.title}; cheapest per sample: {cheapest.title}"]


def some(titles: Sequence[str]) -> str:
    """The first three names, and how many more."""
    return ", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")


def worth_lines(worths: Sequence[Worth]) -> list[str]:
    """Shadow prices, the most valuable first."""
    lines = [
        "shadow prices (by solving again; a difference within the plans' gaps is found, not proven):"
    ]
    for worth in sorted(worths, key=lambda w: -w.saved_s):
        lines.append(f"  {worth.what}: {_worth_text(worth)}")
    return lines


def _worth_text(worth: Worth) -> str:
    if not worth.saved_s:
        return "no better plan found"
    told = f"{format_seconds(abs(worth.saved_s))} {'less' if worth.saved_s > 0 else 'more'} per step"
    open_s = format_seconds(max(worth.noise_s, 0.0))
    if worth.order:
        told += f" with {worth.order}, which may be nearly as short without it (schedule={worth.order})"
    return told if abs(worth.saved_s) > worth.noise_s else f"{told} found; the gaps leave {open_s} open"


def to_csv(baseline: Answer, answers: Sequence[Answer]) -> str:
    """One line per scenario, the baseline first; numbers in SI units."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for a in (baseline, *answers):
        neck = a.bottleneck
        writer.writerow(
            [
                a.title, a.status, a.problem, a.step_s, a.error_bar, a.bound_s, a.gap,
                None if a is baseline else a.change(baseline), a.samples_per_s, a.usd_per_h,
                a.usd_per_million_samples, a.watts, a.kwh_per_million_samples,
                min(a.headroom_bytes.values(), default=None),
                neck.kind if neck else None, neck.where if neck else None, neck.share if neck else None,
                neck.relief if neck else None, " ".join(a.used), " ".join(a.left_out), a.shape,
                "; ".join(a.remarks),
            ]
        )  # fmt: skip
    return out.getvalue()


def as_plain(answer: Answer, baseline: Answer) -> dict[str, Any]:
    """An answer as plain data with its derived numbers."""
    data = dataclasses.asdict(replace(answer, plan=None))
    del data["plan"]
    data["samples_per_s"] = answer.samples_per_s
    data["usd_per_million_samples"] = answer.usd_per_million_samples
    data["kwh_per_million_samples"] = answer.kwh_per_million_samples
    data["gap_any"] = (
        1 - answer.any_bound_s / answer.step_s
        if answer.any_bound_s is not None and answer.step_s
        else None
    )
    data["least_headroom_bytes"] = min(answer.headroom_bytes.values(), default=None)
    data["change"] = answer.change(baseline)
    data["needless"] = answer.needless
    return data
