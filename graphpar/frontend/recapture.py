"""A model's graph for inputs of other sizes, when it was captured before: exported once, not twice.

Which sizes scale with the batch, and that equal blocks may be stamped, is taken over from the earlier
capture. One export cannot prove it anew: whoever asks compares graphs from exports at unlike batches.
But what the model's code asks of sizes has to come out at both batches of a capture in full as it did
here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpar.frontend.capture import Captured, batch_size, merge_ties, plain, resize, unlike_size
from graphpar.frontend.conditions import conditions, noted
from graphpar.frontend.fold import LEAST_BLOCKS, Exporter
from graphpar.frontend.torch_private import flatten, unflatten
from graphpar.frontend.unify import Mismatch, scaled_like
from graphpar.frontend.weightless import values_apart
from graphpar.ir.graph import Graph


def graph_like(
    known: Captured,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    samples: int,
    *,
    loss: Callable[[Any, Any], Any] | str | None = None,
    training: bool | None = None,
) -> Graph | None:
    """The graph of a model's call with inputs of other sizes; None where it may not have the known ops.

    Args:
        known: A capture of the model, for as large a batch.
        model: The model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        samples: How large a batch to export for.
        loss: As the model was captured.
        training: As the model was captured.

    Raises:
        CaptureError: The model cannot be exported.
    """
    leaves, spec = flatten((tuple(args), dict(kwargs)))
    batch = batch_size(leaves)
    if known.unsplittable or batch != known.graph.batch or spec != known.signature.spec:
        return None
    fold = LEAST_BLOCKS if known.stamped else 0
    exporter = Exporter(model, loss, training, fold, proven=True)
    with torch.inference_mode(False), noted(samples) as asked, values_apart(model, loss):
        sized = [resize(plain(leaf), batch, samples) for leaf in leaves]
        some_args, some_kwargs = unflatten(sized, spec)
        made, out_spec = exporter.run(some_args, some_kwargs)
    ops, aliases = merge_ties(model, made.ops)
    graph = known.graph
    if out_spec != known.signature.output_spec or aliases != graph.aliases:
        return None
    try:
        ops = scaled_like(ops, graph.ops, samples)
    except Mismatch:
        return None
    held = conditions(asked, asked, ops)
    alike = all(c.holds(size) for c in held for size in (batch, unlike_size(batch)))
    return graph.with_ops(ops) if alike else None
