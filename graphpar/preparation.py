"""Around the planner: from a model to units, and from a partition to lowered graphs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from graphpar.cluster import Cluster
from graphpar.errors import CaptureError
from graphpar.frontend.capture import Captured, capture
from graphpar.frontend.recapture import graph_like
from graphpar.groups.sharing import member_graphs
from graphpar.ir.chain import Chain, build_chain
from graphpar.ir.graph import Graph
from graphpar.ir.text import format_op
from graphpar.ir.whole import tail_reason
from graphpar.partition.types import Partition, PipelineChoice
from graphpar.passes.batch import mixing_reason
from graphpar.passes.canonicalize import Canonicalize
from graphpar.passes.casts import AssignFormats, InsertCasts
from graphpar.passes.comm import InsertMessages
from graphpar.passes.deferral import DeferWeightGradients
from graphpar.passes.in_step import SplitBatch
from graphpar.passes.place import Place
from graphpar.passes.randomness import KeyRandomness
from graphpar.precision.sensitivity import (
    Trial,
)
from graphpar.rewrite import Pipeline
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.user_ops import refuse_without_derivative
from graphpar.training import Training

CAPTURE_PASSES = Pipeline((Canonicalize(), KeyRandomness(), SplitBatch()))
"""What every captured graph goes through before it is priced."""


def lowering_passes(
    stage_of_unit: tuple[int, ...],
    unit_formats: tuple[str, ...] = (),
    split_stages: frozenset[int] = frozenset(),
) -> Pipeline:
    """What leads from a captured graph to one that runs: stages, then casts, then messages.

    Last come the marks of what a backward in two halves leaves for later, in the stages that have one.
    """
    late = (DeferWeightGradients(split_stages),) if split_stages else ()
    return Pipeline(
        (AssignFormats(unit_formats), Place(stage_of_unit), InsertCasts(), InsertMessages(), *late)
    )


@dataclass(frozen=True)
class Prepared:
    """A captured model after the first passes, cut into units."""

    captured: Captured
    graph: Graph
    chain: Chain
    batch_reason: str

    @property
    def tail_reason(self) -> str:
        """Which op needs the whole batch though the rest is worked on in parts; empty where none does."""
        return "" if self.batch_reason else tail_reason(self.graph)

    @property
    def in_step_reason(self) -> str:
        """What makes parts of the batch meet in the middle of the model; empty where nothing does."""
        return "" if self.batch_reason else str(self.graph.output.attr("in_step", ""))

    @cached_property
    def model_hash(self) -> str:
        """Hash of the structure: ops, shapes and names, not source lines or weights."""
        digest = hashlib.sha256()
        for op in self.graph.ops:
            digest.update(format_op(op).split(" @ ")[0].encode())
        return digest.hexdigest()


def prepare(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: Training | None
) -> Prepared:
    """Capture a model for training or inference and cut it into units."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"The model must be a torch.nn.Module, not {type(model).__name__}.")
    if train is not None and not isinstance(train, Training):
        raise ValueError(f"train= takes graphpar.Training(optimizer=...), not {train!r}.")
    if train is None:
        captured = capture(model, args, kwargs, loss=None, training=False)
    else:
        captured = capture(model, args, kwargs, loss=train.loss or "returned")
        refuse_without_derivative(captured.graph)
    return _prepared(captured)


def prepare_like(
    known: Prepared,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    train: Training | None,
    samples: int,
) -> Prepared | None:
    """A model captured before, for inputs of other sizes, from one export at so many samples.

    It proves less than `prepare` (see `graphpar.frontend.recapture`); None where the ops are not the
    known ones.
    """
    loss, training = (train.loss or "returned", None) if train is not None else (None, False)
    graph = graph_like(known.captured, model, args, kwargs, samples, loss=loss, training=training)
    if graph is None:
        return None
    if train is not None:
        refuse_without_derivative(graph)
    return _prepared(replace(known.captured, graph=graph))


def _prepared(captured: Captured) -> Prepared:
    graph, _ = CAPTURE_PASSES.run(captured.graph)
    reason = captured.unsplittable or mixing_reason(graph)
    chain = build_chain(graph)
    if not chain.units:
        raise CaptureError(
            f"The model, {graph.name}, computes nothing: it returns its arguments or weights as they "
            "are, so that there is nothing to run. Leave it out."
        )
    return Prepared(captured, graph, chain, reason)


def captured_again(prepared: Prepared) -> Captured:
    """What the runtime needs of a model captured for other calls than the example's."""
    return replace(prepared.captured, graph=prepared.graph, mixes=prepared.batch_reason)


def lower(
    graph: Graph,
    found: Partition,
    training: bool,
    *,
    cluster: Cluster | None = None,
    like: Lowered | None = None,
    train: Training | None = None,
    shard: bool = True,
) -> Lowered:
    """One lowered graph per pipeline of a partition, and one for each member of a tensor group.

    Args:
        graph: A captured graph.
        found: Who runs what.
        training: Whether the lowered graphs train.
        cluster: The devices; needed where the partition has tensor groups.
        like: Lowered before for the same ranks: weights stay in the slices they are held in.
        train: How the job trains; an optimiser that must see whole weights keeps them whole.
        shard: False leaves the members' own graphs out.
    """
    graphs = []
    for pipeline in found.pipelines:
        stage_of_unit = [0] * pipeline.stages[-1].last
        for number, stage in enumerate(pipeline.stages):
            stage_of_unit[stage.first : stage.last] = [number] * (stage.last - stage.first)
        formats = tuple(f for stage in pipeline.stages for f in stage.formats)
        split = _split_stages(pipeline) if training and found.schedule == "zero-bubble" else frozenset()
        lowered, _ = lowering_passes(tuple(stage_of_unit), formats, split).run(graph)
        graphs.append(lowered)
    local: dict[int, Graph] = {}
    has_groups = any(r.others for p in found.pipelines for s in p.stages for r in s.replicas)
    in_step = next((op for op in graph.ops if op.attr("meets")), None)
    if has_groups and in_step is not None and len(found.pipelines) > 1:
        raise ValueError(
            f"{in_step.target} in {in_step.module or 'the model'} ({in_step.source}) adds up what "
            "pipelines side by side have of the batch, and members of tensor groups do not take part in "
            "that. Plan with tensor=1, or give the groups one pipeline."
        )
    if shard and has_groups:
        if cluster is None:
            raise ValueError("A partition with tensor groups is lowered for a cluster; give cluster=.")
        local = member_graphs(graph, tuple(graphs), found, cluster, training, like, train)
    again = any(stage.recompute for pipeline in found.pipelines for stage in pipeline.stages)
    divided = any(stage.zero > 1 for pipeline in found.pipelines for stage in pipeline.stages)
    units = tuple(unit.ops for unit in build_chain(graph).units) if again or divided else ()
    return Lowered(found, tuple(graphs), training, local=local, units=units)


def _split_stages(pipeline: PipelineChoice) -> frozenset[int]:
    """Stages whose backward can be done in two halves: not what is computed again, nor tensor groups."""
    return frozenset(
        number
        for number, stage in enumerate(pipeline.stages)
        if not stage.recompute and not any(r.others for r in stage.replicas)
    )


def trial_of(model: nn.Module, prepared: Prepared, train: Training | None) -> Trial:
    """The model on one device of this machine, its units in any formats and stages."""
    units = len(prepared.chain.units)

    def lowered(formats: tuple[str, ...], stages: tuple[int, ...]) -> Graph:
        placed, _ = Pipeline((AssignFormats(formats), Place(stages or (0,) * units), InsertCasts())).run(
            prepared.graph
        )
        # Rounded as between stages, but all on one device: nothing is sent.
        here = placed.with_ops(
            op if op.attr("stage") is None else op.with_attrs(stage=0) for op in placed.ops
        )
        graph, _ = Pipeline((InsertMessages(),)).run(here)
        return graph

    return Trial(
        model=model,
        captured=prepared.captured,
        graph=prepared.graph,
        chain=prepared.chain,
        model_hash=prepared.model_hash,
        whole_batch_only=bool(prepared.batch_reason),
        training=train is not None,
        seed=train.seed if train else 0,
        lower=lowered,
    )
