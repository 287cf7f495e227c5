"""Files are written whole or not at all, and nothing else is put in the place of a device."""

from pathlib import Path

import pytest

from graphpar.files import check_writable, write_whole


def test_a_link_stays_a_link_and_folders_are_made(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "new" / "target")
    write_whole(link, b"1")
    assert link.is_symlink() and (tmp_path / "new" / "target").read_bytes() == b"1"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["target"]


def test_a_device_is_written_to_and_stays_one() -> None:
    write_whole(Path("/dev/null"), b"1")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_whole(Path("/dev/full"), b"1")


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    check_writable(tmp_path / "new" / "folder" / "file")
    with pytest.raises(ValueError, match="no folder"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path)
