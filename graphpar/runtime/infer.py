"""Run another graph of the same model on ranks that already hold its weights.

Training jobs infer by such a graph, and inputs of another shape than the example's have one each.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from graphpar.errors import VerifyError
from graphpar.frontend.capture import Captured
from graphpar.ir.chain import Unit, build_chain, written_buffers
from graphpar.ir.formats import format_of
from graphpar.ir.graph import Graph
from graphpar.ir.whole import tail_reason
from graphpar.partition.types import Partition, PipelineChoice
from graphpar.runtime.assemble import Lowered


def lower_inference(
    captured: Captured, trained: Lowered, lower: Callable[[Graph, Partition, Lowered], Lowered]
) -> Lowered:
    """The graph lowered so that every weight is read where training keeps it.

    Buffers that training changes and this graph only reads may be read elsewhere, too (`copied_buffers`).

    Raises:
        VerifyError: The graph reads weights in another order than training does, so that no stage
            order serves both.
    """
    read = {str(op.args[0]) for op in captured.graph.sources("buffer")}
    copied = read - changed_buffers([captured.graph])
    fitted = replace(_fitted_to(captured.graph, trained, copied), schedule="gpipe")
    lowered = lower(captured.graph, fitted, trained)
    _check_held(lowered, trained)
    return replace(lowered, training=False, whole=bool(captured.unsplittable or captured.mixes))


def copied_buffers(inferring: Lowered, trained: Lowered) -> list[set[str]]:
    """For each rank the buffers that it infers with and other ranks change in training.

    Its copies are what they were when the job began, until they are written anew.
    """
    changed = changed_buffers(trained.graphs)
    pairs = zip(inferring.placements, trained.placements, strict=True)
    return [changed & {*new.labels} - {*old.labels} for new, old in pairs]


def changed_buffers(graphs: Iterable[Graph]) -> set[str]:
    """Labels of the buffers that some op writes to."""
    return {str(graph[name].args[0]) for graph in graphs for name in written_buffers(graph)}


def lower_again(
    captured: Captured, before: Lowered, lower: Callable[[Graph, Partition, Lowered], Lowered]
) -> Lowered:
    """The model as captured for inputs of another shape, in the stages it has.

    Raises:
        VerifyError: A rank would have to hold other weights than it does.
    """
    fitted = _fitted_to(captured.graph, before)
    if tail_reason(captured.graph):
        fitted = replace(fitted, schedule="gpipe")
    lowered = lower(captured.graph, fitted, before)
    _check_held(lowered, before)
    if lowered.training and lowered.holders != before.holders:
        raise VerifyError(
            "For inputs of this shape the model trains other weights than for the example's; compile "
            "again for this shape."
        )
    return replace(lowered, whole=bool(captured.unsplittable or captured.mixes))


def _check_held(lowered: Lowered, before: Lowered) -> None:
    """
    Raises:
        VerifyError: A rank reads a parameter that it does not hold.
    """
    for rank, (new, old) in enumerate(zip(lowered.placements, before.placements, strict=True)):
        missing = {*new.tensors["parameter"]} - {*old.tensors["parameter"]}
        if missing:
            raise VerifyError(
                f"Inputs of this kind need {min(missing)!r} in another stage than the plan keeps it "
                f"(rank {rank}); compile a job for them alone (for inference without train=)."
            )


def _fitted_to(graph: Graph, before: Lowered, copied: Collection[str] = ()) -> Partition:
    """The partition with every pipeline cut at this graph's units; copied buffers are had anywhere."""
    pipelines = []
    for number, pipeline in enumerate(before.partition.pipelines):
        stages_of = _stages_of_weights(before, number, pipeline)
        formats = _formats_of_weights(before.graphs[number])
        pipelines.append(_fitted(graph, pipeline, stages_of, formats, copied))
    return replace(before.partition, pipelines=tuple(pipelines))


def _stages_of_weights(
    trained: Lowered, pipeline_number: int, pipeline: PipelineChoice
) -> Mapping[str, list[int]]:
    """For each parameter, and each buffer that training changes, the stages that hold it."""
    written = changed_buffers(trained.graphs)
    found: dict[str, list[int]] = {}
    rank_of = {device: rank for rank, device in enumerate(trained.partition.used_devices)}
    for number, stage in enumerate(pipeline.stages):
        placement = trained.placements[rank_of[stage.replicas[0].device]]
        assert placement.pipeline == pipeline_number
        held = placement.interfaces[placement.stages.index(number)].tensors
        for label in (*held["parameter"], *(b for b in held["buffer"] if b in written)):
            found.setdefault(label, []).append(number)
    return found


def _formats_of_weights(graph: Graph) -> Mapping[str, str]:
    """For each parameter the format of the units that read it; float32 where they disagree."""
    found: dict[str, str] = {}
    for op in graph.sources("parameter"):
        read = {format_of(user) for user in graph.users(op.name)}
        found[str(op.args[0])] = read.pop() if len(read) == 1 else "float32"
    return found


def _formats(graph: Graph, units: Sequence[Unit], formats_of: Mapping[str, str]) -> tuple[str, ...]:
    """Each unit computes in the format of its weights; one without any in that of the unit before."""
    formats: list[str] = []
    for unit in units:
        operands = [graph[operand] for name in unit.ops for operand in graph[name].operands()]
        labels = {str(o.args[0]) for o in operands if o.target == "parameter"} & formats_of.keys()
        read = {formats_of[label] for label in labels}
        before = formats[-1] if formats else "float32"
        formats.append((read.pop() if len(read) == 1 else "float32") if read else before)
    return tuple(formats)


def _fitted(
    graph: Graph,
    pipeline: PipelineChoice,
    stages_of: Mapping[str, list[int]],
    formats_of: Mapping[str, str],
    copied: Collection[str],
) -> PipelineChoice:
    """The pipeline with its stages cut at this graph's units."""
    units = build_chain(graph).units
    current = 0
    starts = [0]
    for index, unit in enumerate(units):
        needed = _earliest(graph, unit.ops, stages_of, current, copied)
        while current < needed:
            current += 1
            starts.append(index)
    starts += [len(units)] * (len(pipeline.stages) - len(starts))
    ends = [*starts[1:], len(units)]
    formats = _formats(graph, units, formats_of)
    stages = tuple(
        replace(stage, first=first, last=last, unit_formats=formats[first:last])
        for first, last, stage in zip(starts, ends, pipeline.stages, strict=True)
    )
    return replace(pipeline, stages=stages)


def _earliest(
    graph: Graph,
    ops: tuple[str, ...],
    stages_of: Mapping[str, list[int]],
    current: int,
    copied: Collection[str],
) -> int:
    """The first stage, not before the current one, that holds all trained weights of a unit."""
    needed = current
    for name in ops:
        for operand in graph[name].operands():
            source = graph[operand]
            if source.target not in ("parameter", "buffer") or str(source.args[0]) not in stages_of:
                continue
            at = [s for s in stages_of[str(source.args[0])] if s >= needed]
            if not at and source.target == "buffer" and str(source.args[0]) in copied:
                continue
            if not at:
                raise VerifyError(
                    f"Inputs of this kind need {source.args[0]!r} in a later stage than the plan keeps "
                    "it; compile a job for them alone (for inference without train=)."
                )
            needed = at[0]
    return needed
