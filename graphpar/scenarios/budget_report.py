"""What a budget buys, in words and as plain data."""

from typing import Any

from graphpar.scenarios.budget import BudgetAnswer
from graphpar.scenarios.report import as_plain, some
from graphpar.scenarios.types import Answer
from graphpar.units import format_percent, format_seconds


def budget_lines(budget: BudgetAnswer) -> list[str]:
    """What a budget buys, and what is known of everything else that it would."""
    for_cost = budget.objective == "cost"
    counted = (
        f"  {budget.considered} clusters {'are within the budget' if for_cost else 'use the budget up'}; "
        f"{budget.solved} were planned, {budget.ruled_out} ruled out by their bounds"
    )
    if budget.unable:
        counted += f", {budget.unable} cannot be planned as asked ({budget.problem})"
    if budget.unplanned:
        counted += f"; the time was up before the other {budget.unplanned}, which may be better"
    best = budget.best
    if best is None or best.step_s is None:
        found = (
            "no plan was found in the time" if budget.unplanned else "nothing within it can run the model"
        )
        return [f"budget: {found}", counted]
    money, gap = best.usd_per_million_samples, f"(gap {format_percent(budget.gap or 0.0)})"
    bound = f"is shorter than {format_seconds(budget.bound_s)}"
    if for_cost:
        bound = f"costs less than {budget.bound_usd or 0.0:.4g} $/Msample"
    lines = [
        f"{'cheapest per sample' if for_cost else 'best'} within the budget: {best.title}, "
        f"{budget.usd_per_h:g} $/h, {format_seconds(best.step_s)} ±{100 * best.error_bar:.0f}% per step, "
        f"{best.samples_per_s:.4g} samples/s" + (f", {money:.4g} $/Msample" if money else ""),
        counted,
        f"  no plan on any of them {bound} {gap}",
    ]
    if best.left_out:
        lines.append(f"  its plan leaves out {some(best.left_out)}")
    if budget.too_dear:
        lines.append(f"  one instance costs more than the budget: {', '.join(budget.too_dear)}")
    return lines


def budget_plain(budget: BudgetAnswer | None, baseline: Answer) -> dict[str, Any] | None:
    """The same as plain data, numbers in SI units."""
    if budget is None:
        return None
    return {
        "best": as_plain(budget.best, baseline) if budget.best else None,
        "counts": dict(budget.counts),
        "usd_per_h": budget.usd_per_h,
        "considered": budget.considered,
        "solved": budget.solved,
        "ruled_out": budget.ruled_out,
        "unable": budget.unable,
        "problem": budget.problem,
        "unplanned": budget.unplanned,
        "truncated_by": ["time limit"] if budget.unplanned else [],
        "proven": budget.proven,
        "objective": budget.objective,
        "bound_s": budget.bound_s,
        "bound_usd_per_million_samples": budget.bound_usd,
        "gap": budget.gap,
        "too_dear": list(budget.too_dear),
    }
