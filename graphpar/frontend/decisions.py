"""Branches on the values in a tensor: the way the example batch takes, checked at every step.

torch.export stops at `if mask.any():`, for no static graph holds both ways. Where it does, the model is
run once on the example batch; each value that Python asks a tensor for (`bool`, `item`, ...) is noted
with its line, and the export is repeated with these answers. What makes that safe is an operator
`graphpar.expected` in the graph for each answer: it computes the value anew at every step and ends the
step with an error, which names the line, when it is another one than in the example batch.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphpar.errors import CaptureError
from graphpar.frontend.torch_private import flatten, unflatten
from graphpar.runtime.expected import expected

_ASKED: Mapping[str, Callable[[Any], Any]] = {
    "__bool__": bool, "__int__": int, "__index__": int, "__float__": float, "item": lambda value: value,
}  # fmt: skip
"""Methods by which Python asks a tensor for its value, and what they make of it."""
_SIZED = frozenset(
    """
    arange empty expand full interpolate narrow new_empty new_full new_ones new_zeros ones pad repeat
    reshape resize roll split tile unflatten upsample view zeros
    """.split()
)
"""Functions that take a tensor of one whole number for a size, and ask for its value inside of torch."""
_TORCH_ROOT = torch.__path__[0]


@dataclass(frozen=True)
class Decision:
    """What a line asked of a tensor in the example batch, and the answer."""

    place: str
    method: str
    value: bool | int | float


Decisions = Mapping[tuple[str, str], Sequence[Decision]]
"""Answers by line and method, in order of execution."""


class _Asked(TorchFunctionMode):
    """Sees every question for a value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ASKED and args and isinstance(args[0], torch.Tensor) and args[0].numel() == 1:
            return self.answer(name, args[0], lambda: func(*args, **(kwargs or {})))
        if name in _SIZED:
            args = (*args[:1], *(self._size(a) for a in args[1:]))
            kwargs = {key: self._size(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _size(self, argument: Any) -> Any:
        """An argument with tensors that are one whole number each, alone or in a sequence, as numbers."""
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._size(a) for a in argument) if argument else argument
        if isinstance(argument, torch.Tensor) and not argument.ndim and not argument.is_floating_point():
            if argument.dtype != torch.bool:
                return self.answer("item", argument, argument.item)
        return argument

    def answer(self, method: str, tensor: torch.Tensor, ask: Callable[[], Any]) -> Any:
        """The value to go on with."""
        raise NotImplementedError


class _Record(_Asked):
    """Notes the answers of real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[tuple[str, str], list[Decision]] = defaultdict(list)

    def answer(self, method: str, tensor: torch.Tensor, ask: Callable[[], Any]) -> Any:
        value = ask()
        place = _user_line()
        if isinstance(value, (bool, int, float)):
            self.made[place, method].append(Decision(place, method, value))
        return value


@dataclass
class Replay:
    """Gives the answers noted before, and collects the checks of them.

    Attributes:
        decisions: What to answer.
        checks: Results of the checking operators: zeros that must reach the result.
    """

    decisions: Decisions
    checks: list[torch.Tensor] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, questions are answered."""
        self.checks.clear()
        with _Answer({key: iter(made) for key, made in self.decisions.items()}, self.checks):
            yield

    def checked(self, result: Any) -> Any:
        """The result, made to depend on all checks so that none of them is left out."""
        if not self.checks:
            return result
        zero = torch.stack(self.checks).sum()
        leaves, spec = flatten(result)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.bool:
                leaves[place] = leaf + zero.to(leaf.dtype)
                return unflatten(leaves, spec)
        raise CaptureError(
            "The model branches on values, and returns no tensor of numbers that checks of them could be "
            "added to; return one."
        )


class _Answer(_Asked):
    """Answers as noted; a question that was not asked before is left to torch."""

    def __init__(
        self, answers: Mapping[tuple[str, str], Iterator[Decision]], checks: list[torch.Tensor]
    ) -> None:
        super().__init__()
        self._answers, self._checks = answers, checks

    def answer(self, method: str, tensor: torch.Tensor, ask: Callable[[], Any]) -> Any:
        noted = next(self._answers.get((_user_line(), method), iter(())), None)
        if noted is None:
            return ask()
        self._checks.append(expected(tensor.detach(), float(noted.value), noted.place))
        return _ASKED[method](noted.value)


def record_decisions(model: nn.Module, call: Callable[[], Any]) -> Decisions:
    """Run the model and note what it asks of tensors; the model is left as it was.

    Empty where there is nothing to ask (a model on the meta device has no values).
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type == "meta" for t in tensors):
        return {}
    before = [(b, b.detach().clone()) for b in model.buffers()]
    recorder = _Record()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), recorder:
            call()
    except Exception:
        return {}
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
    return dict(recorder.made)


def _user_line() -> str:
    """File and line of the innermost frame outside torch and this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(_TORCH_ROOT):
            return f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"
