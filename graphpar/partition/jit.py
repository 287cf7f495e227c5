"""Compiled inner loops: numba where it is installed, plain Python where it is not.

The loops of message passing and annealing visit one strategy pair at a time, which no array operation
expresses. Without numba they give the same numbers some hundred times slower; `COMPILED` lets a caller
say so. Compiled code is kept on disk beside the module (or in the user's cache folder), so only the first
run of an installation waits for the compiler.
"""

from collections.abc import Callable
from pathlib import Path
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


def is_kept(function: Callable[..., Any]) -> bool:
    """Whether a compiled form of a function lies on disk: it loads soon, unless its file has changed.

    >>> is_kept(len)
    False
    """
    folder = getattr(getattr(function, "stats", None), "cache_path", None)
    if folder is None:
        return False
    code = getattr(function, "py_func").__code__  # noqa: B009 (numba's, which has no types)
    return any(Path(folder).glob(f"*.{code.co_name}-{code.co_firstlineno}.*.nbi"))


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
