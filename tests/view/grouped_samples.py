"""A plan with a tensor group: two devices that share every microbatch of a stage, three to two."""

from typing import Any

import msgspec
from plan_samples import sample_plan

from graphpar.plans.plan import Plan


def grouped_plan() -> Plan:
    """The small plan, with the two replicas of its middle stage made one tensor group."""
    data: Any = msgspec.to_builtins(sample_plan())
    stage = data["partition"]["pipelines"][0]["stages"][1]
    leader, other = stage["replicas"]
    leader |= {"microbatches": 8, "others": [other["device"]], "shares": [0.6, 0.4]}
    stage["replicas"] = [leader]
    for replica in data["stages"][1]["replicas"]:
        replica["microbatches"] = 8
    plan = msgspec.convert(data, Plan)
    timeline = plan.timeline()
    data["predicted_step_s"] = timeline.step_s
    data["predicted_peak_bytes"] = dict(zip(plan.devices, timeline.peak_bytes, strict=True))
    return Plan.from_json(msgspec.json.encode(msgspec.convert(data, Plan)))
