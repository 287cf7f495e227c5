"""How far two results are apart, and what counts as rounding."""

from collections.abc import Iterable, Mapping
from math import isfinite

import torch

FLOAT32_ROUNDING = 1e-4
"""Largest difference, relative to the largest value compared, that counts as rounding.

Sums over microbatches and ranks add the same float32 terms in another order.
"""
_NOISE_FLOOR = 1e-3
"""Gradients this much smaller than the largest of all are compared with this part of the largest."""


def relative_difference(
    a: torch.Tensor, b: torch.Tensor, floor: float = 0.0, explained: float = 0.0
) -> float:
    """Largest difference beyond what is explained, relative to the largest magnitude in `b` or `floor`.

    It is infinite, never NaN, where only one of the two is finite: `max` passes over NaN.

    >>> round(relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])), 3)
    0.2
    """
    if a.shape != b.shape:
        return float("inf")
    if not b.numel() or not (b.is_floating_point() or b.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = torch.isfinite(b)
    if not bool(finite.all()):
        odd, other = a[~finite], b[~finite]
        if not bool(((odd == other) | ((odd != odd) & (other != other))).all()):
            return float("inf")
        a, b = a[finite], b[finite]
        if not b.numel():
            return 0.0
    wide = torch.complex128 if b.is_complex() else torch.float64
    largest = max(float(b.abs().max()), floor)
    difference = float((a.to(wide) - b.to(wide)).abs().max())
    if difference <= explained:
        return 0.0
    return difference / largest if largest > 0 and isfinite(difference) else float("inf")


def finite_share(tensors: Iterable[torch.Tensor]) -> float:
    """Share of all numbers that are finite; 1 where there are none.

    >>> finite_share([torch.tensor([1.0, float("nan")]), torch.tensor([2, 3])])
    0.75
    """
    counts = [(int(torch.isfinite(t).sum()), t.numel()) for t in tensors]
    total = sum(numel for _, numel in counts)
    return sum(finite for finite, _ in counts) / total if total else 1.0


def compare_gradients(
    got: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    explained: Mapping[str, float] | None = None,
) -> tuple[str, float]:
    """The parameter whose gradient differs most, and by how much; smaller than `explained` is none."""
    explained = explained or {}
    magnitudes = (float(g.abs().max()) for g in wanted.values() if g.numel())
    largest = max(filter(isfinite, magnitudes), default=0.0)
    worst, difference = "", 0.0
    for name, gradient in wanted.items():
        if name in got:
            floor = _NOISE_FLOOR * largest
            own = relative_difference(got[name], gradient, floor, explained.get(name, 0.0))
        else:
            own = 0.0 if not bool(gradient.any()) else float("inf")
        if own > difference:
            worst, difference = name, own
    return worst, difference
