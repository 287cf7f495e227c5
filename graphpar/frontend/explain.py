"""Failures of torch.export as errors that say where in the user's code, why, and what to try."""

import re

from torch import nn

from graphpar.frontend.frames import blame, raised_at

ON_VALUES = (
    r"data.dependent|depends on the data|GuardOnDataDependent|unbacked|Could not extract specialized"
    r"|item\(\)|_local_scalar"
)
"""What errors of torch.export say where Python asks a tensor for its value."""

OWN_GENERATOR = (
    "it draws from a torch.Generator of its own, with numbers that would depend on the plan",
    "leave generator= out (a job keys its numbers by Training(seed=)), or draw in __init__",
)

_ADVICE = (
    (r"argument of type: <class 'torch._C.Generator'>", *OWN_GENERATOR),  # torch 2.11
    (r"random operation while in randomness error mode",
     "random numbers are drawn inside torch.vmap, which has not been told how",
     "torch.vmap(..., randomness='different') for numbers of each sample's own, or 'same' for equal"),
    (r"vmap|batching rule|batching operators",
     "it is called inside torch.vmap and has no batched form there",
     "write the batch as a dimension of the tensors instead of using torch.vmap"),
    (ON_VALUES,
     "the control flow or a shape depends on the values in a tensor, which no static graph can hold",
     "compute both branches and choose with torch.where, or use a fixed size with a mask"),
    (r"fake tensor in the exported program constant",
     "it computes with a tensor of which torch.export does not see how it is made, most often because "
     "torch.autograd.grad looks into layers there for what they keep",
     "write the derivative out with the layers' weights (of b(tanh(a(x))): ((1 - h * h) * b.weight) @ "
     "a.weight), or compute the tensor with torch's operators"),
    (r"Found <class '[\w.]*generator'> in output",
     "the model returns a generator, of which nobody can tell what it holds",
     "return a tuple or a list of what it yields"),
    (r"Found <class .*> in output",
     "the model returns an object of a type that torch does not know",
     "return tensors, or tuples, lists, dicts or dataclasses of them"),
    (r"Unsupported.*(?:input|type)|Unsupported input",
     "an argument has a type that torch.export does not know",
     "pass tensors, numbers, strings, or nested tuples, lists and dicts of them"),
    (r"\.numpy\(\) is not supported|__array__|can't convert .* to numpy",
     "a tensor is handed to NumPy there, which leaves no trace in a graph",
     "compute it with torch, or make the function an operator with torch.library.custom_op"),
    (r"not linked with support for|not compiled with|No (?:CUDA|HIP) GPUs|Invalid device|Found no NVIDIA",
     "it asks for a device that this machine does not have",
     "make tensors on the device of the input (device=x.device); the plan decides where things run"),
    (r"device meta|Cannot copy out of meta|DeviceMismatch|on the same device|different devices",
     "part of the model or of its inputs lives on another device than the rest",
     "build model and example inputs on the same device"),
    (r"missing \d+ required|unexpected keyword|takes \d+ positional",
     "the example arguments do not match the model's forward signature",
     "pass the example batch as args=(...) and kwargs={...} exactly as you would call the model; a "
     "target that the model does not take goes last in args, and Training(loss=...) takes it"),
    (r"shapes? cannot be multiplied|same reduction dim|size mismatch|must match the size|Expected.*dim",
     "the example batch does not fit the model",
     "run model(*args, **kwargs) once on its own; it should fail at the same line"),
)  # fmt: skip


def explain_failure(model: nn.Module, error: BaseException, eager: BaseException | None = None) -> str:
    """What failed, in which of the user's modules, at which line, why, and what to try.

    Args:
        model: The model.
        error: What torch.export raised.
        eager: What the model raises when it is simply called, if it does.
    """
    cause = eager or error
    text = f"{type(cause).__name__}: {cause}"
    first_line = next((line for line in str(cause).splitlines() if line.strip()), "")
    why, remedy = "torch.export cannot follow it", "see the message of torch.export below"
    if eager is not None:
        why = "the model itself fails on the example batch"
        remedy = "run model(*args, **kwargs) once on its own; it fails at the same line"
    for pattern, reason, advice in _ADVICE:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            why, remedy = reason, advice
            break
    teller = "torch" if eager is None else "its own error"
    return (
        f"The model could not be captured at {blame(model, raised_at(cause))}: {why}. What to try: "
        f"{remedy}. ({teller}: {type(cause).__name__}: {first_line[:300]})"
    )
