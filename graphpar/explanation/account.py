"""Why a plan is as it is: what each choice costs against the next best, and what resources are worth.

Plain frozen data, kept inside a plan's file, so that a page or a picture can be drawn from it without
a solver at hand. Seconds are seconds per step of the whole plan under the programme's cost formula, the
same as `Partition.objective_s`; every number says by which method it was found:

* `searched`: the search met this plan and proved what it says;
* `re-solved`: the programme was solved again with one thing changed; a bound comes with it;
* `re-priced`: one thing was changed by hand and the plan priced again, nothing else was adapted: an
  upper bound on what that choice costs;
* `dual`: from the dual values of a linear programme.
"""

from dataclasses import dataclass
from typing import Literal

Method = Literal["searched", "re-solved", "re-priced", "dual"]
ChoiceKind = Literal[
    "cut",
    "devices",
    "replicas",
    "tensor width",
    "precision",
    "recompute",
    "zero",
    "schedule",
    "microbatches",
    "share",
    "left out",
]
ResourceKind = Literal["memory", "bandwidth", "latency", "devices"]


@dataclass(frozen=True)
class Alternative:
    """Another way to decide one thing.

    Attributes:
        label: What would be different, for people.
        step_s: Step time of the plan with it; None where it is not possible.
        costs_s: `step_s` less that of the chosen plan (never below zero by more than the gap); None
            where it is not possible.
        method: How the number was found.
        bound_s: A proven lower bound on the step of every plan with it, where there is one.
        impossible: Why it is not possible, such as the device whose memory it breaks; else empty.
    """

    label: str
    step_s: float | None
    costs_s: float | None
    method: Method
    bound_s: float | None = None
    impossible: str = ""


@dataclass(frozen=True)
class Choice:
    """One decision of the plan and the other ways it could have gone, cheapest first.

    `pipeline` and `stage` (numbered over all pipelines) say where; None for decisions of the whole plan.
    A cut is the one before the stage. `units` are the units of the chain that the choice concerns.
    """

    kind: ChoiceKind
    subject: str
    chosen: str
    alternatives: tuple[Alternative, ...]
    pipeline: int | None = None
    stage: int | None = None
    units: tuple[int, ...] = ()

    @property
    def margin_s(self) -> float | None:
        """What the next best way would cost; None where there is no other."""
        costs = [a.costs_s for a in self.alternatives if a.costs_s is not None]
        return min(costs, default=None)


@dataclass(frozen=True)
class ShadowPrice:
    """What a little more of a resource is worth.

    Attributes:
        kind: Which resource.
        subject: Of which device class, or which link.
        have: How much there is.
        change: How much was added (taken away where negative).
        unit: `bytes`, `bytes/s`, `s` or `devices`.
        step_s: Step time with the change; None where no plan fits.
        saves_s: Seconds per step less than now (negative: more); None where no plan fits.
        method: How it was found.
        bound_s: With `re-solved`, a lower bound on the step with the change.
    """

    kind: ResourceKind
    subject: str
    have: float
    change: float
    unit: str
    step_s: float | None
    saves_s: float | None
    method: Method
    bound_s: float | None = None


@dataclass(frozen=True)
class RunnerUp:
    """A whole plan that lost: in what it differs, and by how much it is slower."""

    differences: tuple[str, ...]
    step_s: float
    costs_s: float
    num_devices: int
    num_stages: int


@dataclass(frozen=True)
class Explanation:
    """Why a plan is as it is.

    Attributes:
        step_s: The programme's step time of the plan; `bound_s` and `gap` are its certificate.
        parts: The step by its parts, which add up to `step_s`: those of the programme, with what stages
            send inside themselves (`..._collective_s`) apart from what they compute.
        binding: What keeps the plan from being faster, most binding first, in words.
        choices: Decisions, those with the smallest margin first.
        runners_up: Whole plans that lost, best first.
        shadow_prices: What more of each resource would be worth, most valuable first.
        left_out: What was not looked at and why, such as a time limit; never silent.
    """

    step_s: float
    bound_s: float
    gap: float
    parts: dict[str, float]
    binding: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()
    runners_up: tuple[RunnerUp, ...] = ()
    shadow_prices: tuple[ShadowPrice, ...] = ()
    left_out: tuple[str, ...] = ()
