"""One end of a measurement of messages between processes of this machine; `measure` starts them.

Run as `python -m graphpar.local.loopback RANK NUM_RANKS STORE_FILE`; rank 0 prints the result as JSON.
Messages go between ranks 0 and 1, gradients are summed over all ranks.
"""

import json
import sys
import time
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

from graphpar.runtime.program import EmulatedLink
from graphpar.runtime.transport import Transport, meet_on_this_machine

_SMALL_BYTES = 64
_MEDIUM_BYTES = 1 << 17
_MESSAGES = 40
_BURST = 10
_WAIT_S = 5e-3
_LATENCY_S = 2e-4
_EMULATED_BYTES_PER_S = 1e9
_LARGE_BYTES = 1 << 23
_TIMEOUT = timedelta(seconds=60)
_BURSTS = 8
_GRADIENTS = 32
_PAUSE_S = 0.05
"""Between bursts, so that the scheduler can put two processes that share a core on two."""


def main(rank: int, num_ranks: int, store: str) -> None:
    """Bounce small and large messages between two ranks, then sum over all of them."""
    torch.set_num_threads(1)
    meet_on_this_machine(store, rank, num_ranks, _TIMEOUT)
    latency_s = large_s = 0.0
    if rank < 2:
        latency_s = _one_way_s(rank, _SMALL_BYTES, 30)
        large_s = _one_way_s(rank, _LARGE_BYTES, 5)
    send_s = receive_s = late_s = 0.0
    if rank < 2:
        send_s, receive_s = _handling_s(rank)
        late_s = _late_s(rank)
    dist.barrier()
    sum_s = _sum_s()
    dist.destroy_process_group()
    if rank == 0:
        bytes_per_s = _LARGE_BYTES / max(large_s - latency_s, large_s / 2)
        message = _LARGE_BYTES / num_ranks
        extra_s = sum_s / (2 * (num_ranks - 1)) - latency_s - message / bytes_per_s
        found = {"latency_s": latency_s, "bytes_per_s": bytes_per_s}
        found |= {"sum_s_per_byte": max(extra_s, 0.0) / message, "send_s": send_s, "receive_s": receive_s}
        found |= {"late_s": late_s}
        print(json.dumps(found))


def _one_way_s(rank: int, num_bytes: int, repeats: int) -> float:
    """Half the median time of a message there and back, in the quietest of several bursts.

    Other processes on the cores only ever add to it.
    """
    buffer = torch.zeros(num_bytes, dtype=torch.uint8)
    bursts = []
    for _ in range(_BURSTS):
        time.sleep(_PAUSE_S)
        bursts.append(median(_bounce(rank, buffer) for _ in range(repeats)))
    return min(bursts) / 2


def _emulated(rank: int) -> Transport:
    link = EmulatedLink(rank=1 - rank, latency_s=_LATENCY_S, bytes_per_s=_EMULATED_BYTES_PER_S)
    return Transport(torch.device("cpu"), (0, 1), (), (link,))


def _late_s(rank: int) -> float:
    """Median seconds by which rank 0 has a message later than the link says, in the quietest burst.

    The system wakes who waits for it late, and hands it over. Each one carries the time when it was sent,
    by the clock that both processes read.
    """
    transport, value = _emulated(rank), torch.zeros(_MEDIUM_BYTES // 8, dtype=torch.float64)
    meant_s, late = _LATENCY_S + _MEDIUM_BYTES / _EMULATED_BYTES_PER_S, []
    for number in range(_MESSAGES):
        if rank == 0:
            arrived = transport.post(1, (len(value),), value.dtype, number).wait()
            late.append(time.monotonic() - float(arrived[0]) - meant_s)
        else:
            time.sleep(_WAIT_S)
            value[0] = time.monotonic()
            transport.send(0, value, number)
    transport.flush()
    transport.close()
    bursts = [late[at : at + _BURST] for at in range(0, len(late), _BURST)]
    return max(min(map(median, bursts), default=0.0), 0.0)


def _handling_s(rank: int) -> tuple[float, float]:
    """Median seconds that a worker spends itself on sending, and on receiving what has come meanwhile.

    It has waited before either, as workers do, and the next receive is posted when one is taken in.
    """
    transport, value = _emulated(rank), torch.zeros(_MEDIUM_BYTES // 4)
    sends, receives = [], []
    arrival = transport.post(1 - rank, (len(value),), value.dtype, 0)
    for number in range(_MESSAGES):
        time.sleep(_WAIT_S)
        start = time.perf_counter()
        transport.send(1 - rank, value, number)
        sends.append(time.perf_counter() - start)
        time.sleep(_WAIT_S)
        start = time.perf_counter()
        arrival.wait()
        if number + 1 < _MESSAGES:
            arrival = transport.post(1 - rank, (len(value),), value.dtype, number + 1)
        receives.append(time.perf_counter() - start)
    transport.flush()
    transport.close()
    return median(sends), median(receives)


def _bounce(rank: int, buffer: torch.Tensor) -> float:
    """Seconds of one message there and back."""
    start = time.perf_counter()
    if rank == 0:
        dist.send(buffer, 1)
        dist.recv(buffer, 1)
    else:
        dist.recv(buffer, 0)
        dist.send(buffer, 0)
    return time.perf_counter() - start


def _sum_s() -> float:
    """Median time of a gradient sum as workers do it, in the quietest of several bursts."""
    parts = [torch.zeros(_LARGE_BYTES // 4 // _GRADIENTS) for _ in range(_GRADIENTS)]
    bursts = []
    for _ in range(_BURSTS):
        time.sleep(_PAUSE_S)
        bursts.append(median(_sum_once(parts) for _ in range(3)))
    return min(bursts)


def _sum_once(parts: list[torch.Tensor]) -> float:
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(torch.cat(parts))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
