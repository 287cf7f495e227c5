"""Threads of one process take turns at a job."""

import os
import threading


class Turn:
    """A lock that its holder may take again, and that a forked child does not inherit as taken.

    A child forked while another thread held it would wait for ever for a thread that it does not have.

    >>> turn = Turn()
    >>> with turn, turn:
    ...     pass
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._renew()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
