"""How far one device's numbers are from exact ones, and from its own with other last bits of the weights.

Where a model is ill-conditioned, no other order of the same sums gives the same float32 numbers: the
gradient of a bias before a batch normalisation is zero but for rounding, and a unit of a rectifier or of
a maximum that flips moves gradients of a deep convolutional net by parts in a thousand. Where one device
is that far from float64, or from itself with other last bits, another order of sums may be, too, and that
says nothing against a plan.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from typing import Any

import torch

from graphpar.frontend.torch_private import flatten, unflatten
from graphpar.runtime.reference import EagerModel, OneDevice

ROUNDS = 3
"""Changes of the weights that are tried."""
MARGIN = 16.0
"""How many times the largest movement seen another order of sums may move a number.

Statistics of a batch that lies on several ranks are summed by another formula than torch's kernel, whose
rounding was seen to be ten times as large.
"""


def own_rounding(
    make: Callable[[], EagerModel | OneDevice],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: torch.Tensor,
    gradients: Mapping[str, torch.Tensor],
    step: int = 0,
) -> tuple[float, dict[str, float]]:
    """What rounding explains of a difference in the loss and, by name, in each gradient.

    Args:
        make: Makes the model on one device, with the weights of the step.
        args: Positional arguments of the batch.
        kwargs: Keyword arguments of the batch.
        loss: The loss on one device.
        gradients: The gradients on one device, on the processor.
        step: The step's number, which random numbers depend on.
    """
    loss_moves, moves = 0.0, dict.fromkeys(gradients, 0.0)
    for other_loss, others in _others(make, args, kwargs, step):
        loss_moves = _larger(loss_moves, abs(float(other_loss) - float(loss)))
        for name, gradient in others.items():
            if name in moves and gradient.numel():
                moved = float((gradient.detach().cpu() - gradients[name]).abs().max())
                moves[name] = _larger(moves[name], moved)
    return MARGIN * loss_moves, {name: MARGIN * moved for name, moved in moves.items()}


def _larger(before: float, moved: float) -> float:
    """Numbers that overflow in one of the formats explain nothing."""
    return max(before, moved) if isfinite(moved) else before


def _others(
    make: Callable[[], EagerModel | OneDevice], args: Sequence[Any], kwargs: Mapping[str, Any], step: int
) -> Iterator[tuple[torch.Tensor, Mapping[str, torch.Tensor]]]:
    """Losses and gradients of the step with other last bits, and in float64 where that can be had."""
    for number in range(ROUNDS):
        reference = make()
        last_bits_changed(reference, number)
        yield _step(reference, args, kwargs, step)
    exact = make()
    if isinstance(exact, EagerModel):
        exact.model.double()
        leaves, spec = flatten((tuple(args), dict(kwargs)))
        with suppress(Exception):  # a model may ask for float32 by name
            doubled, named = unflatten([_doubled(leaf) for leaf in leaves], spec)
            yield _step(exact, doubled, named, step)


def _step(
    reference: EagerModel | OneDevice, args: Sequence[Any], kwargs: Mapping[str, Any], step: int
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    (loss,) = reference.forward(args, kwargs, step)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), reference.gradients()


def _doubled(leaf: Any) -> Any:
    is_real = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.double() if is_real else leaf


def last_bits_changed(reference: EagerModel | OneDevice, seed: int) -> None:
    """Multiply every trained number by 1 or its neighbours, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.trained.values():
            steps = torch.randint(-1, 2, parameter.shape, generator=generator)
            near = 1.0 + steps.to(torch.float64) * torch.finfo(parameter.dtype).eps
            parameter.mul_(near.to(parameter.device).to(parameter.dtype))
