"""A heap in which a tensor finds the place that another of its size has left, where glibc manages it.

Tensors are aligned to 64 bytes. For that glibc takes 112 bytes more than a tensor has, and frees what is
before and behind it. Two things then keep the next tensor of that size from the same place. Something
small has come to lie in these splinters meanwhile. Or they are too short: where a chunk begins at a
multiple of 64, 48 bytes stay between a tensor and the next, its place with both splinters is 16 bytes too
short for what is asked for, and what follows begins at a multiple of 64 again. Where a chunk begins 32
bytes behind one, 80 bytes stay, one of the two splinters is enough, and that goes on, too.

So small things get free places of their own sizes, which are looked at first, other things some room, and
the heap goes on 32 bytes behind a multiple of 64. A model with a vocabulary of 32,000, whose logits take
131 MB, held 164 MB less.
"""

import ctypes
from typing import Any

_SMALL_BYTES = range(32, 128, 16)
"""Chunks of these sizes are kept apart: a splinter has 32 to 96 bytes, two that meet a few more."""
_OF_EACH = 4000
"""They take 2.5 MB in all, with what lies between them, or they would become one."""
_ROOM_BYTES = 4 * 2**20
"""For what is neither small nor a tensor, as Python's larger objects: it has any size, and would shift
what comes behind it. With 1 MB, 4 and 16 a Llama of two layers held the same, without any 70 MB more."""
_HEADER_BYTES, _LINE_BYTES, _BEGIN_BYTES = 8, 64, 32


def keep_small_apart() -> None:
    """Leave free places for small things; called once, in the process that workers are forked from."""
    libc = _glibc()
    if libc is None:
        return
    for size in _SMALL_BYTES:
        chunks = []
        for _ in range(_OF_EACH):
            chunks.append(libc.malloc(size - _HEADER_BYTES))
            libc.malloc(_SMALL_BYTES[0] - _HEADER_BYTES)
        for chunk in chunks:
            libc.free(chunk)


def go_on_behind_a_line() -> None:
    """Let what comes to the heap's end begin 32 bytes behind a multiple of 64, before a first step.

    What is skipped is larger than all free places, so that it is at the end, and is never touched: it
    takes addresses, no memory, while nothing large was freed there. Behind it is room for other things.
    """
    libc = _glibc()
    if libc is None:
        return
    info = libc.mallinfo2()
    skipped = (info.free_bytes - info.end_bytes) // _LINE_BYTES * _LINE_BYTES + 2 * _LINE_BYTES
    place = libc.malloc(skipped - _HEADER_BYTES)
    if place is None:
        return  # addresses may be limited, too
    missing = (_BEGIN_BYTES - _end(libc, place)) % _LINE_BYTES
    libc.free(place)
    libc.malloc(skipped - _HEADER_BYTES + missing)
    room = libc.malloc(_ROOM_BYTES - _HEADER_BYTES)
    libc.malloc(skipped - _HEADER_BYTES)  # or the room would be part of the end
    libc.free(room)


def _end(libc: Any, place: int) -> int:
    """Where the next chunk begins: its header stands in what is counted to this one, but 8 bytes."""
    end: int = place + libc.malloc_usable_size(place) - _HEADER_BYTES
    return end


def _is_known(version: str) -> bool:
    """Whether glibc of a version counts beyond 2 GB and cuts aligned places out as described above.

    That was written anew for 2.38. With 2.41 no tensor takes another's place, prepared or not.

    >>> [_is_known(version) for version in ("2.31", "2.36", "2.41", "3.0")]
    [False, True, False, False]
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    return (2, 33) <= (major, minor) < (2, 38)


class _Info(ctypes.Structure):
    """`struct mallinfo2`; only two of its numbers are read: `fordblks` and `keepcost`."""

    _fields_ = (
        ("unread", ctypes.c_size_t * 8),
        ("free_bytes", ctypes.c_size_t),
        ("end_bytes", ctypes.c_size_t),
    )


def _glibc() -> Any:
    """The C library; None where it is another, or one that this does not hold for."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallinfo2"):
        return None
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    if not _is_known(libc.gnu_get_libc_version().decode()):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.malloc_usable_size.argtypes = [ctypes.c_void_p]
    libc.malloc_usable_size.restype = ctypes.c_size_t
    libc.mallinfo2.restype = _Info
    return libc
