"""Attention of no samples, as a member of a tensor group may have it where samples are cut."""

from typing import Any

import torch

ATTENTION = "aten.scaled_dot_product_attention.default"


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> torch.Tensor:
    """`aten.scaled_dot_product_attention`, followed by autograd without samples as it is with some.

    Torch then gives a mask no gradient and keeps nothing for the backward: the others of a group, which
    exchange that gradient, or compute again what was kept, would wait for ever.

    >>> nothing, bias = torch.zeros(0, 2, 3, 4), torch.zeros(1, 2, 3, 3, requires_grad=True)
    >>> attention(nothing, nothing, nothing, bias).sum().backward()
    >>> bias.grad.shape
    torch.Size([1, 2, 3, 3])
    """
    if query.numel():
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, *rest, **named
        )
    if named.get("enable_gqa"):
        times = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(times, -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1)
    if attn_mask is not None and attn_mask.is_floating_point():
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
