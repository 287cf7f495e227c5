"""What torch.export cannot take, or would drop or freeze without a word, refused by name.

- Modules of torch.jit, lazy ones that have no shapes yet, tensors that are not dense or for inference
  alone.
- Arguments that are objects with tensors inside, such as a cache: a model may write to them.
  Modules, functions, generators, arrays.
- Gradient hooks: a graph keeps the forward; what a hook does to gradients would be lost.
- Weights of NaN are said.
- `torch.func.grad` and its like, which torch.export records with what they differentiate held constant.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from graphpar.errors import CaptureError
from graphpar.frontend.frames import blame, running
from graphpar.frontend.objects import plain_objects
from graphpar.frontend.torch_private import flatten, functional_gradients_call, has_gradient_hook

_log = logging.getLogger("graphpar.capture")
_NO_ARGUMENTS: tuple[tuple[Any, str], ...] = (
    (nn.Module, "make it a submodule of the model, so that its weights are the model's"),
    (np.ndarray, "torch.from_numpy(array)"),
    (PackedSequence, "give the padded tensor and the lengths, and let the model pack them"),
    (torch.Generator, "None, or leave it out: a job keys its numbers by Training(seed=)"),
    ((set, frozenset, Iterator), "a tuple or a list"),
    ((FunctionType, MethodType, BuiltinFunctionType), "keep the function in an attribute of the model"),
)
"""Kinds of arguments that torch.export refuses without a name, or takes and cannot follow."""


def refuse_trained_loss(model: nn.Module, loss: object) -> None:
    """
    Raises:
        CaptureError: The loss is a module with parameters of its own that require gradients.
    """
    if not isinstance(loss, nn.Module):
        return
    known = {id(parameter) for parameter in model.parameters()}
    own = [n for n, p in loss.named_parameters() if p.requires_grad and id(p) not in known]
    if own:
        raise CaptureError(
            f"Training(loss=...) has parameters of its own ({', '.join(own[:3])}), which no optimiser of "
            "the model's parameters trains. Make one module of model and loss, whose forward takes the "
            "target, too, and returns the loss, and leave loss= out; or freeze it: requires_grad_(False)."
        )


def refuse_unready(model: nn.Module) -> None:
    """
    Raises:
        CaptureError: A submodule was made by torch.jit, or a tensor has no shape yet, is not dense, or
            was made under torch.inference_mode; names it.
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
        if tensor.layout != torch.strided or tensor.is_quantized:
            form = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise CaptureError(
                f"Tensor {name!r} of the model is a {form} tensor, which cannot be cut or sent to "
                "workers. Build the model with dense tensors (to_dense(), dequantize())."
            )
        if tensor.is_inference():
            raise CaptureError(
                f"Tensor {name!r} of the model was made under torch.inference_mode(), for good: torch "
                "neither trains nor exports it. Build the model outside; graphpar may be called within."
            )


def warn_of_bad_weights(model: nn.Module) -> None:
    """Say so where weights hold NaN or infinity: all that follows will, too."""
    bad = [name for name, tensor in model.named_parameters() if not _is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - 3} others" if len(bad) > 3 else ""
        _log.warning("Weights hold NaN or infinity: %s%s; results will, too", ", ".join(bad[:3]), more)


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.is_floating_point() or is_lazy(tensor):
        return True
    flat = tensor.detach()
    # A sum takes a fraction of the time of looking at each number, but may overflow.
    return bool(torch.isfinite(flat.sum(dtype=torch.float64)) or torch.isfinite(flat).all())


def refuse_object_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        CaptureError: An argument is, or holds, what no graph can take; names it.
    """
    for name, value in (*((f"args[{i}]", a) for i, a in enumerate(args)), *kwargs.items()):
        for leaf in flatten(value, is_leaf=lambda x: isinstance(x, PackedSequence))[0]:
            for kinds, remedy in _NO_ARGUMENTS:
                if isinstance(leaf, kinds):
                    raise CaptureError(
                        f"Argument {name} is or contains a {type(leaf).__name__}, which a graph cannot "
                        f"take. What to try: {remedy}."
                    )
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
def no_tensor_hooks(model: nn.Module) -> Iterator[None]:
    """Within it, a model that registers a gradient hook on a value is refused."""

    def refuse(tensor: torch.Tensor, hook: Any) -> Any:
        raise CaptureError(_hook_text(f"A value of the model, at {blame(model, running())},"))

    names = ("register_hook", "register_post_accumulate_grad_hook")
    before = {name: getattr(torch.Tensor, name) for name in names}
    for name in names:
        setattr(torch.Tensor, name, refuse)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.Tensor, name, function)


@contextmanager
def no_functional_gradients(model: nn.Module) -> Iterator[None]:
    """Within it, a model that calls `torch.func.grad` and its like is refused.

    torch.export takes what they differentiate for a constant, and says nothing.
    """

    def refuse() -> None:
        raise CaptureError(
            f"The model differentiates a function with torch.func (grad, vjp, jvp, jacrev, ...) at "
            f"{blame(model, running())}, which torch.export does not record. Call torch.autograd.grad "
            "there: g, = torch.autograd.grad(f(x).sum(), x, create_graph=True), with x such that "
            "x.requires_grad."
        )

    with functional_gradients_call(refuse):
        yield
