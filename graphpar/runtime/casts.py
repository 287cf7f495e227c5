"""Lower copies of weights: made once, and again when the weight has changed."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class _Copy:
    """A weight, its copy in a lower format, and which version of the weight that was made from."""

    weight: torch.Tensor
    version: int
    lower: torch.Tensor


class LowerWeights:
    """One rank's weights in lower formats; all microbatches of a step read the same copy.

    The weights themselves stay in float32: the optimiser changes those, and gradients arrive in float32.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.dtype], _Copy] = {}
        self._stale: set[tuple[int, torch.dtype]] = set()
        self._places: set[int] = set()

    def forget(self) -> None:
        """Make every copy anew when it is read next.

        Optimisers that write to `parameter.data` change weights without a trace.
        """
        self._stale.update(self._copies)

    def holds(self, lower: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of one of the copies."""
        return lower.untyped_storage().data_ptr() in self._places

    def cast(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight in a lower format, as a value that gradients flow back through."""
        key = id(weight), dtype
        kept = self._copies.get(key)
        if kept is None:
            lower = weight.detach().to(dtype)
            kept = self._copies[key] = _Copy(weight, weight._version, lower)
            self._places.add(lower.untyped_storage().data_ptr())
        elif kept.version != weight._version or key in self._stale:
            kept.lower.copy_(weight.detach())
            kept.version = weight._version
        self._stale.discard(key)
        result: torch.Tensor = _Cast.apply(weight, kept.lower)  # type: ignore[no-untyped-call]
        return result


class _Cast(torch.autograd.Function):
    """Stands for the cast that was made before: hands its result out, and casts gradients back."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return lower.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.dtype), None
