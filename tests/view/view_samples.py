"""Plans with hostile names and steps that were "measured", for the tests of the views."""

from dataclasses import dataclass
from typing import Any

import msgspec
from plan_samples import sample_plan

from graphpar.explanation.account import Alternative, Choice, Explanation, RunnerUp, ShadowPrice
from graphpar.plans.plan import Plan
from graphpar.runtime.last_step import LastStep
from graphpar.runtime.program import Event, StepReport

HOSTILE = (
    "</script><script>alert(1)</script>",
    "\"quotes\" 'and' `ticks` & <b>",
    "注意力层/日本語",
    "x" * 300,
    "line\u2028separator\u2029 ]]> --> %%{init}%%",
    "control \x01 bell \x07 end",
)


@dataclass(frozen=True)
class Job:
    """A plan with its last step."""

    plan: Plan
    last_step: LastStep | None
    comparison: Any = None
    true_error: Any = None


def measured_step(
    plan: Plan,
    *,
    slower: float = 1.1,
    until_s: float = float("inf"),
    clock_s: tuple[float, ...] = (),
) -> LastStep:
    """The predicted step, played `slower`; events that end after `until_s` did not happen.

    `clock_s` is by how much each rank's clock is ahead.
    """
    timeline = plan.timeline()
    reports = []
    for rank in range(len(plan.devices)):
        base = 1000.0 + (clock_s[rank] if clock_s else 0.0)
        events = tuple(
            Event(str(e.action), base + slower * e.start_s, base + slower * e.end_s)
            for e in timeline.events(rank)
            if slower * e.end_s <= until_s
        )
        end = max((e.end_s for e in events), default=base)
        reports.append(StepReport(rank, base, end, events, peak_bytes=2**20 * (rank + 1)))
    seconds = max(r.end_s for r in reports) - min(r.start_s for r in reports)
    return LastStep(seconds, timeline.step_s, tuple(reports))


def hostile_plan() -> Plan:
    """The small plan with every name replaced by one that would break a careless view."""
    plan = sample_plan()
    names = {device: f"{HOSTILE[i % 6]}#{i}" for i, device in enumerate([*plan.devices, *plan.left_out])}
    data: Any = _renamed(msgspec.to_builtins(plan), names)
    data["model"] = " ".join(HOSTILE)
    data["units"] = list(HOSTILE)
    data["notes"] = list(HOSTILE)
    for stage in data["stages"]:
        for replica in stage["replicas"]:
            replica["kind"] = HOSTILE[0]
    data["cluster"] = {"nodes": [{"name": HOSTILE[1]}]}
    return msgspec.convert(data, Plan)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Plain data with device names replaced, in keys and in values."""
    if isinstance(value, dict):
        return {names.get(k, k): _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def explained_plan(plan: Plan | None = None) -> Plan:
    """A plan that says why it is as it is, with one of everything there is to say."""
    explanation = Explanation(
        step_s=0.2,
        bound_s=0.19,
        gap=0.05,
        parts={"fill_compute_s": 0.05, "steady_s": 0.15},
        binding=("stage 1 paces the pipeline: 110 ms of 150 ms", "memory of slow bounds stage 2"),
        choices=(
            Choice(
                "cut",
                "between units 2 and 3",
                "unit 3 (h.2)",
                (
                    Alternative("unit 4 (h.3)", 0.204, 0.004, "re-solved", bound_s=0.201),
                    Alternative("unit 2 (h.1)", 0.23, 0.03, "re-priced"),
                    Alternative("unit 5", None, None, "searched", impossible="memory of p0s0/0"),
                ),
                pipeline=0,
                stage=1,
                units=(2, 3),
            ),
            Choice(
                "schedule", "the whole plan", "1f1b", (Alternative("gpipe", 0.21, 0.01, "re-priced"),)
            ),
            Choice("left out", "spare/0", "no work", ()),
        ),
        runners_up=(RunnerUp(("stage 1 has one replica", "4 microbatches"), 0.22, 0.02, 3, 3),),
        shadow_prices=(
            ShadowPrice("memory", "slow", 2.0**28, 2.0**26, "bytes", 0.19, 0.01, "re-solved", 0.185),
            ShadowPrice("devices", "fast", 2.0, -1.0, "devices", None, None, "re-solved"),
        ),
        left_out=("tensor widths above 4: time limit",),
    )
    return msgspec.structs.replace(plan or sample_plan(), explanation=explanation)
