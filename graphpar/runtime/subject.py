"""What a job is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphpar.cluster import Cluster
from graphpar.frontend.capture import Captured
from graphpar.ir.graph import Graph
from graphpar.partition.types import Partition
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.first_step import FirstStepCheck
from graphpar.runtime.true_error import Reference
from graphpar.runtime.weights import Weights
from graphpar.training import Training


@dataclass(frozen=True)
class Subject:
    """What a job is made of.

    Attributes:
        model: The user's model; its weights are read at the start and whenever asked for state.
        captured: How calls become inputs and results become the user's structure.
        graph: The captured graph after the first passes.
        model_hash: Hash of the captured structure; all ranks must have the same.
        whole_batch_only: Whether the batch must stay whole.
        cluster: The devices.
        training: How to train, None for inference.
        lower: Lowers a graph for a partition; weights that are held in slices already, by a graph
            lowered before, stay so.
        prepare_inference: Captures the model for inference with given arguments, passes included.
        prepare_again: The same in the job's own mode, for arguments of other shapes.
        reference: Runs a batch in float32 on one device, to tell what lower formats cost.
        check: Compares the first step with one device, where that is wanted.
        find_weights: Says where all tensors of the captured graph are.
    """

    model: nn.Module
    captured: Captured
    graph: Graph
    model_hash: str
    whole_batch_only: bool
    cluster: Cluster
    training: Training | None
    lower: Callable[[Graph, Partition, Lowered | None], Lowered]
    prepare_inference: Callable[[Sequence[Any], Mapping[str, Any]], Captured]
    prepare_again: Callable[[Sequence[Any], Mapping[str, Any]], Captured]
    find_weights: Callable[[], Weights]
    reference: Reference | None = None
    check: FirstStepCheck | None = None
