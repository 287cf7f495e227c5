"""A process that has imported torch and does nothing but fork workers.

Importing torch takes over a second per process; forking takes a tenth. The zygote never runs an op and
never starts a thread, so that forking stays safe. It is `python -m graphpar.runtime.zygote FD`, FD
being its end of a socket pair.
"""

import os
import select
import signal
import socket
import sys

from graphpar.runtime.messages import Message, receive, send
from graphpar.runtime.worker import serve


def main() -> None:
    """Serve until the driver closes the channel, then end all children."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    send(channel, Message("ready", {"pid": os.getpid()}))
    children: set[int] = set()
    while True:
        watched: list[socket.socket | int] = [channel, wake]
        readable = select.select(watched, [], [])[0]
        if wake in readable:
            _drain(wake)
            _report_exits(channel, children)
        if channel not in readable:
            continue
        try:
            receive(channel)
            _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        except (EOFError, OSError):
            break
        pid = os.fork()
        if pid == 0:
            _become_worker(channel, descriptors[0], wake, woken)
        os.close(descriptors[0])
        children.add(pid)
        send(channel, Message("forked", {"pid": pid}))
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


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
            code = os.waitstatus_to_exitcode(status)
            send(channel, Message("exited", {"pid": pid, "code": code}))


def _become_worker(channel: socket.socket, descriptor: int, wake: int, woken: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel.close()
    os.close(wake)
    os.close(woken)
    try:
        serve(socket.socket(fileno=descriptor))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
