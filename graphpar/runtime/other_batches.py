"""A plan's stages for another number of samples than it was made for."""

from collections.abc import Sequence
from dataclasses import replace

from graphpar.partition.types import Partition, PipelineChoice, StageChoice


def rescale(partition: Partition, batch: int) -> Partition:
    """The same stages for another number of samples: shares kept as nearly as whole samples allow.

    Pipelines and replicas for which there are too few samples get none.
    """
    pipelines = partition.pipelines
    if batch == sum(p.samples for p in pipelines):
        return partition
    samples = _apportion([p.samples for p in pipelines], batch)
    return replace(
        partition, pipelines=tuple(_resized(p, n) for p, n in zip(pipelines, samples, strict=True))
    )


def whole_batch(partition: Partition, batch: int) -> Partition:
    """The same stages for a batch that must not be split: the first pipeline and replicas run it."""
    first, *others = partition.pipelines
    pipelines = (_dealt(first, batch, 1), *(_dealt(p, 0, 0) for p in others))
    return replace(partition, pipelines=pipelines)


def at_once(partition: Partition) -> Partition:
    """The same samples, each pipeline's in one microbatch."""
    pipelines = tuple(_dealt(p, p.samples, min(p.samples, 1)) for p in partition.pipelines)
    return replace(partition, pipelines=pipelines)


def _resized(pipeline: PipelineChoice, samples: int) -> PipelineChoice:
    microbatches = max(1, round(pipeline.microbatches * samples / pipeline.samples))
    widest = max(len(stage.replicas) for stage in pipeline.stages)
    return _dealt(pipeline, samples, min(samples, max(microbatches, widest)))


def _dealt(pipeline: PipelineChoice, samples: int, microbatches: int) -> PipelineChoice:
    """The pipeline with other samples and microbatches, these dealt to replicas by their shares."""
    stages = tuple(_redealt(stage, microbatches) for stage in pipeline.stages)
    return PipelineChoice(samples, microbatches, stages)


def _redealt(stage: StageChoice, microbatches: int) -> StageChoice:
    dealt = _apportion([r.microbatches for r in stage.replicas], microbatches)
    replicas = zip(stage.replicas, dealt, strict=True)
    return replace(stage, replicas=tuple(replace(r, microbatches=n) for r, n in replicas))


def _apportion(shares: Sequence[int], total: int) -> list[int]:
    """Whole numbers near the shares that add up to the total, each at least one while that lasts.

    >>> _apportion([24, 8], 8), _apportion([5, 1], 3), _apportion([1, 5, 3], 2)
    ([6, 2], [2, 1], [0, 1, 1])
    """
    if total < len(shares):
        largest = sorted(range(len(shares)), key=lambda i: -shares[i])[:total]
        return [int(i in largest) for i in range(len(shares))]
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    result = [max(1, int(x)) for x in exact]
    while sum(result) < total:
        result[max(range(len(shares)), key=lambda i: exact[i] - result[i])] += 1
    while sum(result) > total:
        candidates = [i for i in range(len(shares)) if result[i] > 1]
        result[min(candidates, key=lambda i: exact[i] - result[i])] -= 1
    return result
