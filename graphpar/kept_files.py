"""Files that can be made anew: kept for next time, as many as were used last."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from graphpar.files import write_whole

MOST = 500
"""Files of one kind that are kept in a folder: some megabytes."""


def read_kept(path: Path) -> bytes | None:
    """What a file holds, which counts as used now; None where it cannot be read."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # one that others own may be read only
        os.utime(path)
    return found


def write_kept(path: Path, data: bytes, kind: str, most: int = MOST) -> None:
    """Write a file whole, then remove those of its kind that were not used for longest.

    Other processes may do the same at the same time: what is gone already is left out, and a file that is
    being read is read to its end.

    Args:
        path: Where; missing folders are made.
        data: What.
        kind: A regular expression of the names of files of its kind, and of no others: the folder may be
            the user's.
        most: How many of them may stay.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(path, data)
    latest_first = sorted(_last_used(path.parent, re.compile(kind)), reverse=True)
    for _, old in latest_first[most:]:
        with contextlib.suppress(OSError):
            os.unlink(old)


def _last_used(folder: Path, kind: re.Pattern[str]) -> Iterator[tuple[float, str]]:
    """When the files of a kind were used, and their paths."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has just removed it
                if kind.fullmatch(entry.name):
                    yield entry.stat().st_mtime, entry.path
