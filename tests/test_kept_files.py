"""What is kept for next time stays bounded, and what others keep beside it is left alone."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from graphpar.calibration import Fingerprint
from graphpar.cost_models.measured import StageTiming, load_timing, save_timing
from graphpar.kept_files import read_kept, write_kept

KIND = r"kept-\d+\.json"


def made_at(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_that_were_not_used_for_longest_go_and_others_stay(tmp_path: Path) -> None:
    mine = tmp_path / "kept-mine.json"
    mine.write_text("no number")
    made_at(mine, 0)
    for number in range(4):
        write_kept(tmp_path / f"kept-{number}.json", b"%d" % number, KIND, most=4)
        made_at(tmp_path / f"kept-{number}.json", number)
    assert read_kept(tmp_path / "kept-0.json") == b"0"  # used now, and so younger than the others
    write_kept(tmp_path / "kept-4.json", b"4", KIND, most=3)
    assert names(tmp_path) == {"kept-mine.json", "kept-0.json", "kept-3.json", "kept-4.json"}
    assert read_kept(tmp_path / "kept-1.json") is None


def test_several_that_write_at_once_lose_nothing_that_is_new(tmp_path: Path) -> None:
    def write(number: int) -> None:
        write_kept(tmp_path / f"kept-{number}.json", b"x" * 1000, KIND, most=8)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(60)))
    left = names(tmp_path)
    assert len(left) == 8 and all((tmp_path / name).stat().st_size == 1000 for name in left)


def test_timings_are_of_the_kind_that_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("graphpar.cost_models.measured.write_kept", partial(write_kept, most=2))
    mine, timing = Fingerprint("a processor", 2, "2.13", 1), StageTiming((), 1.0, 1.0)
    paths = [save_timing(mine, f"{number:064x}"[::-1], timing) for number in range(4)]
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert load_timing(mine, f"{3:064x}"[::-1], StageTiming) == timing
