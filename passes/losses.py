"""Losses that are a mean of terms: where they are told how to reduce, and what they are without."""

from dataclasses import replace

from graphpar.ir.ops import Dim
from graphpar.ir.optable import packet
from graphpar.passes.dispatch import infer
from graphpar.passes.samples import Call, Samples
from graphpar.passes.sizes import broadcast

_OF_ELEMENTS = {
    "mse_loss": 2, "l1_loss": 2, "smooth_l1_loss": 2, "huber_loss": 2, "soft_margin_loss": 2,
    "binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4, "kl_div": 2,
    "margin_ranking_loss": 4, "hinge_embedding_loss": 3, "poisson_nll_loss": 5,
}  # fmt: skip
_OF_ROWS = {
    "multi_margin_loss": 5, "multilabel_margin_loss": 2, "triplet_margin_loss": 7,
    "cosine_embedding_loss": 4,
}  # fmt: skip
REDUCTION = _OF_ELEMENTS | _OF_ROWS
"""Losses that are a mean of one term per element, or per row, with the position of `reduction`."""
CLASS_LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss2d", "nll_loss_nd"})


def terms(call: Call) -> tuple[Samples, tuple[Dim, ...]]:
    """What the terms of a loss are to the samples before they are added up, and their shape."""
    tensors = call.operands()
    types = [kind for kind in map(call.type, tensors) if kind is not None]
    if packet(call.op) not in _OF_ROWS:
        shape = broadcast([t.shape for t in types])
        plain = replace(
            call.op,
            target="aten.add.Tensor",
            args=tensors,
            kwargs=(),
            types=(replace(types[0], shape=shape),),
        )
        return infer(replace(call, op=plain)), shape
    first = call.state(tensors[0])
    dims = {call.dim(r) for r in tensors if call.state(r).kind == "sample"}
    if first.kind != "sample" or dims != {0} or len(types[0].shape) != 2 or not call.same_layout():
        return call.mixed("compares samples with each other"), ()
    return first, types[0].shape[:1]
