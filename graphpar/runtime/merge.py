"""Split a global batch among microbatches and put results together again."""

from collections.abc import Mapping, Sequence

import torch

from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op
from graphpar.runtime.executor import StepResult
from graphpar.runtime.lower import StageInterface
from graphpar.runtime.program import WHOLE
from graphpar.schedule import Schedule


def samples_of(graph: Graph, inputs: Mapping[str, torch.Tensor], batched: frozenset[str]) -> int:
    """The number of samples in a call's inputs.

    Raises:
        ValueError: The inputs do not agree on it, or there are none.
    """
    sizes = {name: inputs[name].shape[0] for name in batched if inputs[name].ndim}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The inputs do not agree on the number of samples: {sizes}.")
    samples = next(iter(sizes.values()), graph.batch)
    if not samples:
        raise ValueError("The batch has no samples.")
    return samples


def check_inputs(graph: Graph, inputs: Mapping[str, torch.Tensor], batched: frozenset[str]) -> int:
    """The number of samples in a call's inputs, after checking shapes and dtypes.

    Raises:
        ValueError: An input does not fit the captured graph; names it, what it is, what it should be.
    """
    samples = samples_of(graph, inputs, batched)
    for op in graph.sources("input"):
        label = str(op.args[0])
        if label not in inputs:
            continue
        tensor, expected = inputs[label], op.type.sizes(samples)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != expected or dtype != op.type.dtype:
            raise ValueError(
                f"Input {label!r} is {dtype}{list(tensor.shape)}, but the model was captured for "
                f"{op.type} (B is the number of samples). Give the shape and dtype of the example "
                "batch, or compile again for the new one."
            )
    return samples


def inputs_of_rank(
    stages: Sequence[StageInterface],
    rank: int,
    schedule: Schedule,
    inputs: Mapping[str, torch.Tensor],
    batched: frozenset[str],
) -> dict[str, torch.Tensor]:
    """What a rank needs of the global batch: its microbatches of the inputs its stages read.

    What a tail reads, it reads of the whole batch.
    """
    needed: dict[str, torch.Tensor] = {}
    first, leader = 0, schedule.team_of[rank][0]
    labels = {label for stage in stages for label in stage.inputs}
    if any(leader in route for route in schedule.routes):
        for label in {la for stage in stages if stage.tail is not None for la in stage.tail.inputs}:
            needed[f"{label}@{WHOLE}" if label in batched else label] = inputs[label]
    for number, (size, route) in enumerate(zip(schedule.microbatch_sizes, schedule.routes, strict=True)):
        if leader in route:
            for label in labels:
                if label in batched:
                    needed[f"{label}@{number}"] = inputs[label][first : first + size]
                else:
                    needed[label] = inputs[label]
        first += size
    return needed


def merge_results(graph: Graph, results: Sequence[StepResult]) -> list[torch.Tensor]:
    """The graph's results over the whole batch from every rank's parts."""
    parts: dict[int, dict[int, torch.Tensor]] = {}
    for result in results:
        for (place, number), tensor in result.results.items():
            parts.setdefault(place, {})[number] = tensor
    merged = []
    for place, name in enumerate(graph.output.operands()):
        by_number = parts[place]
        merged.append(_join(graph[name], [by_number[n] for n in sorted(by_number)]))
    return merged


def _join(op: Op, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1 or op.attr("samples") in ("shared", None):
        return parts[0]
    if op.attr("samples") == "partial":
        return torch.stack(tuple(parts)).sum(0)
    assert op.attr("samples") == "sample", op
    (dim,) = op.type.batch_dims
    outer = op.attr("outer", 1)
    assert isinstance(outer, int)
    if outer == 1:
        return torch.cat(tuple(parts), dim)
    unfolded = [
        p.reshape(*p.shape[:dim], outer, p.shape[dim] // outer, *p.shape[dim + 1 :]) for p in parts
    ]
    return torch.cat(unfolded, dim + 1).flatten(dim, dim + 1)
