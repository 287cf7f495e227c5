"""Number formats in which a plan would fit that does not fit as asked for.

A cost table has no prices in other formats, so the partitioner cannot try them. Here the model is priced
again in each lower format of the cluster, and the same programmes say whether a plan fits into memory.
"""

import time
from collections.abc import Callable

from graphpar.cluster import Cluster
from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.infeasible import some_plan_fits
from graphpar.partition.settings import Microbatches, ScheduleChoice
from graphpar.precision.formats import Formats, uniform_formats
from graphpar.precision.search import candidate_formats

WHOLE_FORMATS = ("bfloat16", "float16")
"""Formats that may be asked for by name; others are chosen for single units only."""

FORMATS_S = 5.0
"""Time that looking for a format may take, where a limit leaves so much."""


def with_format_remedies(
    error: InfeasibleError,
    cluster: Cluster,
    precision: str,
    num_units: int,
    table_of: Callable[[Formats], CostTable],
    settings: tuple[ScheduleChoice, Microbatches],
    *,
    time_limit_s: float = FORMATS_S,
) -> InfeasibleError:
    """The same error, with the lower formats among its remedies in which a plan was found to fit.

    `settings` are the schedule and the microbatch count that plans may have. No further format is looked
    at after `time_limit_s`.
    """
    if error.limit != "memory":
        return error
    deadline_s = time.monotonic() + time_limit_s
    fitting = []
    for lower in candidate_formats(cluster):
        if lower not in WHOLE_FORMATS or lower == precision or time.monotonic() > deadline_s:
            continue
        table = table_of(uniform_formats(cluster, lower, num_units))
        if some_plan_fits(table, *settings, deadline_s):
            fitting.append(f'precision="{lower}"')
    if not fitting:
        return error
    joint = "; or " if error.remedy else ". What would fit: "
    return InfeasibleError(
        str(error) + joint + "; or ".join(fitting),
        limit=error.limit,
        need=error.need,
        have=error.have,
        remedy=error.remedy or fitting[0],
    )
