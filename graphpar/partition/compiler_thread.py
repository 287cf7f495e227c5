"""A thread that compiles in the background, and that the end of the process does not wait for."""

import atexit
import sys
import threading
from collections.abc import Callable

from graphpar.partition.jit import StoppedError, stopped_once

_SILENT_S = 1.0
"""So long the end waits without a word."""

_ENDING = "ending once the part of the search that is being compiled, for later runs, is done"


def _nothing() -> None:
    pass


class CompilerThread(threading.Thread):
    """Does some work that compiles until that is done or the interpreter ends.

    A thread that the interpreter's end stops inside the compiler takes the process down. So the compiler
    is asked to stop, which it does after its current step; what it has made by then lies on disk, where
    later runs go on from.
    """

    def __init__(self, work: Callable[[], None], name: str, wake: Callable[[], None] = _nothing) -> None:
        """`wake` is called at the end, and has work that waits for something end."""
        super().__init__(name=name, daemon=True)
        self._work, self._wake, self._ending = work, wake, False

    def start(self) -> None:
        """Begin, and see to the end."""
        super().start()
        atexit.register(self._end)

    def run(self) -> None:
        """Work until told to stop."""
        try:
            with stopped_once(lambda: self._ending):
                self._work()
        except StoppedError:
            pass

    def _end(self) -> None:
        self._ending = True
        self._wake()
        self.join(_SILENT_S)
        if self.is_alive() and sys.stderr is not None and sys.stderr.isatty():
            print(f"graphpar: {_ENDING}", file=sys.stderr)
        self.join()
