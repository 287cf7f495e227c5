"""Ranks end with the torchrun that started them, also where it is killed and cannot tell them."""

import logging
import os
import signal
import threading
import time

_log = logging.getLogger("graphpar.job")

_CHECK_S = 1.0
"""How often to see whether the parent is the same process."""
GRACE_S = 30.0
"""How long a rank may take to end by itself, as torchrun gives it, too: its script may save something."""


def started_by_torchrun() -> bool:
    """Whether torchrun, not another launcher whose ranks may outlive it, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent(grace_s: float = GRACE_S) -> None:
    """End this process within seconds of its parent, however that ends.

    A torchrun that is killed leaves its ranks to the system: they would train on, hold their devices, and
    wait for ranks elsewhere that were ended. From a thread of its own each is told to end as torchrun
    would tell it (SIGTERM), and is killed where it has not after `grace_s`.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_CHECK_S)
        _log.error("Process %d, which started this one, is gone: this one ends too.", parent)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="graphpar-parent", daemon=True).start()
