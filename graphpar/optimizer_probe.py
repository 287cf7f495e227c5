"""What an optimiser does to a slice of a parameter, found out by trying it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graphpar.training import Training

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
NEEDS_CLOSURE = (torch.optim.LBFGS,)
"""Optimisers that run the model again within a step, which workers do not do."""
_ROUNDING = 1e-5
"""Of the largest change that a step makes; they are tried in float64 where the optimiser takes that."""
_SIZES = (1.0, 1.0, 1e-2, 1e3, 1.0)
"""Sizes of the gradients of successive steps, for optimisers that clip."""
_SHAPES = ((6, 10), (7,), (4, 3, 2, 2), (150, 140))
"""Tried one by one: many treat vectors, matrices and kernels in ways of their own, or matrices only when
they are large (Adafactor's factors from 128 rows on)."""


@dataclass(frozen=True)
class OptimizerTraits:
    """How an optimiser treats its parameters.

    Attributes:
        name: Its class.
        elementwise: Whether a step on slices of a parameter is the step on the whole, cut likewise.
        separable: Whether a step on one parameter is the same whatever other parameters there are.
        repeatable: Whether the same gradients make the same steps; not where it draws at random.
    """

    name: str
    elementwise: bool
    separable: bool
    repeatable: bool = True

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


def refuse_random_steps(train: Training | None, num_devices: int) -> None:
    """
    Raises:
        ValueError: The optimiser draws at random and there are several devices.
    """
    if train is not None and num_devices > 1:
        refuse_unrepeatable(optimizer_traits(train.optimizer), num_devices)


def refuse_unrepeatable(traits: OptimizerTraits, num_devices: int) -> None:
    """
    Raises:
        ValueError: The optimiser draws at random and there are several devices.
    """
    if num_devices > 1 and not traits.repeatable:
        raise ValueError(
            f"{traits.name} cannot train on several devices: it makes other steps of the same gradients "
            "each time (it draws at random), so that copies of a weight would drift apart. Draw in the "
            "model, where numbers are the same on every device, or take another optimiser."
        )


def optimizer_traits(factory: OptimizerFactory) -> OptimizerTraits:
    """Compare a few steps on small tensors with the same steps on their slices, and beside another one.

    An optimiser that cannot be tried so counts as one that needs whole parameters.

    >>> optimizer_traits(lambda p: torch.optim.AdamW(p, lr=0.01))
    OptimizerTraits(name='AdamW', elementwise=True, separable=True, repeatable=True)
    >>> optimizer_traits(lambda p: torch.optim.Adafactor(p, lr=1e-5)).elementwise
    False
    """
    failed = OptimizerTraits(getattr(factory, "__name__", "this optimiser"), False, True)
    for dtype in (torch.float64, torch.float32):
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), suppress(Exception):
            name = type(factory([nn.Parameter(torch.ones(6, 10))])).__name__
            failed = replace(failed, name=name)
            return _tried(factory, name, dtype)
    return failed


def _tried(factory: OptimizerFactory, name: str, dtype: torch.dtype) -> OptimizerTraits:
    """Traits found with parameters of a number format."""
    tries = [_Try(factory, shape, dtype) for shape in _SHAPES]
    first = tries[0]
    alone = first.moved([first.weight], [first.gradients])
    again = first.moved([first.weight], [first.gradients])
    repeatable = all(torch.equal(a, b) for a, b in zip(again, alone, strict=True))
    beside = [10.0 * g.flip(0) for g in first.gradients]
    pair = first.moved([first.weight, first.weight.flip(1)], [first.gradients, beside])
    separable = not repeatable or _same(pair[::2], alone)
    elementwise = repeatable and all(each.is_elementwise(needed=each is first) for each in tries)
    return OptimizerTraits(name, elementwise, separable, repeatable)


class _Try:
    """Steps on a parameter of some shape, whole and in slices.

    Attributes:
        state_fits: Whether what the optimiser keeps of a parameter is as large as that, or one number.
    """

    def __init__(self, factory: OptimizerFactory, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.factory = factory
        self.state_fits = True
        random = torch.Generator().manual_seed(1)
        self.weight = torch.randn(shape, generator=random, dtype=dtype)
        scale = torch.ones(shape, dtype=dtype)
        for dim, size in enumerate(shape):
            # Of unlike size by rows and columns, so that norms of slices are unlike those of the whole.
            row = torch.linspace(0.1, 3.0 - dim / 2, size, dtype=dtype)
            scale = scale * row.view([-1 if d == dim else 1 for d in range(len(shape))])
        self.gradients = [
            size * scale * torch.randn(shape, generator=random, dtype=dtype) for size in _SIZES
        ]

    def is_elementwise(self, needed: bool) -> bool:
        """Whether slices in either of the first dimensions move as the whole does.

        Where the optimiser takes no parameters of this shape, and need not, that is no objection.
        """
        try:
            whole = self.moved([self.weight], [self.gradients])
        except Exception:
            if needed:
                raise
            return True
        if not self.state_fits:
            return False
        for dim in range(min(2, self.weight.ndim)):
            parts = zip(*(_cut(g, dim) for g in self.gradients), strict=True)
            moved = self.moved(_cut(self.weight, dim), [list(part) for part in parts])
            joined = [torch.cat(pair, dim) for pair in zip(moved[::2], moved[1::2], strict=True)]
            if not _same(joined, whole):
                return False
        return True

    def moved(
        self, weights: Sequence[torch.Tensor], gradients: Sequence[Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """How far each parameter is moved, step by step, for each of their gradients."""
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = self.factory(parameters)
        for group in optimizer.param_groups:
            if not torch.as_tensor(group.get("lr", 1.0)).any():  # a scheduler begins with nothing
                group["lr"] = 1e-3
        moved: list[torch.Tensor] = []
        for row in zip(*gradients, strict=True):
            for parameter, gradient in zip(parameters, row, strict=True):
                parameter.grad = gradient.clone()
            before = [p.detach().clone() for p in parameters]
            optimizer.step()
            moved += [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        kept = [(p, v) for p in parameters for v in optimizer.state.get(p, {}).values()]
        self.state_fits = all(
            v.numel() == 1 or v.shape == p.shape for p, v in kept if isinstance(v, torch.Tensor)
        )
        return moved


def _cut(tensor: torch.Tensor, dim: int) -> list[torch.Tensor]:
    first = tensor.shape[dim] * 2 // 3
    return [part.clone() for part in torch.split(tensor, [first, tensor.shape[dim] - first], dim)]


def _same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether changes are the same but for rounding, step by step."""
    pairs = zip(some, others, strict=True)
    return all(float((a - b).abs().max()) <= _ROUNDING * float(b.abs().max()) for a, b in pairs)


def optimizer_state(train: Training) -> float:
    """Bytes of optimiser state per byte of parameters, seen from one step on a small parameter."""
    parameter = nn.Parameter(torch.ones(64, 64))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = train.optimizer([parameter])
        groups = optimizer.param_groups
    except Exception as error:
        raise ValueError(_FAILED.format(error=error)) from error
    refuse_foreign_parameters(groups, [parameter])  # before a step, which would change them
    try:
        optimizer.step()
    except Exception as error:
        if isinstance(optimizer, NEEDS_CLOSURE):
            raise ValueError(
                f"{type(optimizer).__name__} cannot train a parallel job: it computes the loss several "
                "times within one step (a closure). Take an optimiser that steps on gradients alone, "
                "such as AdamW."
            ) from error
        raise ValueError(_NO_STEP.format(error=error)) from error
    state = optimizer.state.get(parameter, {})
    held = sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor) and v.numel() > 1)
    return held / parameter.nbytes


_FAILED = (
    "Training(optimizer=...) failed on a list of one parameter: {error}. It must make an optimiser "
    "from any iterable of parameters."
)
_NO_STEP = (
    "The optimiser of Training(optimizer=...) failed in a step on one parameter: {error}. Gradients are "
    "dense here, those of nn.Embedding(sparse=True) too."
)
