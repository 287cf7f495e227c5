"""Custom `torch.autograd.Function`s as operators, so that their own backward survives the capture.

torch.export looks through a Function and keeps the ops of its forward only: whatever its backward does
(a straight-through estimator, a reversed gradient) would silently become the derivative of the forward.
While a model is captured every Function of the user therefore becomes an operator of its own, with the
Function's forward and backward and its arguments that are no tensors built in. The operator's
definition travels to the workers like that of any other operator of the user's script.

The backward calls the Function once more to get back what its forward kept, and lets autograd run the
Function's backward; a Function costs a second forward in exchange.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as checkpoint_module

from graphpar.errors import CaptureError
from graphpar.frontend.checkpoints import run_again_later
from graphpar.frontend.conditions import uncounted
from graphpar.frontend.elementwise import acts_by_element
from graphpar.frontend.torch_private import (
    DispatchMode,
    OpDefinition,
    TreeSpec,
    apply_function,
    define_op,
    flatten,
    is_random,
    lookup_op,
    memory_of,
    unflatten,
    writes_to,
)
from graphpar.ir.optable import ELEMENTWISE_FUNCTIONS, FUNCTIONS

NAMESPACES = (FUNCTIONS, ELEMENTWISE_FUNCTIONS)
"""Operators of these namespaces are Functions; no module can be imported to define them."""


@dataclass(frozen=True)
class FunctionCall:
    """One way to call a Function: which of its arguments are tensors, and what the others are.

    Attributes:
        function: The subclass of `torch.autograd.Function`.
        spec: Structure of the arguments.
        plain: For each flat argument its value, None where it is a tensor.
        tensors: Places of the tensors among the flat arguments.
        results: Places of the tensors among the results; None where the result is one tensor.
    """

    function: Any
    spec: TreeSpec
    plain: tuple[Any, ...]
    tensors: tuple[int, ...]
    results: tuple[int, ...] | None

    def is_like(self, other: "FunctionCall") -> bool:
        """Whether another call does the same; True, 1 and 1.0, 0.0 and -0.0 are not the same to it."""
        return self == other and list(map(_kind, self.plain)) == list(map(_kind, other.plain))

    def arguments(self, given: tuple[torch.Tensor, ...]) -> Any:
        """The Function's own arguments with these tensors in their places."""
        leaves = list(self.plain)
        for place, tensor in zip(self.tensors, given, strict=True):
            leaves[place] = tensor
        return unflatten(leaves, self.spec)

    def call(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The tensors among the Function's results."""
        result = apply_function(self.function, *self.arguments(given))
        return (result,) if self.results is None else tuple(result[i] for i in self.results)

    def forward(self, *given: torch.Tensor) -> Any:
        """What the operator computes; results never share memory with arguments or each other."""
        with torch.no_grad():
            made = self.call(given)
        seen = {memory_of(t) for t in given}
        fresh = []
        for tensor in made:
            place = memory_of(tensor)
            fresh.append(tensor.clone() if place in seen else tensor)
            seen.add(place)
        return fresh[0] if len(fresh) == 1 else tuple(fresh)

    def gradients(
        self,
        given: Sequence[torch.Tensor],
        gradient: torch.Tensor,
        watch: AbstractContextManager[Any] | None = None,
    ) -> Any:
        """Gradients of the tensors from that of a single result; the backward runs in `watch`."""
        leaves = [t.requires_grad_(t.is_floating_point() or t.is_complex()) for t in given]
        wanted = [t for t in leaves if t.requires_grad]
        with torch.enable_grad():
            (made,) = self.call(tuple(leaves))
        if not wanted or not made.requires_grad:
            return ()
        if watch is not None and made.grad_fn is not None:
            _run_within(made.grad_fn, watch)
        return torch.autograd.grad(made, wanted, gradient, allow_unused=True)

    def remember(self, ctx: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        """Keep the arguments for the backward."""
        ctx.save_for_backward(*inputs)

    def backward(self, ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Gradients of the tensors, by the Function's own backward."""
        given = tuple(
            t.detach().requires_grad_(needed) if t.is_floating_point() or t.is_complex() else t
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )
        with torch.enable_grad():
            made = self.call(given)
        pairs = [
            (m, g) for m, g in zip(made, gradients, strict=True) if g is not None and m.requires_grad
        ]
        wanted = [t for t in given if t.requires_grad]
        if not pairs or not wanted:
            return tuple(None for _ in given)
        outputs, starts = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, starts, allow_unused=True))
        return tuple(next(found) if t.requires_grad else None for t in given)


def _kind(plain: Any) -> tuple[type, str]:
    return type(plain), repr(plain) if isinstance(plain, (float, complex)) else ""


def _run_within(node: torch.autograd.graph.Node, watch: AbstractContextManager[Any]) -> None:
    """Let a node of the tape run in a context."""

    def enter(_: Any) -> None:
        watch.__enter__()

    def leave(*_: Any) -> None:
        watch.__exit__(None, None, None)

    node.register_prehook(enter)
    node.register_hook(leave)


_known: dict[str, list[FunctionCall]] = {}


def operator_for(call: FunctionCall, namespace: str = FUNCTIONS) -> Any:
    """The torch operator of a call; equal calls share one."""
    label = "".join(
        c if c.isalnum() else "_" for c in f"{call.function.__module__}_{call.function.__qualname__}"
    )
    calls = _known.setdefault(label, [])
    number = next((i for i, known in enumerate(calls) if call.is_like(known)), len(calls))
    if number == len(calls):
        calls.append(call)
    name = f"{label}_{number}"
    inputs = ", ".join(f"Tensor x{i}" for i in range(len(call.tensors)))
    count = 1 if call.results is None else len(call.results)
    outputs = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    define_op(
        OpDefinition(
            name=f"{namespace}::{name}",
            schema=f"({inputs}) -> {outputs}",
            function=call.forward,
            fake=call.forward,
            backward=call.backward,
            setup_context=call.remember,
        )
    )
    return lookup_op(f"{namespace}.{name}.default")


@contextmanager
def functions_as_operators() -> Iterator[None]:
    """Within it, applying a Function of the user records an operator."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is checkpoint_module.CheckpointFunction:
            function, _preserve, *rest = args
            if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in rest):
                with torch.no_grad():  # as eager torch has it: no gradient comes back
                    return function(*rest)
            with run_again_later():
                return function(*rest)
        if cls.__module__.partition(".")[0] == "torch" or kwargs:
            return apply_function(cls, *args, **kwargs)
        return _record(cls, args)

    original = torch.autograd.Function.__dict__["apply"]
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _record(function: Any, args: tuple[Any, ...]) -> Any:
    leaves, spec = flatten(args)
    leaves = [uncounted(leaf) for leaf in leaves]
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    tensors = tuple(leaves[i] for i in places)
    if not tensors:
        return apply_function(function, *args)
    plain = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
    result = _probe(function, args, tensors)
    parts = result if isinstance(result, (tuple, list)) else (result,)
    kept = tuple(i for i, part in enumerate(parts) if isinstance(part, torch.Tensor))
    if not kept:
        return result
    single = isinstance(result, torch.Tensor)
    call = FunctionCall(function, spec, plain, places, None if single else kept)
    by_element = single and acts_by_element(call.forward, call.gradients, tensors, result)
    made = operator_for(call, ELEMENTWISE_FUNCTIONS if by_element else FUNCTIONS)(*tensors)
    if single:
        return made
    fresh = iter((made,) if len(kept) == 1 else made)
    return type(result)(next(fresh) if i in kept else part for i, part in enumerate(parts))


class _Watched(DispatchMode):  # type: ignore[misc]
    """Refuses ops that draw random numbers, or read weights that are no arguments."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_random(func):
            raise CaptureError(
                f"The autograd.Function {self.function.__qualname__} draws random numbers ({func}), "
                "which would depend on the plan. Draw them outside and pass them to it as a tensor."
            )
        if any(isinstance(x, nn.Parameter) and x.requires_grad for x in flatten((args, kwargs))[0]):
            raise CaptureError(
                f"The autograd.Function {self.function.__qualname__} reads weights that its arguments do "
                "not hold as tensors, but a module or a function; an operator would keep the values they "
                "have now. Compute with the tensors that are passed to it; to save memory, call "
                "torch.utils.checkpoint, or leave that to the plan."
            )
        return func(*args, **(kwargs or {}))


def _probe(function: Any, args: tuple[Any, ...], tensors: tuple[torch.Tensor, ...]) -> Any:
    """The Function's result, to see how many tensors it has; the ops recorded are dropped as dead."""
    versions = [writes_to(t) for t in tensors]
    leaves, spec = flatten(args)
    apart = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
    with torch.no_grad(), _Watched(function):
        result = apply_function(function, *unflatten(apart, spec))
    if any(writes_to(t) != v for t, v in zip(tensors, versions, strict=True)):
        raise CaptureError(
            f"The autograd.Function {function.__qualname__} changes its arguments in place, which a "
            "graph without side effects cannot hold. Let it return a new tensor instead."
        )
    return result
