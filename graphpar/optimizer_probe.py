"""What an optimiser does to a slice of a parameter, found out by trying it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphpar.training import Training

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
NEEDS_CLOSURE = (torch.optim.LBFGS,)
"""Optimisers that run the model again within a step, which workers do not do."""
_STEPS = 3
_ROUNDING = 1e-5


@dataclass(frozen=True)
class OptimizerTraits:
    """How an optimiser treats its parameters.

    Attributes:
        name: Its class.
        elementwise: Whether a step on slices of a parameter is the step on the whole, cut likewise.
        separable: Whether a step on one parameter is the same whatever other parameters there are.
    """

    name: str
    elementwise: bool
    separable: bool

    @property
    def by_slices(self) -> bool:
        """Whether devices that hold slices of the parameters may step these alone."""
        return self.elementwise and self.separable


def refuse_foreign_parameters(groups: Iterable[Mapping[str, Any]], given: Iterable[nn.Parameter]) -> None:
    """
    Args:
        groups: An optimiser's parameter groups.
        given: What the user's function was called with.

    Raises:
        ValueError: The optimiser holds a parameter that the user's function was not given.
    """
    known = set(map(id, given))
    if any(id(p) not in known for group in groups for p in group["params"]):
        raise ValueError(
            "Training(optimizer=...) made an optimiser of parameters that it was not given, such as "
            "model.parameters(): those are copies here, and training them would change nothing. Take the "
            "parameters from its argument: lambda p: torch.optim.AdamW(p, lr=1e-3)."
        )


def joining_optimizer(train: Training | None) -> str:
    """The name of an optimiser whose step on one parameter depends on the others; else empty."""
    traits = optimizer_traits(train.optimizer) if train is not None else None
    return traits.name if traits is not None and not traits.separable else ""


def optimizer_traits(factory: OptimizerFactory) -> OptimizerTraits:
    """Compare a few steps on a small matrix with the same steps on its slices, and beside another one.

    An optimiser that cannot be tried so counts as one that needs whole parameters.

    >>> optimizer_traits(lambda p: torch.optim.AdamW(p, lr=0.01))
    OptimizerTraits(name='AdamW', elementwise=True, separable=True)
    >>> optimizer_traits(lambda p: torch.optim.Adafactor(p, lr=0.01)).elementwise
    False
    """
    random = torch.Generator().manual_seed(1)
    weight, other = (torch.randn(6, 10, generator=random) for _ in range(2))
    # Of unlike size by rows and columns, so that norms of slices are unlike those of the whole.
    scale = torch.linspace(0.1, 5.0, 6)[:, None] * torch.linspace(0.2, 2.0, 10)
    gradients = [torch.randn(6, 10, generator=random) * scale for _ in range(_STEPS)]
    beside = [10.0 * torch.randn(6, 10, generator=random) for _ in range(_STEPS)]
    try:
        name = type(factory([nn.Parameter(weight.clone())])).__name__
        (whole,) = _stepped(factory, [weight], [[g] for g in gradients])
        rows = torch.cat(_stepped(factory, _cut(weight, 0), [_cut(g, 0) for g in gradients]), 0)
        columns = torch.cat(_stepped(factory, _cut(weight, 1), [_cut(g, 1) for g in gradients]), 1)
        pair = _stepped(factory, [weight, other], list(map(list, zip(gradients, beside, strict=True))))
    except Exception:
        return OptimizerTraits(getattr(factory, "__name__", "this optimiser"), False, True)
    return OptimizerTraits(name, _same(rows, whole) and _same(columns, whole), _same(pair[0], whole))


def _cut(tensor: torch.Tensor, dim: int) -> list[torch.Tensor]:
    return [tensor.narrow(dim, 0, 4).clone(), tensor.narrow(dim, 4, tensor.shape[dim] - 4).clone()]


def _stepped(
    factory: OptimizerFactory, weights: list[torch.Tensor], gradients: list[list[torch.Tensor]]
) -> list[torch.Tensor]:
    """The weights after as many steps as there are lists of gradients."""
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = factory(parameters)
    for row in gradients:
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING)
