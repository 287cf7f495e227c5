"""Why a plan is as it is, as a page of text: 80 columns, no colour.

The page of the whole plan, or of one block: the choices that concern it, each with the other ways it
could have gone, what they would cost, and how that was found.
"""

from collections.abc import Iterator, Sequence
from textwrap import wrap

from graphpar.errors import PlanError
from graphpar.explanation.account import Alternative, Choice, Explanation, ShadowPrice
from graphpar.plans.page import whole_notes
from graphpar.plans.precision import precision_lines
from graphpar.plans.records import PlanRecord, PlanStage
from graphpar.units import format_bytes, format_percent, format_rate, format_seconds

COLUMNS = 80
_MOST_CHOICES = 24
_MOST_ALTERNATIVES = 8
_MOST_RUNNERS_UP = 8
_MOST_PRICES = 16
_MOST_MATCHES = 12


def format_explanation(plan: PlanRecord, block: str | None = None) -> str:
    """The page for a plan, or for the units whose name is, or contains, `block`; `3` is unit 3.

    Raises:
        PlanError: The plan was not explained, or has no such block.
    """
    if plan.explanation is None:
        raise PlanError(
            f"the plan for {plan.model} does not say why it is as it is; "
            "make it anew with `graphpar plan`, which explains what it finds"
        )
    lines = _whole(plan, plan.explanation) if block is None else _block(plan, plan.explanation, block)
    return "\n".join(lines)


def _whole(plan: PlanRecord, why: Explanation) -> Iterator[str]:
    yield from _wrapped(f"why the plan for {plan.model} is as it is")
    yield from _wrapped(
        f"programme's step {format_seconds(why.step_s)}, proven to be within {format_percent(why.gap)} "
        f"of the best (bound {format_seconds(why.bound_s)})"
    )
    yield from _parts(why)
    yield from _listed("what keeps it from being faster", why.binding)
    yield from _listed("computed whole inside tensor groups", whole_notes(plan))
    yield from _choices("each choice against the next best, closest first", why.choices)
    yield from _runners_up(why)
    yield from _prices(why)
    if plan.error_budget is not None:
        yield from _listed("number formats", precision_lines(plan.error_budget, plan.units))
    yield from _listed("not looked at", why.left_out)


def _parts(why: Explanation) -> Iterator[str]:
    told = [
        f"{name.removesuffix('_s').replace('_', ' ')} {format_seconds(value)}"
        for name, value in why.parts.items()
        if value
    ]
    if told:
        yield from _wrapped(f"made of {' + '.join(told)}")


def _block(plan: PlanRecord, why: Explanation, block: str) -> Iterator[str]:
    units = _units_named(plan, block)
    if not units:
        near = ", ".join(plan.units[:_MOST_MATCHES])
        more = " ..." if len(plan.units) > _MOST_MATCHES else ""
        raise PlanError(
            f"the plan for {plan.model} has no block named like {block!r}; its blocks are {near}{more} "
            f"(or give a number from 0 to {len(plan.units) - 1})"
        )
    names = ", ".join(plan.units[u] for u in units[:_MOST_MATCHES])
    more = f" and {len(units) - _MOST_MATCHES} more" if len(units) > _MOST_MATCHES else ""
    yield from _wrapped(f"why {names}{more} of {plan.model} run where they run")
    stages = [s for s in plan.stages if any(s.first <= u < s.last for u in units)]
    for stage in stages[:_MOST_MATCHES]:
        yield from _wrapped(f"  {_stage_line(plan, stage)}")
    if len(stages) > _MOST_MATCHES:
        yield f"  and {len(stages) - _MOST_MATCHES} more stages"
    wanted, indices = set(units), {s.index for s in stages}
    about = [c for c in why.choices if wanted & set(c.units) or c.stage in indices]
    if about:
        yield from _choices("each choice against the next best, closest first", about)
    else:
        yield ""
        yield from _wrapped(
            "no other choice was compared for these units alone; see `graphpar explain PLAN`"
        )


def _stage_line(plan: PlanRecord, stage: PlanStage) -> str:
    devices = ", ".join(stage.devices[:3]) + (
        f" +{len(stage.devices) - 3}" if len(stage.devices) > 3 else ""
    )
    first, last = plan.units[stage.first], plan.units[stage.last - 1]
    busy = max(r.busy_share for r in stage.replicas)
    return f"stage {stage.index} on {devices}: {first} .. {last}, busy {format_percent(busy)}"


def _units_named(plan: PlanRecord, block: str) -> list[int]:
    """Units of exactly that name, else that number, else those whose name contains it."""
    exact = [i for i, name in enumerate(plan.units) if name == block]
    if exact:
        return exact
    if block.isdecimal():
        return [int(block)] if int(block) < len(plan.units) else []
    inside = block.casefold()
    return [i for i, name in enumerate(plan.units) if inside in name.casefold()]


def _choices(title: str, choices: Sequence[Choice]) -> Iterator[str]:
    if not choices:
        return
    yield from ("", title)
    for choice in choices[:_MOST_CHOICES]:
        yield from _wrapped(f"  {choice.kind}: {choice.chosen} ({choice.subject}){_margin(choice)}")
        for other in choice.alternatives[:_MOST_ALTERNATIVES]:
            yield from _wrapped(f"      {_alternative(other)}")
        if len(choice.alternatives) > _MOST_ALTERNATIVES:
            yield f"      and {len(choice.alternatives) - _MOST_ALTERNATIVES} more"
    if len(choices) > _MOST_CHOICES:
        yield f"  and {len(choices) - _MOST_CHOICES} more choices"


def _margin(choice: Choice) -> str:
    if choice.margin_s is None:
        return "; no other way is possible" if choice.alternatives else ""
    return f"; the next best costs {_signed(choice.margin_s)}"


def _alternative(other: Alternative) -> str:
    if other.costs_s is None or other.step_s is None:
        return f"instead {other.label}: not possible, {other.impossible or 'no reason given'}"
    bound = f", at least {format_seconds(other.bound_s)}" if other.bound_s is not None else ""
    step = format_seconds(other.step_s)
    return f"instead {other.label}: {_signed(other.costs_s)}, step {step} ({other.method}{bound})"


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{format_seconds(abs(seconds))}"


def _runners_up(why: Explanation) -> Iterator[str]:
    if not why.runners_up:
        return
    yield from ("", "whole plans that lost")
    for other in why.runners_up[:_MOST_RUNNERS_UP]:
        size = f"{other.num_stages} stages on {other.num_devices} devices"
        yield from _wrapped(
            f"  {_signed(other.costs_s)} (step {format_seconds(other.step_s)}, {size}): "
            f"{'; '.join(other.differences)}"
        )
    if len(why.runners_up) > _MOST_RUNNERS_UP:
        yield f"  and {len(why.runners_up) - _MOST_RUNNERS_UP} more"


def _prices(why: Explanation) -> Iterator[str]:
    if not why.shadow_prices:
        return
    yield from ("", "what more or less of a resource would be worth, per step")
    for price in why.shadow_prices[:_MOST_PRICES]:
        sign = "-" if price.change < 0 else "+"
        change = f"{sign}{format_amount(abs(price.change), price.unit)}"
        have = format_amount(price.have, price.unit)
        yield from _wrapped(f"  {price.kind} of {price.subject} ({have}) {change}: {_worth(price)}")
    if len(why.shadow_prices) > _MOST_PRICES:
        yield f"  and {len(why.shadow_prices) - _MOST_PRICES} more"


def _worth(price: ShadowPrice) -> str:
    if price.saves_s is None:
        return f"no plan fits ({price.method})"
    bound = f", at least {format_seconds(price.bound_s)}" if price.bound_s is not None else ""
    if price.saves_s == 0:
        return f"nothing ({price.method}{bound})"
    side = "faster" if price.saves_s > 0 else "slower"
    return f"{format_seconds(abs(price.saves_s))} {side} ({price.method}{bound})"


def format_amount(value: float, unit: str) -> str:
    """An amount of a resource in a unit of `ShadowPrice`.

    >>> format_amount(2.0**30, "bytes"), format_amount(2.0, "devices"), format_amount(1e9, "bytes/s")
    ('1 GiB', '2 devices', '1 GB/s')
    """
    if unit == "bytes":
        return format_bytes(value)
    if unit == "bytes/s":
        return format_rate(value, "B")
    if unit == "s":
        return format_seconds(value)
    return f"{value:g} {unit.removesuffix('s') if value == 1 else unit}"


def _listed(title: str, entries: Sequence[str]) -> Iterator[str]:
    if entries:
        yield from ("", title)
        for entry in entries:
            yield from _wrapped(f"  {entry}")


def _wrapped(line: str) -> list[str]:
    """Lines of at most 80 columns; a name that is longer than that stays whole on a line of its own."""
    indent = len(line) - len(line.lstrip())
    text = " ".join(line.split())
    lines = wrap(
        text,
        COLUMNS,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [""]
