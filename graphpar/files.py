"""Files that are written whole or not at all."""

import errno
import os
import tempfile
from pathlib import Path

from graphpar.errors import PlanError


def write_whole(target: Path, data: bytes) -> None:
    """Write beside the target and rename, so that no reader ever sees half a file.

    Missing folders are made. A device or a pipe, such as `/dev/stdout`, is written to as it is: renaming
    would put a file in its place.

    Raises:
        OSError: The target cannot be written; what it held before is still there.
    """
    try:
        _write_whole(target, data)
    except OSError as error:
        if error.filename is None:
            error.filename = str(target)
        raise


def _write_whole(target: Path, data: bytes) -> None:
    if is_special(target):
        target.write_bytes(data)
        return
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_asked(target: Path, data: bytes, what: str) -> None:
    """Write whole where the user asked for it.

    Raises:
        PlanError: The path cannot be written to; `what` is told before it.
        OSError: The disk is full.
    """
    try:
        write_whole(target, data)
    except OSError as error:
        if is_full(error):
            raise
        raise PlanError(
            f"{what} {target}: cannot be written: {error.strerror or error}; "
            "give a path in a folder you may write to"
        ) from error


def is_full(error: OSError) -> bool:
    """Whether it is the disk, not the path, that took no more: another path would not help.

    >>> is_full(OSError(errno.ENOSPC, "no space")), is_full(PermissionError(errno.EACCES, "no"))
    (True, False)
    """
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def is_special(target: Path) -> bool:
    """Whether a path is no plain file and will not become one.

    >>> is_special(Path("/dev/stdout")), is_special(Path("plan.json"))
    (True, False)
    """
    return target.parts[:2] in (("/", "dev"), ("/", "proc")) or (target.exists() and not target.is_file())


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written, before what would be written is worked out.

    Raises:
        ValueError: Its folder cannot be made or written to.
    """
    target = Path(path)
    if is_special(target):
        if target.is_dir():
            raise ValueError(f"{target} is a folder; give the name of a file in it")
        return
    folder = next((p for p in target.resolve().parents if p.exists()), Path("/"))
    if not folder.is_dir():
        raise ValueError(f"{target} cannot be written: {folder} is no folder")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise ValueError(f"{target} cannot be written: no permission; give a path you may write to")
