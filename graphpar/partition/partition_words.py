"""What a partition says in words: which plans were searched, and what its reader should know besides."""

from collections.abc import Sequence

from graphpar.cost import CostTable
from graphpar.partition.family import Family, grouping_words, share_step
from graphpar.partition.types import PipelineChoice


def family_words(family: Family, groupings_searched: int) -> str:
    """The plans that were searched; of a large cluster's groupings so many to the end."""
    table = family.table
    counts = family.counts(table.batch)
    words = [
        f"chains of stages over {sum(family.cells.counts)} devices, staffed by {family.staffing}",
        f"{grouping_words(family, groupings_searched)}, shares in steps of {share_step(table)}",
        f"{len(counts)} microbatch counts from {counts[0]} to {counts[-1]}",
        "schedule " + " or ".join(family.schedules),
    ]
    return "; ".join(words)


def idle_note(table: CostTable, pipelines: Sequence[PipelineChoice]) -> list[str]:
    """Which devices a plan leaves out."""
    used = {d for p in pipelines for s in p.stages for r in s.replicas for d in r.devices}
    idle = [d for d in table.class_of if d not in used]
    if not idle:
        return []
    names = ", ".join(idle[:8]) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
    return [f"left out: {names}; no plan with them was found to be faster"]


def table_notes(table: CostTable) -> list[str]:
    """What a table allows only in part."""
    notes = []
    if table.batch_reason:
        notes.append(f"the batch stays whole: {table.batch_reason}")
    if table.in_step_reason:
        notes.append(
            f"{table.in_step_reason}: each pipeline takes its samples as one microbatch, and "
            "pipelines side by side go in step and add up such sums"
        )
    if table.tail_reason:
        first = ", so that all forwards come before the backwards" if table.training else ""
        notes.append(f"{table.tail_reason}: from there on the last stage works on the whole batch{first}")
    return notes
