"""The driver's side of the zygote: asks it for workers and hears which of them ended."""

import atexit
import contextlib
import os
import select
import signal
import site
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path

from graphpar.errors import RunError
from graphpar.runtime.messages import receive

EXIT = struct.Struct("!qq")
"""A notice of the zygote: a process number and the exit code of that process."""
FORK, QUIT = b"f", b"q"
"""Requests to the zygote."""
_END_S = 5.0
"""How long the zygote gets to end by itself."""


class ForkServer:
    """The process that forks workers; one per driver process, started when first needed.

    Requests and notices are single small packets, so that an interrupt between two of them leaves
    nothing half said; several threads may use it at once.
    """

    _current: "ForkServer | None" = None
    _starting = threading.Lock()

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            ends = str(theirs.fileno()), str(os.getpid())
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "graphpar.runtime.zygote", *ends],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(),
            )
        self.owner = self._starter = os.getpid()
        self._exits: dict[int, int] = {}
        self._ready = False
        self._lost = False
        self._lock = threading.RLock()
        atexit.register(self.close)

    @classmethod
    def get(cls) -> "ForkServer":
        """The living server of this process; it may still be starting."""
        with cls._starting:
            current = cls._current
            if current is None or not current.usable:
                current = cls._current = cls()
            return current

    def adopt(self) -> None:
        """Make this server, which the parent process started and leaves alone meanwhile, this process's.

        It spares a forked process the import of torch in a server of its own.
        """
        with self._starting:
            self.owner = os.getpid()
            ForkServer._current = self

    @property
    def usable(self) -> bool:
        """Whether this process started or adopted it and it still runs."""
        if self.owner != os.getpid() or self._lost:
            return False
        return self._starter != self.owner or self.process.poll() is None

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker's process number and the driver's end of its channel.

        Raises:
            RunError: The zygote could not be started, or is gone.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self.channel, [FORK], [theirs.fileno()])
            return int(receive(ours).data["pid"]), ours
        except BaseException as error:
            ours.close()
            if not isinstance(error, (OSError, EOFError)):
                raise
            raise RunError(
                "Local workers could not be started: the process that starts them ended with code "
                f"{self._exit_code()}. See its message above; `graphpar doctor` checks the installation."
            ) from error

    def exit_code(self, pid: int) -> int | None:
        """How a worker ended, None while it runs or where nobody knows."""
        self._listen(0.0)
        return self._exits.get(pid)

    def wait_for(self, pids: Collection[int], seconds: float) -> list[int]:
        """Wait until the workers have ended; returns those that have not."""
        until = time.monotonic() + seconds
        while (alive := [pid for pid in pids if self._is_alive(pid)]) and time.monotonic() < until:
            self._listen(0.05)
        return alive

    def close(self) -> None:
        """End the zygote, and with it every worker."""
        if self.owner != os.getpid():
            return
        with contextlib.suppress(OSError):  # a process forked by the driver may keep the channel open
            self.channel.sendall(QUIT)
        self.channel.close()
        self._lost = True
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _is_alive(self, pid: int) -> bool:
        if pid in self._exits:
            return False
        if not self._lost:
            return True
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False

    def _listen(self, timeout_s: float) -> None:
        """Take in notices of workers that ended."""
        with self._lock:
            while not self._lost and _readable(self.channel, timeout_s):
                notice = self.channel.recv(EXIT.size, socket.MSG_WAITALL)
                self._lost = len(notice) < EXIT.size
                if not self._lost:
                    pid, code = EXIT.unpack(notice)
                    self._exits[pid] = code
                timeout_s = 0.0
        if self._lost:
            time.sleep(timeout_s)

    def _exit_code(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(1.0)
        return None


_KEEPS_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
}
"""Workers of glibc keep what a step frees for the next one, which needs as much again: handing it back to
the system and getting it anew, zeroed page by page, took 7 % of a step and varied. One heap for all
threads, or what a thread freed would be kept for that thread alone. MKL's products, too, take what they
pack operands into from that heap: a store of their own keeps 5 to 30 MB, by the shapes it has seen.

Splinters beside aligned tensors are given back at once: kept in the thread's cache, or in the bins of
small chunks that are not joined with what is free beside them, they stay between a freed tensor and its
neighbours, and no tensor of the same size fits into its place again. That took up to two thirds more than
all tensors together."""


_COUNTS_GPUS_ASIDE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Torch asks the management library whether there are GPUs: a process that has asked the CUDA driver
itself cannot fork any that use them."""


def _environment() -> dict[str, str]:
    """One thread while forking; graphpar itself is found wherever the driver found it."""
    environment = {**_KEEPS_MEMORY, **_COUNTS_GPUS_ASIDE, **os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    root = str(Path(__file__).resolve().parents[2])
    if root not in site.getsitepackages():
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _readable(channel: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
