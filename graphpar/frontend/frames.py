"""Which of the user's modules and lines is being run, told from a stack or from a traceback."""

import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import nn

_STDLIB = sysconfig.get_path("stdlib")
_OWN = os.path.dirname(os.path.dirname(__file__))
_EXAMPLES = os.path.join(_OWN, "examples")


@cache
def is_users(filename: str) -> bool:
    """Whether a file is neither torch's, nor Python's, nor graphpar's own, nor code made on the fly.

    >>> is_users(torch.__file__), is_users(os.__file__), is_users("<string>"), is_users("model.py")
    (False, False, False, True)
    """
    if filename.startswith((torch.__path__[0], "<")):
        return False
    if filename.startswith(_OWN):
        return filename.startswith(_EXAMPLES)
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def blame(model: nn.Module, frames: Iterable[tuple[FrameType, int]]) -> str:
    """The innermost of the model's modules among frames, and the user's line it was at.

    Args:
        model: The model whose modules count.
        frames: Frames and lines from the outermost to the innermost.
    """
    names = {id(module): name for name, module in model.named_modules()}
    path, kind, line = "", type(model).__name__, ""
    for frame, number in frames:
        if not is_users(frame.f_code.co_filename):
            continue
        module = _first_argument(frame)
        if isinstance(module, nn.Module) and id(module) in names:
            path, kind = names[id(module)], type(module).__name__
        line = f"{frame.f_code.co_filename}:{number}"
    return f"module {path or '(top)'!r} ({kind}), {line or _definition(model)}"


def raised_at(error: BaseException) -> Iterable[tuple[FrameType, int]]:
    """The frames of a traceback, from the outermost to where it was raised."""
    return list(traceback.walk_tb(error.__traceback__))


def being_built(error: BaseException) -> str:
    """Which modules' constructors were running when an error was raised, and the user's line it was at.

    A module has no path before its parent has it; its place is told by the classes around it.
    """
    classes: list[str] = []
    line, constructor = "", ""
    for frame, number in raised_at(error):
        if not is_users(frame.f_code.co_filename):
            continue
        line = f"{frame.f_code.co_filename}:{number}"
        module = _first_argument(frame)
        if frame.f_code.co_name == "__init__" and isinstance(module, nn.Module):
            constructor = line
            if type(module).__name__ not in classes[-1:]:
                classes.append(type(module).__name__)
    within = f" in {' > '.join(classes)}" if classes else ""
    return f"{within} at {constructor or line}" if line else within


def running() -> list[tuple[FrameType, int]]:
    """The frames of the caller's stack from the outermost on."""
    return list(traceback.walk_stack(sys._getframe(1)))[::-1]


def called_by_user() -> bool:
    """Whether the function that calls this stands in for one that the user's own code called."""
    return is_users(sys._getframe(2).f_code.co_filename)


def users_line() -> str:
    """File and line of the innermost frame of the user's code."""
    return next((f"{name.rpartition('/')[2]}:{line}" for name, line in _users()), "an unknown line")


def _users() -> Iterator[tuple[str, int]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _definition(model: nn.Module) -> str:
    """Where the model's forward begins."""
    code = getattr(type(model).forward, "__code__", None)
    return "an unknown line" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
