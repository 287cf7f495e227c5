"""From a plan's partition and the lowered graphs to every rank's program."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from graphpar.ir.graph import Graph
from graphpar.ir.text import format_graph
from graphpar.partition.types import Partition, PipelineChoice, StageChoice
from graphpar.runtime.lower import StageInterface, interface
from graphpar.runtime.program import RankProgram
from graphpar.runtime.user_ops import foreign_targets, needed_code
from graphpar.schedule import Schedule, StageLink, build_schedule


@dataclass(frozen=True)
class Placement:
    """Where a rank stands: its pipeline, its stage there, and what the stage reads and makes."""

    pipeline: int
    interface: StageInterface

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of all parameters, buffers and constants the rank holds."""
        return tuple(label for labels in self.interface.tensors.values() for label in labels)


@dataclass(frozen=True)
class Lowered:
    """A partition with one lowered graph per pipeline.

    `graphs` are for any batch size where sizes are symbolic; `whole` tells that samples mix, so that
    every batch is one microbatch.
    """

    partition: Partition
    graphs: tuple[Graph, ...]
    training: bool
    whole: bool = False

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        """One per rank, in the order of `Partition.used_devices`."""
        return tuple(
            Placement(number, stage)
            for number, (pipeline, graph) in enumerate(
                zip(self.partition.pipelines, self.graphs, strict=True)
            )
            for index, choice in enumerate(pipeline.stages)
            for stage in [interface(graph, index)]
            for _ in choice.replicas
        )

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """All ranks, then every set of ranks that hold a trained parameter together."""
        sets = {ranks for ranks in self.holders.values() if len(ranks) > 1}
        everyone = tuple(range(len(self.placements)))
        return (everyone, *sorted(sets))

    @cached_property
    def holders(self) -> Mapping[str, tuple[int, ...]]:
        """For each trained parameter the ranks that hold it."""
        trained = set(self.trained)
        holders: dict[str, list[int]] = {}
        for rank, placement in enumerate(self.placements):
            for label in placement.interface.tensors["parameter"]:
                if label in trained:
                    holders.setdefault(label, []).append(rank)
        return {label: tuple(ranks) for label, ranks in holders.items()}

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """Labels of the parameters that gradients reach, in the graph's order."""
        graph = self.graphs[0]
        reached: set[str] = set()
        for op in reversed(graph.ops):
            if op.target == "output" or (op.name in reached and op.attr("grad")):
                reached.update(op.operands())
        return tuple(
            str(op.args[0]) for op in graph.sources("parameter") if op.attr("grad") and op.name in reached
        )

    def programs(self, schedule: Schedule, batch: int) -> list[RankProgram]:
        """Every rank's program for a schedule of a global batch."""
        texts = [format_graph(graph) for graph in self.graphs]
        starts = (0, *accumulate(schedule.microbatch_sizes))
        programs = []
        for rank, placement in enumerate(self.placements):
            shared = {
                label: self.groups.index(ranks)
                for label, ranks in self.holders.items()
                if rank in ranks and len(ranks) > 1
            }
            graph, stage = self.graphs[placement.pipeline], placement.interface.stage
            imports, operators = needed_code(foreign_targets(graph, stage))
            programs.append(
                RankProgram(
                    graph=texts[placement.pipeline],
                    stage=stage,
                    training=self.training,
                    actions=tuple(str(action) for action in schedule.actions[rank]),
                    routes=schedule.routes,
                    sizes=schedule.microbatch_sizes,
                    first_samples=starts[:-1],
                    batch=batch,
                    shared=shared if self.training else {},
                    owned=tuple(la for la, ranks in self.holders.items() if ranks[0] == rank),
                    imports=imports,
                    operators=operators,
                )
            )
        return programs

    def schedule(self, batch: int) -> Schedule:
        """The schedule for a global batch of so many samples; few samples leave ranks idle."""
        partition = whole_batch(self.partition, batch) if self.whole else rescale(self.partition, batch)
        links = stage_links(partition, self.graphs)
        return build_schedule(partition, links, self.training, idle_allowed=True)


def stage_links(partition: Partition, graphs: Sequence[Graph]) -> tuple[StageLink, ...]:
    """Which stages (numbered over all pipelines) exchange how much."""
    links: list[StageLink] = []
    first = 0
    for pipeline, graph in zip(partition.pipelines, graphs, strict=True):
        totals: dict[tuple[int, int], StageLink] = {}
        for op in graph.ops:
            if op.target != "gp.send":
                continue
            source, target = op.attr("stage"), op.args[1]
            assert isinstance(source, int) and isinstance(target, int)
            key = (first + source, first + target)
            per_sample = op.type.bytes(1) if op.type.batch_dims else 0
            fixed = 0 if op.type.batch_dims else op.type.bytes(1)
            back = bool(op.attr("grad"))
            old = totals.get(key, StageLink(*key, 0.0))
            totals[key] = replace(
                old,
                forward_bytes_per_sample=old.forward_bytes_per_sample + per_sample,
                backward_bytes_per_sample=old.backward_bytes_per_sample + back * per_sample,
                forward_fixed_bytes=old.forward_fixed_bytes + fixed,
                backward_fixed_bytes=old.backward_fixed_bytes + back * fixed,
            )
        links += totals.values()
        first += len(pipeline.stages)
    return tuple(links)


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
