"""Schedules as data: what every rank does, action by action, in one training or inference step.

`actions` holds the types and their text form, `orders` builds a schedule from a partition, `check`
proves that it is complete and cannot deadlock. `graphpar.schedule.simulate` predicts its timeline.
"""

from graphpar.schedule.actions import KINDS, Action, ActionKind, PipelineSpan, Schedule, StageLink
from graphpar.schedule.backwards import backward_order
from graphpar.schedule.check import validate
from graphpar.schedule.orders import build_schedule, in_flight_limit, route_microbatches

__all__ = [
    "KINDS",
    "Action",
    "ActionKind",
    "PipelineSpan",
    "Schedule",
    "StageLink",
    "backward_order",
    "build_schedule",
    "in_flight_limit",
    "route_microbatches",
    "validate",
]
