"""The CTC loss as an operator of static shapes, for torch's own makes one that depends on the lengths."""

from typing import Any

import torch
from torch.nn import functional


def _losses(log_probs: torch.Tensor, *rest: Any) -> torch.Tensor:
    targets, input_lengths, target_lengths, blank, zero_infinity = rest
    with torch.backends.cudnn.flags(enabled=False):
        return functional.ctc_loss(
            log_probs, targets, input_lengths, target_lengths, blank, "none", zero_infinity
        )


@torch.library.custom_op("graphpar::ctc_loss", mutates_args=())
def ctc_losses(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    zero_infinity: bool,
) -> torch.Tensor:
    """The loss of each sample, [N].

    Args:
        log_probs: [T, N, C].
        targets: [N, S]; of each row its first `target_lengths` count.
        input_lengths: [N].
        target_lengths: [N].
        blank: The class that stands for nothing.
        zero_infinity: Whether a loss of infinity counts as none.
    """
    return _losses(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)


@ctc_losses.register_fake
def _(log_probs: torch.Tensor, *rest: Any) -> torch.Tensor:
    return log_probs.new_empty(log_probs.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    log_probs, *rest = ctx.saved_tensors
    with torch.enable_grad():
        given = log_probs.detach().requires_grad_()
        (made,) = torch.autograd.grad(_losses(given, *rest, *ctx.options), given, gradient)
    return made, None, None, None, None, None


ctc_losses.register_autograd(_backward, setup_context=_keep)
