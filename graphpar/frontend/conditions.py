"""For which numbers of samples a graph holds: what a model's own code asks of them, and where it cuts.

Two exports at unlike batch sizes show what scales with the batch. A branch that goes the same way at
both (`if len(x) > 64`), and a part that is all of both (`x[:64]`), they do not show. So sizes that are
multiples of the number of samples are handed to the model's code as integers that remember it, and
each comparison of them is noted. A batch for which one would come out otherwise is captured on its own.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Number
from types import FrameType, ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from graphpar.frontend.frames import is_users
from graphpar.frontend.torch_private import min_and_max_of_export
from graphpar.ir.ops import BatchSize, Dim, Op
from graphpar.ir.optable import packet

_READS = (
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.numel,
)
_EXPORTS_OWN = min_and_max_of_export()
_UNBOUNDED = 2**31
"""Slices that end here or later end nowhere."""
_Formula = Callable[[int], Any]


@dataclass(frozen=True)
class Condition:
    """What came out of a comparison in the example batch, and does for another number of samples.

    Attributes:
        text: The comparison, with `samples` for their number, and the user's line.
        answer: How it came out.
        formula: How it comes out for a number of samples.
    """

    text: str
    answer: bool
    formula: _Formula

    def holds(self, samples: int) -> bool:
        """Whether it comes out alike for so many samples."""
        try:
            return bool(self.formula(samples)) == self.answer
        except (ArithmeticError, ValueError):
            return False


@dataclass
class Asked:
    """The comparisons of one export at a number of samples, by line and text."""

    batch: int
    made: dict[str, Condition] = field(default_factory=dict)

    def note(self, text: str, formula: _Formula) -> None:
        """A comparison that led here; nothing where that is not the user's code."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename in (__file__, _EXPORTS_OWN):
            frame = frame.f_back  # export has a `min` and a `max` of its own
        if frame is None or not is_users(frame.f_code.co_filename):
            return
        text = f"{text} at {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        if text not in self.made:
            self.made[text] = Condition(text, bool(formula(self.batch)), formula)


_ASKED: ContextVar[Asked | None] = ContextVar("ASKED", default=None)


class Count(int):
    """A multiple of the number of samples, or what whole arithmetic makes of one."""

    text: str
    formula: _Formula
    asked: Asked

    @classmethod
    def of(cls, value: int, text: str, formula: _Formula, asked: Asked) -> "Count":
        """A number that remembers how it follows from the number of samples."""
        made = cls(value)
        made.text, made.formula, made.asked = text, formula, asked
        return made

    def made(self, value: Any, text: str, formula: _Formula) -> Any:
        """What was made of it; a number that cannot remember has to be what it is here."""
        if type(value) is int and not text.startswith(("int(", "hash(")):
            return Count.of(value, text, formula, self.asked)
        self.asked.note(f"{text} as here", lambda n: bool(formula(n) == value))
        return value

    def __bool__(self) -> bool:
        self.asked.note(f"{self.text} != 0", self.formula)
        return bool(int.__int__(self))

    def __reduce__(self) -> Any:
        return int, (uncounted(self),)


def _formula(value: Any) -> tuple[str, _Formula]:
    return (value.text, value.formula) if isinstance(value, Count) else (repr(value), lambda n: value)


def _arithmetic(function: Callable[[Any, Any], Any], sign: str) -> Any:
    def straight(self: Count, other: Any, *modulo: Any) -> Any:
        return _power(self, other, *modulo) if modulo else made(self, other, self)

    def reflected(self: Count, other: Any) -> Any:
        return made(other, self, self)

    def made(a: Any, b: Any, of: Count) -> Any:
        value = function(uncounted(a), uncounted(b))
        if not (isinstance(a, Number) and isinstance(b, Number)):
            return value
        (left, f), (right, g) = _formula(a), _formula(b)
        return of.made(value, f"({left} {sign} {right})", lambda n: function(f(n), g(n)))

    return straight, reflected


def _method(function: Callable[..., Any]) -> Any:
    def called(self: Count, *others: Any) -> Any:
        texts, formulas = zip(*map(_formula, (self, *others)), strict=True)
        value = function(*map(uncounted, (self, *others)))
        text = f"{function.__name__.strip('_')}({', '.join(texts)})"
        return self.made(value, text, lambda n: function(*(formula(n) for formula in formulas)))

    return called


_power = _method(pow)


def _comparison(function: Callable[[Any, Any], Any], sign: str) -> Any:
    def compared(self: Count, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        text, formula = _formula(other)
        self.asked.note(f"{self.text} {sign} {text}", lambda n: function(self.formula(n), formula(n)))
        return function(uncounted(self), uncounted(other))

    return compared


_SIGNS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "add": (operator.add, "+"),
    "sub": (operator.sub, "-"),
    "mul": (operator.mul, "*"),
    "truediv": (operator.truediv, "/"),
    "floordiv": (operator.floordiv, "//"),
    "mod": (operator.mod, "%"),
    "divmod": (divmod, "divmod"),
    "pow": (operator.pow, "**"),
    "lshift": (operator.lshift, "<<"),
    "rshift": (operator.rshift, ">>"),
    "and": (operator.and_, "&"),
    "or": (operator.or_, "|"),
    "xor": (operator.xor, "^"),
}
for _name, (_function, _sign) in _SIGNS.items():
    _straight, _reflected = _arithmetic(_function, _sign)
    setattr(Count, f"__{_name}__", _straight)
    setattr(Count, f"__r{_name}__", _reflected)
for _name in ("neg", "abs", "invert", "float", "int", "hash", "round", "ceil", "floor", "trunc"):
    setattr(Count, f"__{_name}__", _method(getattr(int, f"__{_name}__")))
for _name, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    setattr(Count, f"__{_name}__", _comparison(getattr(operator, _name), _sign))


class _Sizes(TorchFunctionMode):
    """Hands out sizes that are multiples of the number of samples as such."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self._asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _READS or not is_users(sys._getframe(1).f_code.co_filename):
            return made
        if isinstance(made, torch.Size):
            return torch.Size([self._count(size) for size in made])
        if isinstance(made, tuple):
            return tuple(map(self._count, made))
        return self._count(made)

    def _count(self, size: Any) -> Any:
        return _counted(size, self._asked)


def _counted(size: Any, asked: Asked) -> Any:
    """A size as one that remembers, where it is a multiple of the number of samples."""
    if type(size) is not int or not size or size % asked.batch:
        return size
    times = size // asked.batch
    text = "samples" if times == 1 else f"(samples * {times})"
    return Count.of(size, text, lambda n: times * n, asked)


@contextmanager
def lengths_counted(modules: Sequence[ModuleType]) -> Iterator[None]:
    """Within it, `len(tensor)` in these modules remembers as well; Python makes it a plain integer."""

    def counted(held: Any) -> int:
        asked = _ASKED.get()
        if asked is None or not isinstance(held, torch.Tensor):
            return len(held)
        made: int = _counted(len(held), asked)
        return made

    with ExitStack() as stack:
        for module in modules:
            if "len" not in vars(module):
                stack.callback(vars(module).pop, "len", None)
                vars(module)["len"] = counted
        yield


@contextmanager
def noted(batch: int) -> Iterator[Asked]:
    """Within it, exports note what the model's code asks of the number of samples."""
    asked = Asked(batch)
    before = _ASKED.set(asked)
    try:
        yield asked
    finally:
        _ASKED.reset(before)


@contextmanager
def sizes_counted() -> Iterator[None]:
    """Around the model's own code, innermost: what it reads of sizes is noted, where that is wanted."""
    asked = _ASKED.get()
    if asked is None:
        yield
        return
    with _Sizes(asked):
        yield


def uncounted(value: Any) -> Any:
    """A plain integer in the place of one that remembers, anything else as it is."""
    return int.__int__(value) if isinstance(value, Count) else value


def conditions(first: Asked, second: Asked, ops: Sequence[Op]) -> tuple[Condition, ...]:
    """What must hold for a graph made of two exports to be that of another number of samples.

    Only lines that asked in both count: other sizes are multiples of one number of samples by accident.
    There, one text may differ from the other by such a size, and either may be the right one.
    """
    lines = {text.rpartition(" at ")[2] for text in first.made}
    kept = [c for text, c in first.made.items() if text in second.made]
    for text, condition in second.made.items():
        if (
            text not in first.made
            and text.rpartition(" at ")[2] in lines
            and condition.holds(first.batch)
        ):
            kept.append(condition)
    return (*kept, *_bounds(ops))


def _bounds(ops: Sequence[Op]) -> Iterator[Condition]:
    """Parts of the batch that are all of it up to some number of samples, or as many from one on."""
    types = {op.name: op.types for op in ops}
    for op in ops:
        kind = packet(op)
        if (kind == "split" and len(op.types) > 1) or kind not in ("slice", "split"):
            continue
        dim = op.argument(2 if kind == "split" else 1, "dim", 0)
        (whole, *_), (part, *_) = types[op.operands()[0]], op.types
        if whole is None or part is None or not isinstance(dim, int):
            continue
        size, left = whole.shape[dim], part.shape[dim]
        if isinstance(size, BatchSize):
            yield from (_bound(op, size.times, cut, left) for cut in _cuts(op, kind))


def _cuts(op: Op, kind: str) -> Iterator[int]:
    """How many rows from the start, or from the end, an op takes at most."""
    if kind == "split":
        cuts = [op.argument(1, "split_size")]
    else:
        start = op.argument(2, "start")
        cuts = [op.argument(3, "end"), -start if isinstance(start, int) else None]
    yield from (cut for cut in cuts if type(cut) is int and 0 < cut < _UNBOUNDED)


def _bound(op: Op, times: int, cut: int, left: Dim) -> Condition:
    sign, holds = ("<=", operator.le) if isinstance(left, BatchSize) else (">=", operator.ge)
    rows = f"{times} * samples" if times > 1 else "samples"
    return Condition(
        f"{rows} {sign} {cut} ({op.target}) at {op.source}", True, lambda n: holds(times * n, cut)
    )
