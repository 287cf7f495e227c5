"""Compiled inner loops: numba where it is installed, plain Python where it is not.

The loops of message passing and annealing visit one strategy pair at a time, which no array operation
expresses. Without numba they give the same numbers some hundred times slower; `COMPILED` lets a caller
say so. Compiled code is kept on disk beside the module (or in the user's cache folder), so only the first
run of an installation waits for the compiler.

Numba itself is imported when a loop is first called: most plans are found without, in less time than that
takes.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache, update_wrapper
from typing import Any, TypeVar, cast

from graphpar.loading import uncollected

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None
"""Whether loops are compiled; a working installation without numba is slower, not broken."""

_log = logging.getLogger("graphpar.solver")


def compiled(function: FunctionT) -> FunctionT:
    """Compile a function of arrays and numbers; it releases the interpreter lock while it runs.

    Sums may be reordered; no NaN is expected and no infinity (see `FlatGraph`).
    """
    return _later(function, fastmath=True)


def compiled_exactly(function: FunctionT) -> FunctionT:
    """The same for functions that meet infinities: floating point as written."""
    return _later(function, fastmath=False)


def _later(function: FunctionT, *, fastmath: bool) -> FunctionT:
    return cast(FunctionT, _Loop(function, fastmath)) if COMPILED else function


class _Loop:
    """A function that is compiled when it is first called, or compiled code that calls it is."""

    def __init__(self, function: Callable[..., Any], fastmath: bool) -> None:
        update_wrapper(self, function)
        self._function, self._fastmath = function, fastmath
        self._made: Any = None

    def __call__(self, *args: Any) -> Any:
        return (self._made or self.made())(*args)

    def made(self) -> Any:
        """The function as numba makes it."""
        if self._made is None:
            njit = _numba()
            self._made = self._function if njit is None else _make(njit, self._function, self._fastmath)
        return self._made


def _make(njit: Any, function: Callable[..., Any], fastmath: bool) -> Any:
    options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        # No folder can be written, neither beside the module nor the user's cache: compile every time.
        return njit(**options)(function)


@cache
def _numba() -> Any:
    """Numba's decorator, with loops made known to it; None where it cannot be imported."""
    try:
        with uncollected():
            from numba import njit
            from numba.extending import typeof_impl
    except ImportError as error:
        _log.warning("numba is installed but cannot be imported, so searches are far slower: %s", error)
        return None
    typeof_impl.register(_Loop)(lambda loop, context: typeof_impl(loop.made(), context))
    return njit
