"""What torch.export cannot take, or would drop or freeze without a word, refused by name.

- Modules of torch.jit, and lazy ones that have no shapes yet.
- Arguments that are objects with tensors inside, such as a cache: a model may write to them.
- Plain numbers that a module changes at every call: the graph would keep one value.
- Gradient hooks: a graph keeps the forward; what a hook does to gradients would be lost.
- Numbers drawn by NumPy or Python's `random` while the model runs: they would stand in the graph as
  constants, the same at every step.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphpar.errors import CaptureError
from graphpar.frontend.objects import plain_objects
from graphpar.frontend.torch_private import has_gradient_hook


def refuse_unready(model: nn.Module) -> None:
    """
    Raises:
        CaptureError: A submodule was made by torch.jit, or a tensor has no shape yet; names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"Module {name or '(top)'!r} was made by torch.jit, which torch.export cannot follow. "
                "Give the module it was made from."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(
                f"Tensor {name!r} of the model is lazy and has no shape yet. Call the model once on a "
                "batch before giving it to graphpar."
            )


def refuse_object_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        CaptureError: An argument is a plain object that holds tensors; names it.
    """
    for name, value in (*((f"number {i}", a) for i, a in enumerate(args)), *kwargs.items()):
        for found in plain_objects(value):
            raise CaptureError(
                f"Argument {name} is or contains a {type(found).__name__}, an object that holds tensors. "
                "A model may write to it, which a graph cannot show. Call the model without it, or wrap "
                "the model in a module that takes the tensors and makes the object itself."
            )


def refuse_gradient_hooks(model: nn.Module) -> None:
    """
    Raises:
        CaptureError: A parameter or a submodule has a hook on its gradient; names it.
    """
    for name, parameter in model.named_parameters():
        if has_gradient_hook(parameter):
            raise CaptureError(_hook_text(f"Parameter {name!r}"))
    for name, module in model.named_modules():
        if has_gradient_hook(module):
            raise CaptureError(_hook_text(f"Module {name or '(top)'!r} ({type(module).__name__})"))


def _hook_text(what: str) -> str:
    return (
        f"{what} has a hook on its gradient, which a captured graph would silently leave out. Remove the "
        "hook, or say what it does in an autograd.Function that the model applies: those are kept."
    )


@contextmanager
def no_tensor_hooks() -> Iterator[None]:
    """Within it, a model that registers a gradient hook on a value is refused."""

    def refuse(tensor: torch.Tensor, hook: Any) -> Any:
        raise CaptureError(_hook_text("A value of the model"))

    names = ("register_hook", "register_post_accumulate_grad_hook")
    before = {name: getattr(torch.Tensor, name) for name in names}
    for name in names:
        setattr(torch.Tensor, name, refuse)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.Tensor, name, function)


def host_state() -> tuple[Any, ...]:
    """Where the host's global random streams stand."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy_state["state"]["pos"], bytes(numpy_state["state"]["key"][:4])


_log = logging.getLogger("graphpar.capture")

Numbers = dict[tuple[str, str], float]
"""Plain numbers that modules keep as attributes, by module and attribute."""


def numbers_of(model: nn.Module) -> Numbers:
    """The plain numbers of a model and its submodules."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def moved_numbers(model: nn.Module, before: Numbers) -> set[tuple[str, str]]:
    """Which numbers are others than before; new ones do not count."""
    return {key for key, value in numbers_of(model).items() if before.get(key, value) != value}


def refuse_counters(
    model: nn.Module,
    moved: set[tuple[str, str]],
    call: Callable[[], Any],
    graph: Callable[[], str],
) -> None:
    """Refuse a model whose result depends on a number that it changes at every call.

    A number that depends on the inputs alone, such as a remembered length, stands still when the model is
    called again with the same; so it is called twice. One that only counts does not show in the graph.

    Args:
        model: The model.
        moved: The numbers that one call changed.
        call: Calls the model.
        graph: The text of its graph at the numbers it has.

    Raises:
        CaptureError: Names the module and the attribute.
    """
    if not moved:
        return
    seen: list[Numbers] = [numbers_of(model)]
    try:
        with left_as_it_was(model):
            for _ in range(2):
                call()
                seen.append(numbers_of(model))
    except Exception as error:
        _log.warning("Whether %s change at every call could not be tried: %s", sorted(moved), error)
        return
    counters = [key for key in sorted(moved) if seen[1].get(key) != seen[2].get(key)]
    before = graph() if counters else ""
    for path, name in counters:
        module = model.get_submodule(path)
        values = [numbers.get((path, name)) for numbers in seen]
        with left_as_it_was(model):
            setattr(module, name, values[1])
            if graph() == before:
                continue
        raise CaptureError(
            f"Module {path or '(top)'!r} ({type(module).__name__}) changes its attribute {name!r} at "
            f"every call ({', '.join(map(repr, values))}, ...), and its result depends on it; a graph "
            f"would keep one value. Keep the number in a buffer (self.register_buffer({name!r}, "
            "torch.tensor(...))) and change it in place."
        )


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Calls within it leave no trace in buffers, plain numbers and torch's random state."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    numbers = numbers_of(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for (path, name), number in numbers.items():
            setattr(model.get_submodule(path), name, number)


def host_randomness(model: nn.Module, call: Callable[[], Any]) -> CaptureError:
    """The error for a model that drew on the host: names the innermost module that does so."""
    culprits: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    entered: list[tuple[Any, ...]] = []

    def before(module: nn.Module, args: Any) -> None:
        entered.append(host_state())

    def after(module: nn.Module, args: Any, result: Any) -> None:
        if entered and entered.pop() != host_state() and id(module) in names and not culprits:
            culprits.append(f"{names[id(module)] or '(top)'!r} ({type(module).__name__})")

    handles = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        with torch.no_grad():
            call()
    except Exception:
        culprits = culprits[:1]
    finally:
        for handle in handles:
            handle.remove()
    return CaptureError(
        f"Module {culprits[0] if culprits else '(unknown)'} draws random numbers with NumPy or Python's "
        "random while it runs; a captured graph would hold the same numbers at every step. Switch it off "
        "(in transformers' configurations: mask_time_prob, mask_feature_prob, layerdrop = 0), or draw "
        "with torch.rand and pass what must be drawn elsewhere as an input."
    )
