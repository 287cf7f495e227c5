"""A process that has imported torch and does nothing but fork workers.

Importing torch takes over a second per process; forking takes a tenth. The zygote starts no thread
and runs no op but the making of one number, so that forking stays safe. It is
`python -m graphpar.runtime.zygote FD PID`: its end of a socket pair, and the driver it serves.

The driver sends a byte together with the socket of the worker to be forked. The worker says on
that socket which process it is; the zygote says on its own socket which processes ended.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import sys

from graphpar.loading import uncollected

with uncollected():
    import torch

    from graphpar.runtime.fork_server import EXIT, FORK
    from graphpar.runtime.heap import go_on_behind_a_line, keep_small_apart
    from graphpar.runtime.messages import Message, send
    from graphpar.runtime.worker import serve

_CHECK_S = 1.0
"""How often to see whether the driver still lives: its sockets outlive it in processes it forked."""


def main() -> None:
    """Serve until the driver is gone, then end all children."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    driver = int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with uncollected():
        import_for_optimizers()
    gc.freeze()  # a worker that looked through all that was imported would copy its pages
    keep_small_apart()
    go_on_behind_a_line()
    children: set[int] = set()
    watched: list[socket.socket | int] = [channel, wake]
    with contextlib.suppress(OSError):
        while os.getppid() == driver:
            readable = select.select(watched, [], [], _CHECK_S)[0]
            if wake in readable:
                _drain(wake)
                _report_exits(channel, children)
            if channel in readable:
                request, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
                if request != FORK:
                    break
                children.add(_fork(channel, descriptors[0], wake, woken))
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def import_for_optimizers() -> None:
    """Make an optimiser once: torch imports a second's worth of modules when the first is made."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def _fork(channel: socket.socket, descriptor: int, wake: int, woken: int) -> int:
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        channel.close()
        os.close(wake)
        os.close(woken)
        worker = socket.socket(fileno=descriptor)
        send(worker, Message("hello", {"pid": os.getpid()}))
        serve(worker)
    finally:
        os._exit(1)


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except BlockingIOError:
        return


def _report_exits(channel: socket.socket, children: set[int]) -> None:
    for pid in tuple(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)
            channel.sendall(EXIT.pack(pid, os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
