"""A thread that compiles in the background, and that the end of the process does not wait for."""

import atexit
import sys
import threading
from collections.abc import Callable
from functools import cache
from multiprocessing import parent_process

from graphpar.partition.jit import StoppedError, stopped_once

_SILENT_S = 1.0
"""So long the end waits without a word."""


def _nothing() -> None:
    pass


@cache
def say_once(words: str) -> None:
    """Tell whoever looks at a terminal why nothing happens there.

    Processes that solve for another one keep silent: each would say the same.
    """
    if parent_process() is not None or sys.stderr is None or sys.stderr.closed:
        return
    if sys.stderr.isatty():
        print(f"graphpar: {words}", file=sys.stderr)


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

    def stop(self) -> None:
        """End after the compiler's current step."""
        self._ending = True
        self._wake()

    def run(self) -> None:
        """Work until told to stop."""
        try:
            with stopped_once(lambda: self._ending):
                self._work()
        except StoppedError:
            pass

    def _end(self) -> None:
        self.stop()
        self.join(_SILENT_S)
        if self.is_alive():
            say_once("ending once a loop of the search is compiled, which later runs load")
        self.join()
