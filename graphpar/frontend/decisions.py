"""Branches on the values in a tensor: the way the example batch takes, checked at every step.

torch.export stops at `if mask.any():`, for no static graph holds both ways. Where it does, the model is
run once on the example batch; each value that Python asks a tensor for (`bool`, `item`, `tolist`, ...) is
noted with its line, and the export is repeated with these answers. What makes that safe is an operator
`graphpar.expected` in the graph for each answer: it computes the value anew at every step and ends the
step with an error, which names the line, when it is another one than in the example batch.

Shapes that depend on values are answered in the same way: `x[mask]` and `nonzero` have as many results as
in the example batch, and the count is checked. Where the places serve only to write one number to all of
them (`x[torch.where(mask)] = 0`), their count does not matter: they are written through the mask.
Nor does it where `labels.masked_select(mask)` are the targets of a CTC loss: they are put in rows.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphpar.errors import CaptureError
from graphpar.frontend.frames import users_line
from graphpar.frontend.gaussian import gaussian_losses
from graphpar.frontend.state import left_as_it_was
from graphpar.frontend.torch_private import flatten, memory_of, unflatten, writes_to
from graphpar.runtime.ctc import ctc_losses
from graphpar.runtime.expected import expected


def _as_it_is(value: Any) -> Any:
    return value


_ASKED: Mapping[str, Callable[[Any], Any]] = {
    "__bool__": bool, "__int__": int, "__index__": int, "__float__": float, "item": _as_it_is,
}  # fmt: skip
"""Methods by which Python asks a tensor for its value, and what they make of it."""
_SIZED = frozenset(
    """
    arange empty expand full interpolate narrow new_empty new_full new_ones new_zeros ones pad repeat
    reshape resize roll split tile unflatten upsample view zeros
    """.split()
)
"""Functions that take a tensor of one whole number for a size, and ask for its value inside of torch."""
_MADE = frozenset({"arange", "empty", "full", "ones", "zeros"})
"""Those among them of which the first argument is a size, too."""


@dataclass(frozen=True)
class Decision:
    """What a line asked of a tensor in the example batch, and the answer."""

    place: str
    method: str
    value: bool | int | float


Decisions = Mapping[tuple[str, str], Sequence[Decision]]
"""Answers by line and method, in order of execution."""


@dataclass(eq=False)
class _Places:
    """Places found by `torch.where(mask)`, and the check of their number until it is needed.

    Or what `values.masked_select(mask)` gave, in the place of places.
    """

    places: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    checks: list[torch.Tensor]
    values: torch.Tensor | None = None
    written: bool = False


def _count(found: Sequence[_Places], leaves: Sequence[Any], checks: list[torch.Tensor]) -> None:
    """Check the number of those places that are among some values."""
    used = {id(leaf) for leaf in leaves}
    for made in found:
        if made.checks and any(id(place) in used for place in made.places):
            checks += made.checks
            made.checks.clear()


class _Asked(TorchFunctionMode):
    """Sees every question for a value."""

    def __init__(self, checks: list[torch.Tensor], found: list["_Places"]) -> None:
        super().__init__()
        self._checks, self._found = checks, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "__setitem__" and (mask := self._mask_of(args[1], args[2])) is not None:
            behind = [1] * (args[0].ndim - mask.ndim)
            args[0].masked_fill_(mask.reshape(*mask.shape, *behind), args[2])
            return None
        if name == "gaussian_nll_loss":
            negative = torch.any(torch.as_tensor(args[2] if len(args) > 2 else kwargs["var"]) < 0)
            if not self.answer("__bool__", negative, lambda: bool(negative)):
                return gaussian_losses(*args, **kwargs)
        if name == "ctc_loss" and (losses := self._ctc_loss(*args, **kwargs)) is not None:
            return losses
        if self._found:
            _count(self._found, flatten((args, kwargs))[0], self._checks)
        if name in _SIZED:
            args = tuple(a if a is first and name not in _MADE else self._size(a) for a in args)
            kwargs = {key: self._size(value) for key, value in kwargs.items()}
        if first is None:
            return func(*args, **kwargs)
        if name in _ASKED and first.numel() == 1:
            return self.answer(name, first, lambda: func(*args, **kwargs))
        if name == "tolist":
            return self._list(first)
        if name == "__format__" and not first.ndim:
            return format(self.answer("item", first, first.item), *args[1:])
        if name == "equal" and len(args) == 2 and first.shape == args[1].shape:
            return self.answer("equal", (first == args[1]).all(), lambda: func(*args, **kwargs))
        if name in ("nonzero", "argwhere") or (name == "where" and len(args) == 1 and not kwargs):
            if name == "where" or kwargs.get("as_tuple"):
                return self._places(first)
            return self._nonzero(first)
        if name in ("__getitem__", "__setitem__"):
            args = (first, self._index(args[1], name == "__getitem__"), *args[2:])
        if name == "masked_select" and len(args) == 2:
            mask = args[1].expand_as(first) if first.ndim >= args[1].ndim else args[1]
            value = first.expand_as(mask)
            return self._selected(value, mask)
        if name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            if args[1].numel() > 1 and kwargs.get("output_size") is None:
                total = args[1].sum()
                kwargs["output_size"] = self.answer("item", total, total.item)
        return func(*args, **kwargs)

    def _list(self, tensor: torch.Tensor) -> Any:
        """`tolist`, asked number by number."""
        if not tensor.ndim:
            return self.answer("item", tensor, tensor.item)
        return [self._list(part) for part in tensor.unbind(0)]

    def _nonzero(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where a tensor is not zero, as many places as in the example batch."""
        count = tensor.count_nonzero()
        return torch.nonzero_static(tensor, size=int(self.answer("nonzero", count, count.item)))

    def _places(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Where a tensor is not zero, by dimension; their number is checked once they are used."""
        before = len(self._checks)
        places = self._nonzero(tensor).unbind(1)
        made = _Places(places, tensor != 0, self._checks[before:])
        del self._checks[before:]
        self._found.append(made)
        return places

    def _selected(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The values that a mask chooses; their number is checked once they are used."""
        before = len(self._checks)
        chosen = values[self._nonzero(mask).unbind(1)]
        self._found.append(_Places((chosen,), mask, self._checks[before:], values))
        del self._checks[before:]
        return chosen

    def _ctc_loss(
        self,
        log_probs: torch.Tensor,
        targets: torch.Tensor,
        input_lengths: Any,
        target_lengths: Any,
        blank: int = 0,
        reduction: str | int = "mean",
        zero_infinity: bool = False,
    ) -> torch.Tensor | None:
        """The loss by an operator of static shapes; None where torch's own has to do."""
        lengths = input_lengths, target_lengths
        if log_probs.ndim != 3 or not all(isinstance(n, torch.Tensor) for n in lengths):
            return None
        if reduction not in ("none", "mean", "sum", 0, 1, 2):
            return None  # torch's own names the mistake
        rows = targets if targets.ndim == 2 else self._rows(targets, target_lengths)
        if rows is None:
            return None
        losses: torch.Tensor = ctc_losses(
            log_probs, rows, input_lengths, target_lengths, blank, zero_infinity
        )
        if reduction in ("mean", 1):
            mean: torch.Tensor = (losses / target_lengths.clamp_min(1)).mean()
            return mean
        return losses.sum() if reduction in ("sum", 2) else losses

    def _rows(self, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor | None:
        """Targets that a mask chose, one row for each sample, with what was not chosen behind them."""
        for made in self._found:
            if made.values is None or made.places[0] is not targets or made.mask.ndim != 2:
                continue
            agree = (made.mask.sum(1) == lengths).all()
            if self.answer("__bool__", agree, partial(bool, agree)):
                made.written = True
                order = torch.argsort((~made.mask).to(torch.int8), dim=1, stable=True)
                return made.values.gather(1, order).clamp_min(0)
        return None

    def _mask_of(self, index: Any, value: Any) -> torch.Tensor | None:
        """The mask that an index was found with, where one number is written to all its places."""
        index = index if isinstance(index, tuple) else (index,)
        if not isinstance(value, (bool, int, float)):
            return None
        for made in self._found:
            if (
                made.values is None
                and len(index) == len(made.places)
                and all(map(operator.is_, index, made.places))
            ):
                made.written = True
                return made.mask
        return None

    def _index(self, index: Any, read: bool) -> Any:
        """An index of which torch asks no values: no tensors as bounds, or one by one in a tuple.

        Where it is read, also without masks, but with the places that they choose.
        """
        parts = index if isinstance(index, tuple) else (index,)
        plain = tuple(self._unasked(part) for part in parts)
        if read and any(_is_mask(part) for part in plain):
            plain = tuple(
                place
                for part in plain
                for place in (self._nonzero(part).unbind(1) if _is_mask(part) else (part,))
            )
        elif all(map(operator.is_, plain, parts)):
            return index
        return plain if isinstance(index, tuple) or len(plain) != 1 else plain[0]

    def _unasked(self, part: Any) -> Any:
        """A part of an index with its bounds as numbers, and numbers in a row as one tensor."""
        if isinstance(part, slice):
            bounds = part.start, part.stop, part.step
            sizes = tuple(self._size(bound) for bound in bounds)
            return part if all(map(operator.is_, bounds, sizes)) else slice(*sizes)
        if isinstance(part, (list, tuple)) and part and all(_is_number(n) for n in part):
            return torch.stack(list(part))
        return part

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


@contextmanager
def data_followed() -> Iterator[None]:
    """Within it, torch.export sees `x.data`, as `x.detach()`, and `x.data = y`, as a write in place."""
    given: list[tuple[torch.Tensor, int, str]] = []

    def give(tensor: torch.Tensor, value: torch.Tensor) -> None:
        if _give_data(tensor, value):
            given.append((value, writes_to(value), users_line()))

    torch.Tensor.data = property(torch.Tensor.detach, give)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data
    for value, writes, line in given:
        if writes_to(value) != writes:
            raise CaptureError(
                f"The model writes in place to what it gave a tensor as data at {line} (`.data = ...`), "
                "which changes both in eager; a graph holds a copy. Write before, or to a clone."
            )


def _give_data(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """`tensor.data = value`, as a write in place; nothing, and False, where the value lies there already.

    Memory that other values see as well stays as it was in eager, and would be written to here.
    """
    same_memory = memory_of(value) == memory_of(tensor)
    if same_memory and _layout(value) == _layout(tensor):
        return False
    if value.shape != tensor.shape or value.dtype != tensor.dtype or same_memory or tensor._is_view():
        raise CaptureError(
            f"A tensor of the model is given data of another shape or type, or in place of a view, at "
            f"{users_line()} (`.data = ...`), which a graph cannot hold. Make a new tensor instead."
        )
    with torch.no_grad():
        tensor.copy_(value)
    return True


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _is_number(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and not part.ndim and part.dtype in (torch.int32, torch.int64)


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.ndim > 0


class _Record(_Asked):
    """Notes the answers of real tensors."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.made: dict[tuple[str, str], list[Decision]] = defaultdict(list)

    def answer(self, method: str, tensor: torch.Tensor, ask: Callable[[], Any]) -> Any:
        value = ask()
        place = users_line()
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
    _found: list[_Places] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, questions are answered."""
        self.checks.clear()
        self._found.clear()
        answers = {key: iter(made) for key, made in self.decisions.items()}
        with _Answer(answers, self.checks, self._found):
            yield

    def checked(self, result: Any) -> Any:
        """The result, made to depend on all checks so that none of them is left out."""
        leaves, spec = flatten(result)
        unused = [place for made in self._found if not made.written for place in made.places]
        _count(self._found, [*leaves, *unused], self.checks)
        self._found.clear()
        if not self.checks:
            return result
        zero = torch.stack(self.checks).sum()
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
        self,
        answers: Mapping[tuple[str, str], Iterator[Decision]],
        checks: list[torch.Tensor],
        found: list[_Places],
    ) -> None:
        super().__init__(checks, found)
        self._answers = answers

    def answer(self, method: str, tensor: torch.Tensor, ask: Callable[[], Any]) -> Any:
        noted = next(self._answers.get((users_line(), method), iter(())), None)
        if noted is None:
            return ask()
        self._checks.append(expected(tensor.detach(), float(noted.value), noted.place))
        return _ASKED.get(method, _as_it_is)(noted.value)


def record_decisions(model: nn.Module, call: Callable[[], Any]) -> Decisions:
    """Run the model and note what it asks of tensors; the model is left as it was.

    Empty where there is nothing to ask (a model on the meta device has no values).
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type == "meta" for t in tensors):
        return {}
    recorder = _Record()
    try:
        with left_as_it_was(model), torch.enable_grad(), recorder:
            call()
    except Exception:
        return {}
    return dict(recorder.made)
