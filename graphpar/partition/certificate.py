"""What a bound on a family of plans says of a plan that may be none of them."""

import math
from dataclasses import dataclass

from graphpar.partition.types import ROUNDING, Status
from graphpar.units import format_seconds

BEYOND = "family: the plan is none of those searched, its bound is that on plans of any kind"
"""What a plan says that is shorter than the bound on all that was searched, or the only one that fits."""


@dataclass(frozen=True)
class Certificate:
    """A lower bound, and how far above it a plan is.

    `beyond` says that the plan is shorter than the bound on the family that was searched, so that it is
    none of that family: `bound_s` is the bound on plans of any kind then.
    """

    bound_s: float
    gap: float
    beyond: bool

    @property
    def status(self) -> Status:
        """`optimal` only where the bound is met."""
        return "optimal" if self.gap <= ROUNDING else "feasible"


def certificate(step_s: float, family_s: float, physical_s: float) -> Certificate:
    """What is known of a plan.

    Args:
        step_s: What it takes.
        family_s: A bound on the plans of the family that was searched; infinite where none fits.
        physical_s: A bound on plans of any kind.

    >>> certificate(10.0, 9.0, 5.0)
    Certificate(bound_s=9.0, gap=0.1, beyond=False)
    >>> certificate(10.0, math.inf, 5.0)
    Certificate(bound_s=5.0, gap=0.5, beyond=True)
    """
    beyond = step_s < family_s * (1 - ROUNDING)
    bound_s = min(physical_s if beyond else max(family_s, physical_s), step_s)
    return Certificate(bound_s, gap_of(step_s, bound_s), beyond)


def gap_of(step_s: float, bound_s: float) -> float:
    """How far a step is above a bound, as a part of the step."""
    return (step_s - bound_s) / step_s if step_s > 0 else 0.0


def family_note(family_s: float) -> str:
    """What was proven of a family that a plan is not of."""
    if family_s == math.inf:
        return "of the plans that were searched none fits"
    return f"of the plans that were searched none takes less than {format_seconds(family_s)}"
