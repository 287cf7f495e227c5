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
from typing import Any, ClassVar

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
        if name in self._INSTEAD:
            made = self._INSTEAD[name](self, *args, **kwargs)
            if made is not NotImplemented:
                return made
        if self._found:
            _count(self._found, flatten((args, kwargs))[0], self._checks)
        of_tensor = bool(args) and isinstance(args[0], torch.Tensor)
        if name in _SIZED:
            kept = args[:1] if of_tensor and name not in _MADE else ()
            args = (*kept, *map(self._size, args[len(kept) :]))
            kwargs = {key: self._size(value) for key, value in kwargs.items()}
        if of_tensor and name in self._ASKING:
            return self._ASKING[name](self, func, *args, **kwargs)
        return func(*args, **kwargs)

    def _value(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What one of `_ASKED` makes of a tensor of one number."""
        if tensor.numel() != 1:
            return func(tensor, *args, **kwargs)
        return self.answer(func.__name__, tensor, lambda: func(tensor, *args, **kwargs))

    def _list(self, func: Any, tensor: torch.Tensor) -> Any:
        """`tolist`, asked number by number."""
        if not tensor.ndim:
            return self.answer("item", tensor, tensor.item)
        return [self._list(func, part) for part in tensor.unbind(0)]

    def _format(self, func: Any, tensor: torch.Tensor, *args: Any) -> Any:
        if tensor.ndim:
            return func(tensor, *args)
        return format(self.answer("item", tensor, tensor.item), *args)

    def _equal(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or tensor.shape != args[0].shape:
            return func(tensor, *args, **kwargs)
        return self.answer("equal", (tensor == args[0]).all(), lambda: func(tensor, *args, **kwargs))

    def _where(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs) if args[1:] or kwargs else self._places(args[0])

    def _not_zero(self, func: Any, tensor: torch.Tensor, **kwargs: Any) -> Any:
        return self._places(tensor) if kwargs.get("as_tuple") else self._nonzero(tensor)

    def _read(self, func: Any, tensor: torch.Tensor, index: Any) -> Any:
        return func(tensor, self._index(index, read=True))

    def _write(self, func: Any, tensor: torch.Tensor, index: Any, value: Any) -> Any:
        return func(tensor, self._index(index, read=False), value)

    def _masked(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1:
            return func(tensor, *args, **kwargs)
        mask = args[0].expand_as(tensor) if tensor.ndim >= args[0].ndim else args[0]
        return self._selected(tensor.expand_as(mask), mask)

    def _repeat(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`repeat_interleave`, told how many results come of counts."""
        counts = args[0] if args else None
        if isinstance(counts, torch.Tensor) and counts.numel() > 1 and kwargs.get("output_size") is None:
            total = counts.sum()
            kwargs["output_size"] = self.answer("item", total, total.item)
        return func(tensor, *args, **kwargs)

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

    def _write_by_mask(self, tensor: torch.Tensor, index: Any, value: Any) -> Any:
        """One number for all places that a mask was found to have, however many they are."""
        mask = self._mask_of(index, value)
        if mask is None:
            return NotImplemented
        tensor.masked_fill_(mask.reshape(*mask.shape, *[1] * (tensor.ndim - mask.ndim)), value)
        return None

    def _gaussian_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss without torch's question for negative variances, which is asked here."""
        negative = torch.any(torch.as_tensor(args[2] if len(args) > 2 else kwargs["var"]) < 0)
        if self.answer("__bool__", negative, lambda: bool(negative)):
            return NotImplemented
        return gaussian_losses(*args, **kwargs)

    def _ctc_loss(
        self,
        log_probs: torch.Tensor,
        targets: torch.Tensor,
        input_lengths: Any,
        target_lengths: Any,
        blank: int = 0,
        reduction: str | int = "mean",
        zero_infinity: bool = False,
    ) -> Any:
        """The loss by an operator of static shapes, where torch's own does not have to do."""
        lengths = input_lengths, target_lengths
        if log_probs.ndim != 3 or not all(isinstance(n, torch.Tensor) for n in lengths):
            return NotImplemented
        if reduction not in ("none", "mean", "sum", 0, 1, 2):
            return NotImplemented  # torch's own names the mistake
        rows = targets if targets.ndim == 2 else self._rows(targets, target_lengths)
        if rows is None:
            return NotImplemented
        losses: torch.Tensor = ctc_losses(
            log_probs, rows, input_lengths, target_lengths, blank, zero_infinity
        )
        if reduction in ("mean", 1):
            return (losses / target_lengths.clamp_min(1)).mean()
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

    _INSTEAD: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "__setitem__": _write_by_mask, "gaussian_nll_loss": _gaussian_loss, "ctc_loss": _ctc_loss,
    }  # fmt: skip
    """Functions with something else in their place, unless that is not implemented for the arguments."""
    _ASKING: ClassVar[Mapping[str, Callable[..., Any]]] = {
        **dict.fromkeys(_ASKED, _value), "tolist": _list, "__format__": _format, "equal": _equal,
        "nonzero": _not_zero, "argwhere": _not_zero, "where": _where, "__getitem__": _read,
        "__setitem__": _write, "masked_select": _masked, "repeat_interleave": _repeat,
    }  # fmt: skip
    """Functions that ask a tensor for values, or of which the result's shape depends on them."""


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
