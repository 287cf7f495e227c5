"""What `what_if` is asked, as the caller wrote it: read, checked, and refused in words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from graphpar import arguments
from graphpar.cluster import Cluster
from graphpar.scenarios.prices import known_prices
from graphpar.scenarios.types import BASELINE, Scenario

Asked = str | Scenario | Mapping[str, str | Sequence[str]] | Sequence[str | Sequence[str] | Scenario]

_EXAMPLES = "such as 'drop a/1' or 'set batch=64', or several of them"


def as_scenarios(asked: Asked) -> tuple[Scenario, ...]:
    """Scenarios from names and words; a text alone is one scenario.

    Raises:
        ValueError: Something else was given.

    >>> as_scenarios({"less": "drop a/0", "more": ["set batch=8", "drop a/1"]})[1].changes
    ('set batch=8', 'drop a/1')
    >>> as_scenarios(["drop a/0; set batch=8"])[0].changes
    ('drop a/0', 'set batch=8')
    """
    if isinstance(asked, (str, Scenario)):
        asked = (asked,)
    if isinstance(asked, Mapping):
        for name in asked:
            if not isinstance(name, str):
                raise ValueError(f"the name of a scenario is text, not {name!r}")
        return tuple(Scenario(name, _changes(words, repr(name))) for name, words in asked.items())
    items = items_of(asked)
    if items is None:
        raise ValueError(
            f"scenarios= takes a dict of names to changes, or changes, {_EXAMPLES}; not {_shown(asked)}"
        )
    return tuple(_scenario(item, number) for number, item in enumerate(items))


def _scenario(item: object, number: int) -> Scenario:
    if isinstance(item, Scenario):
        return Scenario(item.name, _changes(item.changes, repr(item.name)))
    return Scenario("", _changes(item, f"number {number + 1}"))


def _changes(written: object, which: str) -> tuple[str, ...]:
    parts = items_of(written.split(";") if isinstance(written, str) else written)
    if parts is None:
        raise ValueError(f"scenario {which} is {_shown(written)}; write a change in words, {_EXAMPLES}")
    for part in parts:
        if not isinstance(part, str):
            raise ValueError(
                f"scenario {which} has {_shown(part)} among its changes; write each in words, "
                "such as 'drop a/1' or 'set batch=64'"
            )
    return tuple(text for p in parts if (text := str(p).strip()))


def check_names(scenarios: Sequence[Scenario]) -> None:
    """Make sure that every answer can be told by its title.

    Raises:
        ValueError: Two scenarios have the same one, or one that of the baseline.
    """
    seen: dict[str, Scenario] = {}
    for scenario in scenarios:
        title = scenario.title
        if title == BASELINE:
            raise ValueError(
                f"a scenario is named {BASELINE!r}, which is the job as it is; give it another name"
            )
        if title in seen:
            first, second = ("; ".join(s.changes) for s in (seen[title], scenario))
            raise ValueError(
                f"scenario {title!r} is asked twice; leave one out"
                if first == second
                else f"two scenarios are named {title!r}: {first!r} and {second!r}; rename one"
            )
        seen[title] = scenario


def check_limits(
    *,
    gap: object,
    time_limit_s: object,
    processes: object,
    budget_usd_per_h: object,
    calibration: object,
    **functions: object,
) -> None:
    """Refuse limits that are no numbers or senseless ones, and functions that cannot be called.

    Raises:
        ValueError: Says which and what was given.
    """
    arguments.check_limits(
        gap=gap, time_limit_s=1.0 if time_limit_s is None else time_limit_s, calibration=calibration
    )
    if processes is not None:
        arguments.whole_number("processes", processes, "a whole number of at least 1", lambda n: n >= 1)
    if budget_usd_per_h is not None:
        arguments.check_number("budget_usd_per_h", budget_usd_per_h, "a positive number", lambda x: x > 0)
    for name, given in functions.items():
        if given is not None and not callable(given):
            raise ValueError(f"{name}= takes a function, not {_shown(given)}")


def instance_types(given: str | Sequence[str]) -> tuple[str, ...]:
    """Instance types from a sequence, or from a text with commas between them.

    Raises:
        ValueError: Something else was given.

    >>> instance_types("g5.xlarge, p3.2xlarge")
    ('g5.xlarge', 'p3.2xlarge')
    """
    types = texts_of(given.split(",") if isinstance(given, str) else given)
    if types is None:
        raise ValueError(f"instances= takes names of instance types, not {_shown(given)}")
    return tuple(name for t in types if (name := t.strip()))


def items_of(given: object) -> tuple[object, ...] | None:
    """What a sequence holds; None for what is none, or not one of several things (a dict, bytes)."""
    if not isinstance(given, Iterable) or isinstance(given, (bytes, Mapping)):
        return None
    try:
        return tuple(given)
    except TypeError:  # a tensor without dimensions says that it can be gone through
        return None


def texts_of(given: object) -> tuple[str, ...] | None:
    """The texts of a sequence; None for anything else."""
    found = items_of(given)
    texts = tuple(text for text in found or () if isinstance(text, str))
    return None if found is None or len(texts) < len(found) else texts


def price_list(cluster: Cluster, given: Mapping[str, float | str]) -> tuple[tuple[str, float], ...]:
    """Dollars per hour by node: those given, before the catalogue's.

    Raises:
        ClusterError: A price is of no node.
        ValueError: A price is no number, or none that anything could cost.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"prices= takes a dict of node names to dollars per hour, not {_shown(given)}")
    prices = dict(known_prices(cluster))
    for name, usd_per_h in given.items():
        cluster.node(name)
        prices[name] = _price(name, usd_per_h)
    return tuple(prices.items())


def _price(name: str, given: object) -> float:
    try:
        # What is read from a file may be text: YAML takes 1e1 for such.
        usd_per_h = math.nan if isinstance(given, bool) else float(cast(float, given))
    except (TypeError, ValueError, OverflowError):
        usd_per_h = math.nan
    if not (math.isfinite(usd_per_h) and usd_per_h >= 0):
        raise ValueError(
            f"the price of {name} is {_shown(given)} $/h; it must be a finite number, and not negative"
        )
    return usd_per_h


def _shown(value: object) -> str:
    """A value as it was given, or only its type where that is long."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
