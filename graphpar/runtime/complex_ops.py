"""Operators that torch does not differentiate for complex numbers, by way of their real parts."""

from collections.abc import Callable, Mapping

import torch


def slice_scatter(
    x: torch.Tensor,
    source: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> torch.Tensor:
    """`aten.slice_scatter`.

    >>> x, y = torch.zeros(3, dtype=torch.cfloat), torch.ones(1, dtype=torch.cfloat, requires_grad=True)
    >>> slice_scatter(x, y, 0, 1, 2).abs().sum().backward()
    >>> y.grad
    tensor([1.+0.j])
    """
    real = torch.slice_scatter(_real(x), _real(source.to(x.dtype)), dim % x.ndim, start, end, step)
    return torch.view_as_complex(real)


def select_scatter(x: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """`aten.select_scatter`."""
    real = torch.select_scatter(_real(x), _real(source.to(x.dtype)), dim % x.ndim, index)
    return torch.view_as_complex(real)


def _real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x.resolve_conj())


OF_COMPLEX: Mapping[str, Callable[..., torch.Tensor]] = {
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
}
"""What to call for an operator whose result is complex."""
