"""Backward in two halves: gradients of inputs at once, gradients of weights when there is time.

An op whose weights come later (attribute `late`) runs on a tape of its own, apart from that of its stage.
In the first half of the backward only the inputs' side of that tape is followed, and the op with the
gradient that came back is put on a list; in the second half the weights' side is. Both halves together
run the very kernels that one backward runs, so the numbers are the same to the bit; and as autograd
itself adds to the parameters, hooks, views of weights and copies in lower formats work as ever.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class _Owed:
    """Where an op's own tape ends, the gradient that came back, and the weights it is for.

    The edge of the tape, not the result itself, which would be held until the second half.
    """

    result: GradientEdge
    gradient: torch.Tensor
    weights: tuple[torch.Tensor, ...]


class Deferral:
    """Gradients of weights that one stage owes, by microbatch."""

    def __init__(self) -> None:
        self._owed: dict[int, list[_Owed]] = {}
        self._current: list[_Owed] = []

    @contextmanager
    def noting(self, microbatch: int) -> Iterator[None]:
        """Backwards inside owe to this microbatch."""
        self._current = self._owed[microbatch] = []
        yield
        self._current = []

    def note(self, owed: _Owed) -> None:
        """Owe a gradient."""
        self._current.append(owed)

    def settle(self, microbatch: int) -> None:
        """Add what a microbatch owes to the gradients of the parameters."""
        owed = self._owed.pop(microbatch)
        owed.reverse()
        while owed:
            one = owed.pop()
            if all(weight.is_leaf for weight in one.weights):
                torch.autograd.backward(one.result, one.gradient, inputs=list(one.weights))
            else:
                gradients = torch.autograd.grad(one.result, one.weights, one.gradient)
                torch.autograd.backward(one.weights, gradients)


class Late(nn.Module):
    """An op whose weights get their gradients later.

    Args:
        function: What torch calls.
        places: Which arguments are weights.
        deferral: Where it is noted what is owed.
    """

    def __init__(self, function: Callable[..., Any], places: Sequence[int], deferral: Deferral) -> None:
        super().__init__()
        self.function, self.places, self.deferral = function, tuple(places), deferral

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The op's result."""
        weights = tuple(arguments[place] for place in self.places)
        data = [
            place
            for place, argument in enumerate(arguments)
            if isinstance(argument, torch.Tensor) and argument.requires_grad and place not in self.places
        ]
        if not torch.is_grad_enabled() or not data or not all(w.requires_grad for w in weights):
            return self.function(*arguments, **keywords)

        def call(*inner: torch.Tensor) -> torch.Tensor:
            given = list(arguments)
            for place, tensor in zip(data, inner, strict=True):
                given[place] = tensor
            result: torch.Tensor = self.function(*given, **keywords)
            return result

        return _Apart.apply(call, weights, self.deferral, *(arguments[place] for place in data))  # type: ignore[no-untyped-call]


class _Apart(torch.autograd.Function):
    """Runs a call on a tape of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., torch.Tensor],
        weights: tuple[torch.Tensor, ...],
        deferral: Deferral,
        *data: torch.Tensor,
    ) -> torch.Tensor:
        inner = tuple(tensor.detach().requires_grad_() for tensor in data)
        with torch.enable_grad():
            result = call(*inner)
        ctx.kept = inner, get_gradient_edge(result), weights, deferral
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        inner, result, weights, deferral = ctx.kept
        ctx.kept = None
        (gradient,) = gradients
        found = torch.autograd.grad(result, inner, gradient, retain_graph=True)
        deferral.note(_Owed(result, gradient, weights))
        return None, None, None, *found
