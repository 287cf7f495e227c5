"""Compiled inner loops: numba where it is installed, plain Python where it is not.

The loops of message passing and annealing visit one strategy pair at a time, which no array operation
expresses. Without numba they give the same numbers some hundred times slower; `COMPILED` lets a caller
say so. Compiled code is kept on disk beside the module (or in the user's cache folder), so only the first
run of an installation waits for the compiler.
"""

from collections.abc import Callable
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

try:
    from numba import njit
except ImportError:  # a working installation without numba is slower, not broken
    COMPILED = False
else:
    COMPILED = True


def compiled(function: FunctionT) -> FunctionT:
    """Compile a function of arrays and numbers; it releases the interpreter lock while it runs.

    Sums may be reordered; no NaN is expected and no infinity (see `FlatGraph`).
    """
    return _compile(function, fastmath=True)


def compiled_exactly(function: FunctionT) -> FunctionT:
    """The same for functions that meet infinities: floating point as written."""
    return _compile(function, fastmath=False)


def _compile(function: FunctionT, *, fastmath: bool) -> FunctionT:
    if not COMPILED:
        return function
    options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    options["no_cfunc_wrapper"] = True  # nobody passes these functions on, and it is a fifth of compiling
    make: Any = njit
    try:
        fast: FunctionT = make(cache=True, **options)(function)
    except RuntimeError:
        # No folder can be written, neither beside the module nor the user's cache: compile every time.
        fast = make(**options)(function)
    return fast
