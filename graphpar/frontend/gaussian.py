"""`gaussian_nll_loss` without the question that torch asks in between, whether a variance is negative."""

import math

import torch


def gaussian_losses(
    input: torch.Tensor,
    target: torch.Tensor,
    var: torch.Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """What `torch.nn.functional.gaussian_nll_loss` computes.

    >>> x, y, v = torch.randn(3, 2), torch.randn(3, 2), torch.rand(3, 1)
    >>> wanted = torch.nn.functional.gaussian_nll_loss(x, y, v, full=True)
    >>> torch.allclose(gaussian_losses(x, y, v, full=True), wanted)
    True
    """
    if not isinstance(var, torch.Tensor):
        var = torch.full_like(input, var)
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    # Limited without a change of its gradient, as torch does it.
    var = var + (var.clamp(min=eps) - var).detach()
    losses = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        losses = losses + 0.5 * math.log(2 * math.pi)
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
