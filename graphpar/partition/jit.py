"""Compiled inner loops: numba where it is installed, plain Python where it is not.

The loops of message passing and annealing visit one strategy pair at a time, which no array operation
expresses. Without numba they give the same numbers some hundred times slower; `COMPILED` lets a caller
say so. Compiled code is kept on disk beside the module (or in the user's cache folder), so only the first
run of an installation waits for the compiler.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

try:
    from numba import njit
except ImportError:  # a working installation without numba is slower, not broken
    COMPILED = False
else:
    from numba.core.event import Listener, install_listener

    COMPILED = True


class StoppedError(BaseException):
    """What was being compiled is not needed any more. No compiler catches it on the way."""


def compiled(function: FunctionT) -> FunctionT:
    """Compile a function of arrays and numbers; it releases the interpreter lock while it runs.

    Sums may be reordered; no NaN is expected and no infinity (see `FlatGraph`).
    """
    return _compile(function, fastmath=True)


def compiled_exactly(function: FunctionT) -> FunctionT:
    """The same for functions that meet infinities: floating point as written."""
    return _compile(function, fastmath=False)


@contextmanager
def stopped_once(should_stop: Callable[[], bool]) -> Iterator[None]:
    """Whatever the calling thread compiles meanwhile ends before the compiler's next step once it should.

    Functions that are compiled by then lie on disk.

    Raises:
        StoppedError: Where a compilation was ended.
    """
    if not COMPILED:
        yield
        return
    thread = threading.get_ident()

    class Watch(Listener):
        def on_start(self, event: object) -> None:
            # Other threads compile, too.
            if threading.get_ident() == thread and should_stop():
                raise StoppedError

        def on_end(self, event: object) -> None:
            pass

    with install_listener("numba:run_pass", Watch()):
        yield


def is_kept(function: Callable[..., Any]) -> bool:
    """Whether a function, as this Python compiles it, lies on disk no older than its file: it loads soon.

    >>> is_kept(len)
    False
    """
    folder = getattr(getattr(function, "stats", None), "cache_path", None)
    if folder is None:
        return False
    code = getattr(function, "py_func").__code__  # noqa: B009 (numba's, which has no types)
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    kept = Path(folder).glob(f"*.{code.co_name}-{code.co_firstlineno}.{python}.nbi")
    return any(_written_s(index) >= _written_s(Path(code.co_filename)) for index in kept)


def _written_s(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


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
