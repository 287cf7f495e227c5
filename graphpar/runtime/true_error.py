"""The error that lower formats really caused, beside the budget it had to keep within."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphpar.plans.records import PlanPrecision
from graphpar.runtime.program import StepReport

_FLOAT32 = 1e-5
"""What the order of sums changes in float32, whatever the budget."""

Reference = Callable[[Sequence[Any], Mapping[str, Any]], tuple[list[torch.Tensor], float]]
"""Runs a batch in float32 on one device; gives its results and the norm of its gradients."""


@dataclass(frozen=True)
class TrueError:
    """Relative errors of a job's first step against float32 on one device.

    Attributes:
        budget: What was allowed.
        estimated: What the plan expected of the result and of the gradient.
        output: Of the loss, or of all results together in the Euclidean norm.
        gradient_norm: Of the norm of all gradients, before clipping; None for inference, and where the
            step was skipped.

    >>> print(TrueError(0.01, (0.001, 0.004), 0.0005, 0.002))
    error budget 0.01: the first step was off by 0.0005 in its result (0.001 estimated) and by 0.002 \
in the norm of its gradient (0.004 estimated)
    """

    budget: float
    estimated: tuple[float, float]
    output: float
    gradient_norm: float | None

    @property
    def kept(self) -> bool:
        """Whether the budget was kept, up to float32's own rounding.

        >>> TrueError(0.0, (0.0, 0.0), 0.0, 8e-8).kept, TrueError(0.01, (0.0, 0.0), 0.011, None).kept
        (True, False)
        """
        return all(e <= max(self.budget, _FLOAT32) for e in (self.output, self.gradient_norm or 0.0))

    def __str__(self) -> str:
        text = (
            f"error budget {self.budget:g}: the first step was off by {self.output:.2g} in its result "
            f"({self.estimated[0]:.2g} estimated)"
        )
        if self.gradient_norm is None:
            return text
        return (
            f"{text} and by {self.gradient_norm:.2g} in the norm of its gradient "
            f"({self.estimated[1]:.2g} estimated)"
        )


def true_error(
    planned: PlanPrecision,
    results: Sequence[torch.Tensor],
    reports: Sequence[StepReport],
    wanted: tuple[list[torch.Tensor], float],
) -> TrueError:
    """Compare a step with its float32 reference."""
    got = [r.detach().cpu() for r in results if r.is_floating_point()]
    pairs = list(zip(got, wanted[0], strict=True))
    off = math.fsum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = math.fsum(float(b.double().square().sum()) for b in wanted[0])
    norms = [r.grad_norm for r in reports if r.grad_norm is not None]
    gradient = None
    if norms and wanted[1] > 0:
        gradient = abs(norms[0] - wanted[1]) / wanted[1]
    return TrueError(
        planned.budget,
        (planned.output_error, planned.gradient_error),
        math.sqrt(off / size) if size > 0 else (0.0 if off == 0 else math.inf),
        gradient,
    )
