"""One end of a measurement of messages between two processes of this machine; `measure` starts two.

Run as `python -m graphpar.loopback RANK STORE_FILE`; rank 0 prints the result as JSON.
"""

import json
import sys
import time
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

_SMALL_BYTES = 64
_LARGE_BYTES = 1 << 23
_TIMEOUT = timedelta(seconds=60)
_BURSTS = 8
_PAUSE_S = 0.05
"""Between bursts, so that the scheduler can put two processes that share a core on two."""


def main(rank: int, store: str) -> None:
    """Bounce small and large messages between two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=_TIMEOUT
    )
    latency_s = _one_way_s(rank, _SMALL_BYTES, 30)
    large_s = _one_way_s(rank, _LARGE_BYTES, 5)
    dist.destroy_process_group()
    if rank == 0:
        bytes_per_s = _LARGE_BYTES / max(large_s - latency_s, large_s / 2)
        print(json.dumps({"latency_s": latency_s, "bytes_per_s": bytes_per_s}))


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


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
