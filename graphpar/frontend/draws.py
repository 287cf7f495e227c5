"""Numbers drawn on the host that decide nothing.

Stock models draw a number before each layer and skip the layer where it is below a probability, which is
zero for most users. Random streams moved then, though no result depends on it. While a model is exported,
such a draw gives a number that is only known to lie between bounds: a comparison that comes out the same
for all of them is answered, and any other use ends the export.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np

from graphpar.frontend.frames import called_by_user


class UndecidedError(Exception):
    """What a model does depends on a number drawn on the host."""


class Undecided:
    """A number of which only bounds are known.

    >>> Undecided(0.0, 1.0) < 0.0, 2 > Undecided(0.0, 1.0)
    (False, True)
    >>> Undecided(0.0, 1.0) < 0.5
    Traceback (most recent call last):
    graphpar.frontend.draws.UndecidedError
    """

    __array_ufunc__ = None  # NumPy's numbers leave comparisons to this class
    __slots__ = ("_high", "_low")

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = min(low, high), max(low, high)

    def __lt__(self, other: Any) -> bool:
        return self._decided(other, self._high, self._low, strict=True)

    def __le__(self, other: Any) -> bool:
        return self._decided(other, self._high, self._low, strict=False)

    def __gt__(self, other: Any) -> bool:
        return not self <= other

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def _decided(self, other: Any, high: float, low: float, *, strict: bool) -> bool:
        if isinstance(other, (int, float, np.integer, np.floating)):
            if high < other or (high == other and not strict):
                return True
            if low > other or (low == other and strict):
                return False
        _refuse()


def _refuse(*_: Any) -> NoReturn:
    raise UndecidedError


for _name in (
    "eq ne bool int float index complex hash add radd sub rsub mul rmul truediv rtruediv floordiv "
    "rfloordiv mod rmod pow rpow neg pos abs round str repr format array iter len getitem"
).split():
    setattr(Undecided, f"__{_name}__", _refuse)


@dataclass
class Draws:
    """What becomes of numbers drawn on the host.

    Attributes:
        undecided: Whether they are undecided, or drawn as ever.
        asked: Whether the user's code drew any that was undecided.
    """

    undecided: bool = True
    asked: bool = False


def draws_stand_ins(draws: Draws) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """Functions that draw a single number, and what is to stand in for each."""
    for name in ("uniform", "random", "random_sample", "rand"):
        yield np.random, name, partial(_undecided, draws)
    for name in ("uniform", "random"):
        yield random, name, partial(_undecided, draws)


def _undecided(draws: Draws, original: Any) -> Any:
    def draw(*args: Any, **kwargs: Any) -> Any:
        bounds = args if args else (kwargs.get("low", 0.0), kwargs.get("high", 1.0))
        single = not set(kwargs) - {"low", "high"} and original.__name__ == "uniform"
        single = (single and len(bounds) == 2) or not (args or kwargs)
        if not (draws.undecided and single and called_by_user()):
            return original(*args, **kwargs)
        draws.asked = True
        return Undecided(*bounds)

    return draw
